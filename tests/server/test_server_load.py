"""Many clients at once: nothing lost, nothing mixed up, and the memory stays what it was."""

import asyncio
import base64
import json
import random
import time

import httpx2
import pytest
import real_engine
from fake_engine import FakeEngine
from serving import data_uri, expected, picture, question, running

from mllm_jax.server import chat_request, prompts
from mllm_jax.server.limits import Limits


async def load(url, asked, clients, seconds=0.0, least=2):
  """Asks (body, answer)s over and over, each client at least so often and for so long; (answers that were right, those
  that were not, seconds to each first token, bytes of this process after a quarter of the time and in the end)."""
  right, wrong, first, sizes = [], [], [], []
  end = time.monotonic() + seconds

  async def client(http, rng):
    count = 0
    while count < least or time.monotonic() < end:
      count += 1
      body, answer = rng.choice(asked)
      begun, said = time.monotonic(), ""
      async with http.stream("POST", f"{url}/v1/chat/completions", json=body | {"stream": True}) as response:
        async for line in response.aiter_lines():
          if line.startswith("data: {") and response.status_code == 200:
            [choice] = json.loads(line[6:])["choices"]
            if choice["delta"].get("content") and not said:
              first.append(time.monotonic() - begun)
            said += choice["delta"].get("content", "")
      (right if said == answer and response.status_code == 200 else wrong).append((response.status_code, said))

  async def watch():
    for share in (0.25, 0.75):
      await asyncio.sleep(share * seconds)
      with open("/proc/self/statm") as file:
        sizes.append(int(file.read().split()[1]) * 4096)

  async with httpx2.AsyncClient(timeout=120, limits=httpx2.Limits(max_connections=clients)) as http:
    await asyncio.gather(*(client(http, random.Random(number)) for number in range(clients)), watch())
  return right, wrong, sorted(first), sizes


def bodies():
  """Short and long, with pictures and without, greedy and drawn."""
  for number in range(24):
    pictures = [data_uri(picture(number, (60 + number, 50)))] * (number % 3 > 0)
    drawn = {"temperature": 1.0, "seed": number} if number % 2 else {}
    yield question("what is it " * (1 + number % 5), pictures, max_tokens=2 + number % 7, **drawn)


def alone(engine, processor, body):
  """What the engine answers where nobody else asks."""
  chat = chat_request.parse(body, "tiny")
  contents = [base64.b64decode(each.url.partition(",")[2]) for each in chat.pictures]
  return engine.answer(prompts.requests(processor, chat, contents, Limits(engine.rows, engine.max_length)))[0].text


def test_sixty_four_clients(processor):
  asked = [(body, expected_cut(processor, body)) for body in bodies()]
  with running(processor, FakeEngine(rows=8)) as url:
    right, wrong, first, _ = asyncio.run(load(url, asked, clients=64))
  assert wrong == [] and len(right) == 128


def expected_cut(processor, body):
  return " ".join(expected(processor, body, body.get("seed", 0)).split()[: body["max_tokens"]])


@pytest.fixture(scope="module")
def real(processor):
  return real_engine.make(processor.tokenizer, rows=4, max_length=256)


def test_the_engines_own_answers(real, monkeypatch):
  engine, processor = real
  monkeypatch.setattr(engine, "warm_up", lambda: [])  # it would compile more than is used here
  asked = list(bodies())[:6]
  answers = [alone(engine, processor, body) for body in asked]
  assert len(set(answers)) > 3
  with running(processor, engine) as url:
    right, wrong, _, _ = asyncio.run(load(url, list(zip(asked, answers)), clients=8))
  assert wrong == [] and len(right) == 16


@pytest.mark.long
def test_sixty_four_clients_for_two_minutes(real, capsys):
  engine, processor = real
  asked = list(bodies())
  asked = list(zip(asked, [alone(engine, processor, body) for body in asked]))
  with running(processor, engine) as url:
    asyncio.run(load(url, asked, clients=64, seconds=20))  # what is compiled late, and buffers that grow once
    right, wrong, first, (before, after) = asyncio.run(load(url, asked, clients=64, seconds=120))
  with capsys.disabled():
    middle, late = (first[int(share * (len(first) - 1))] for share in (0.5, 0.99))
    print(f"\n{len(right)} answers, first token after {middle:.2f} s (median), {late:.2f} s (p99);", end=" ")
    print(f"{before / 2**20:.0f} MiB, then {after / 2**20:.0f}")
  assert wrong == [] and len(right) > 1000
  assert after < 1.02 * before  # a leak of 1 kB an answer would be seen
