"""OpenAI's own client, at this server."""

import asyncio
import threading

import openai
import pytest
from fake_engine import FakeEngine
from serving import ask, data_uri, expected, picture, question, running, wait_for


@pytest.fixture(scope="module")
def client(url):
  with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=20) as client:
    yield client


def test_models(client):
  assert [model.id for model in client.models.list()] == ["tiny"]
  assert client.models.retrieve("tiny").owned_by == "mllm_jax"
  with pytest.raises(openai.NotFoundError):
    client.models.retrieve("other/one")


def test_an_answer(client, processor):
  body = question(pictures=[data_uri(picture())], max_tokens=50)
  completion = client.chat.completions.create(**body)
  assert completion.choices[0].message.content == expected(processor, body)
  assert completion.choices[0].finish_reason == "stop"
  assert completion.usage.total_tokens == completion.usage.prompt_tokens + completion.usage.completion_tokens


def test_a_stream(client, processor):
  body = question(stream=True, stream_options={"include_usage": True}, max_completion_tokens=2)
  *chunks, last = client.chat.completions.create(**body)
  said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
  assert said == " ".join(expected(processor, body).split()[:2])
  assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].choices[0].finish_reason == "length"
  assert last.usage.completion_tokens == 2


def test_many_at_once(url, processor):
  bodies = [question(f"what is {i}", stream=bool(i % 2)) for i in range(12)]

  async def answer(client, body):
    found = await client.chat.completions.create(**body)
    if not body["stream"]:
      return found.choices[0].message.content
    return "".join([chunk.choices[0].delta.content or "" async for chunk in found])

  async def answers():
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
      return await asyncio.gather(*(answer(client, body) for body in bodies))

  assert asyncio.run(answers()) == [expected(processor, body) for body in bodies]


def test_errors_have_the_clients_classes(client, processor):
  create = client.chat.completions.create
  with pytest.raises(openai.BadRequestError) as caught:
    create(**question(temperature=5))
  assert caught.value.param == "temperature" and caught.value.type == "invalid_request_error"
  with pytest.raises(openai.NotFoundError) as caught:
    create(**question(model="gpt-4o"))
  assert caught.value.code == "model_not_found"
  with pytest.raises(openai.APIStatusError) as caught:
    create(**question("x" * (3 * 2**20)))
  assert caught.value.status_code == 413
  with running(processor, FakeEngine(rows=1, pause=0.02, words=20), max_queue=0, api_key="k") as url:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
      client.with_options(api_key="wrong").models.list()
    thread = threading.Thread(target=ask, args=(url, question()), kwargs={"headers": {"Authorization": "Bearer k"}})
    thread.start()
    wait_for(lambda: url.front.open)
    with pytest.raises(openai.RateLimitError) as caught:
      client.chat.completions.create(**question())
    assert caught.value.response.headers["retry-after"] == "1"
    # With its own retries, the client waits as it is told and then gets its answer.
    assert client.with_options(max_retries=2).chat.completions.create(**question()).choices
    thread.join()


def test_an_error_in_the_middle_of_a_stream(processor):
  with running(processor, FakeEngine(broken=4, words=20)) as url:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    said = []
    with pytest.raises(openai.APIError, match="the engine broke"):
      for chunk in client.chat.completions.create(**question(stream=True)):
        said.append(chunk.choices[0].delta.content)
    assert len([text for text in said if text]) == 3
