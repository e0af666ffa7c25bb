"""Completions: POST /v1/chat/completions, whole or streamed."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Mapping

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from mllm_jax.inference.requests import Answer, Event
from mllm_jax.server import prompts
from mllm_jax.server.chat_request import Chat, parse, parse_json
from mllm_jax.server.connection import read_body, server_sent, until_gone
from mllm_jax.server.errors import ApiError
from mllm_jax.server.front import Front
from mllm_jax.server.worker import Asked, late

GONE = 499  # counted where the client went away
PARTING_SECONDS = 5.0  # for the last words to a client that is too slow
STREAM_HEADERS = [
  (b"content-type", b"text/event-stream; charset=utf-8"),
  (b"cache-control", b"no-cache"),
  (b"x-accel-buffering", b"no"),  # nginx would hold the tokens back
]


class Completions:
  """The ASGI application behind /v1/chat/completions."""

  def __init__(self, front: Front):
    self._front = front

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    reply = _Reply(self._front, scope, receive, send)
    try:
      await reply.give()
    except ApiError as error:
      reply.status = error.status
      await error.response()(scope, receive, send)
    except ClientDisconnect:
      reply.status = GONE
    except Exception:
      reply.status = 500
      raise
    finally:
      self._front.metrics.statuses[reply.status] += 1


class _Reply:
  """One request on its way. status: of the answer."""

  def __init__(self, front: Front, scope: Scope, receive: Receive, send: Send):
    self.status = GONE
    self._front = front
    self._scope, self._receive, self._send = scope, receive, send
    self._begun = time.monotonic()
    self._deadline = asyncio.get_running_loop().time() + front.limits.timeout
    self._speechless = True  # until the first token
    self._identity = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": front.model}

  async def give(self) -> None:
    """Raises ApiError as long as nothing is sent, and ClientDisconnect."""
    request, front = Request(self._scope, self._receive), self._front
    front.authorise(request)
    with front.place() as self._place:
      answering = self._answer(await read_body(request, front.limits.max_body, self._place.refusal))
      await until_gone(self._receive, answering)

  async def _answer(self, body: bytes) -> None:
    front = self._front
    try:
      async with asyncio.timeout_at(self._deadline):
        chat = await front.in_thread(_parse, body, front.model)
        self._place.grow_to(len(chat.seeds))
        contents = await front.contents(chat.pictures)
        requests = await front.in_thread(prompts.requests, front.processor, chat, contents, front.limits)
        stream, include_usage = chat.stream, chat.include_usage
        del body, chat, contents  # many megabytes, while the answer may take minutes
    except TimeoutError:
      raise late() from None
    front.metrics.tokens["prompt"] += requests[0].prompt_tokens
    front.metrics.tokens["visual"] += requests[0].visual_tokens
    with front.worker.ask(requests) as asked:
      try:
        async with asyncio.timeout_at(self._deadline + PARTING_SECONDS):
          await (self._stream(asked, include_usage) if stream else self._whole(asked))
      except TimeoutError:
        raise ClientDisconnect from None  # it does not read what it is sent
    front.metrics.total.add(time.monotonic() - self._begun)

  async def _whole(self, asked: Asked) -> None:
    answers = {}
    async for number, event in asked.events(self._deadline):
      self._note(event)
      if event.answer is not None:
        answers[number] = event.answer
    self._place.give_back()  # before the client knows: its next request shall not find its own place still taken
    choices = [
      {
        "index": number,
        "message": {"role": "assistant", "content": answer.text, "refusal": None},
        "logprobs": None,
        "finish_reason": answer.finish_reason,
      }
      for number, answer in sorted(answers.items())
    ]
    body = {"object": "chat.completion", **self._identity, "choices": choices, "usage": _usage(asked, answers)}
    self.status = 200
    await JSONResponse(body)(self._scope, self._receive, self._send)

  async def _stream(self, asked: Asked, include_usage: bool) -> None:
    """The head waits for the first event: an error before it becomes a status, and a later one ends the stream."""
    try:
      async for chunk in self._chunks(asked, include_usage):
        if self.status != 200:
          self.status = 200
          await self._send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})
        await self._write(chunk)
    except ApiError as error:
      if self.status != 200:
        raise
      self.status = error.status
      await self._write(error.body)
    await self._send({"type": "http.response.body", "body": b"", "more_body": False})

  async def _chunks(self, asked: Asked, include_usage: bool) -> AsyncIterator[Mapping | str]:
    head = {"object": "chat.completion.chunk", **self._identity}
    more = {"usage": None} if include_usage else {}
    answers, begun = {}, set()
    async for number, event in asked.events(self._deadline):
      self._note(event)
      deltas = [] if number in begun else [({"role": "assistant", "content": ""}, None)]
      begun.add(number)
      if event.text:
        deltas.append(({"content": event.text}, None))
      if event.answer is not None:
        answers[number] = event.answer
        deltas.append(({}, event.answer.finish_reason))
      for delta, reason in deltas:
        yield head | {"choices": [{"index": number, "delta": delta, "logprobs": None, "finish_reason": reason}]} | more
    self._place.give_back()
    if include_usage:
      yield head | {"choices": [], "usage": _usage(asked, answers)}
    yield "[DONE]"

  async def _write(self, chunk: Mapping | str) -> None:
    await self._send({"type": "http.response.body", "body": server_sent(chunk), "more_body": True})

  def _note(self, event: Event) -> None:
    metrics = self._front.metrics
    if self._speechless:
      self._speechless = False
      metrics.first_token.add(time.monotonic() - self._begun)
    if event.answer is not None:
      metrics.tokens["completion"] += len(event.answer.ids)


def _parse(body: bytes, model: str) -> Chat:
  return parse(parse_json(body), model)


def _usage(asked: Asked, answers: Mapping[int, Answer]) -> Mapping[str, int]:
  prompt = asked.requests[0].prompt_tokens
  completion = sum(len(answer.ids) for answer in answers.values())
  return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
