"""A server in this process, and what is sent to it."""

import base64
import contextlib
import io
import json
import shutil
import socket
import threading
import time
from pathlib import Path

import httpx2
import numpy as np
from fake_engine import FakeEngine
from PIL import Image

from mllm_jax import serve
from mllm_jax.config import VisionConfig
from mllm_jax.data import chat
from mllm_jax.data.aspects import Slices
from mllm_jax.data.processor import Processor
from mllm_jax.server import lifetime
from mllm_jax.server.front import Front
from mllm_jax.server.limits import Limits
from mllm_jax.server.pictures import Source

GOLDENS = Path(__file__).parents[1] / "goldens" / "sp"
VISION = VisionConfig(image_size=56, width=16, layers=2, heads=2, mlp_width=32)


def make_processor(folder: Path) -> Processor:
  """Of a model of LLaVA-UHD's kind with four tokens for a crop. Its tokenizer is written into `folder`."""
  shutil.copyfile(GOLDENS / "tiny_spm.model", folder / "tokenizer.model")
  names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
  settings = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True}
  (folder / "tokenizer_config.json").write_text(json.dumps(settings | names))
  (folder / "config.json").write_text('{"model_type": "llama"}')
  aspect = Slices(VISION, 4, 6, "slices", (5, 6))
  return Processor(chat.load_tokenizer(str(folder)), aspect, "vicuna_v1", 2048, 1)


@contextlib.contextmanager
def running(processor, engine=None, *, grace=5.0, source=None, api_key="", **limits):
  """The URL of a server; `url.front` is its inside."""
  engine = engine or FakeEngine()
  made = Limits(engine.rows, engine.max_length, **limits)
  front = Front(engine, processor, "tiny", made, source or Source(made.max_body), api_key)
  bound = serve.listener("127.0.0.1", 0)
  thread = threading.Thread(target=lifetime.run, args=(front, bound, grace))
  thread.start()
  try:
    wait_for(lambda: listening(bound))
    yield Url(serve.address(bound), front)
  finally:
    with contextlib.suppress(RuntimeError):  # it has ended by itself
      front.worker._loop.call_soon_threadsafe(front.end)
    thread.join(30)
    assert not thread.is_alive()


def listening(bound) -> bool:
  return bool(bound.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


class Url(str):
  def __new__(cls, text, front):
    made = super().__new__(cls, text)
    made.front, made.engine = front, front._engine
    return made


def wait_for(condition, seconds=20):
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end, "it never came about"
    time.sleep(0.005)


def picture(seed=0, size=(80, 60), kind="PNG") -> bytes:
  pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
  buffer = io.BytesIO()
  Image.fromarray(pixels).save(buffer, kind)
  return buffer.getvalue()


def data_uri(content: bytes, kind="png") -> str:
  return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def question(text="what is it", pictures=(), **fields) -> dict:
  """A body with pictures as addresses."""
  parts = [{"type": "image_url", "image_url": {"url": url}} for url in pictures]
  content = [*parts, {"type": "text", "text": text}] if parts else text
  return {"model": "tiny", "messages": [{"role": "user", "content": content}], "temperature": 0} | fields


def ask(url, body, **options):
  return httpx2.post(f"{url}/v1/chat/completions", json=body, timeout=30, **options)


def content(response) -> str:
  assert response.status_code == 200, response.text
  return response.json()["choices"][0]["message"]["content"]


def expected(processor, body, seed=0, count=None) -> str:
  """What the fake engine answers to a body, from the prompt that the processor makes by itself."""
  from fake_engine import words

  from mllm_jax.inference.requests import Request
  from mllm_jax.server import chat_request

  asked = chat_request.parse(body, "tiny")
  images = [Image.open(io.BytesIO(base64.b64decode(each.url.partition(",")[2]))) for each in asked.pictures]
  crops = max(1, sum(processor.aspect.crops_of(*image.size) for image in images))
  row = processor.with_room(len(images)).prompt(asked.turns, images, system=asked.system)
  row = row._replace(patches=row.patches[:crops], grids=row.grids[:crops])
  return " ".join(words(Request(row, sampling=asked.sampling, seed=seed), count))
