"""One client's connection: its body within limits, whether it is still there, and clients that dawdle."""

import asyncio
import json
from collections.abc import Awaitable, Mapping
from typing import TypeVar

import h11
from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive
from uvicorn.protocols.http.h11_impl import H11Protocol

from mllm_jax.server.errors import ApiError

HEADER_SECONDS = 15.0
BODY_SECONDS = 60.0
DISCARDED = 8  # times the limit: read on for so long, since clients listen for an answer only when they have sent all
T = TypeVar("T")


async def read_body(request: Request, limit: int, refusal: ApiError | None = None) -> bytes:
  """The body of a request whose type is JSON.

  Web pages of other origins can send text/plain anywhere, but JSON only where they are let; so nothing else is read.

  Args:
    limit: bytes.
    refusal: what is raised once the client has sent what it wanted to, and nothing of it is kept.

  Raises ApiError: 408, 413, 415. Raises ClientDisconnect.
  """
  announced = request.headers.get("content-length", "0")
  length = int(announced) if announced.isascii() and announced.isdigit() else 0
  if length > limit:
    refusal = refusal or _too_large(limit)
  if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
    refusal = refusal or ApiError(415, "send the body as Content-Type: application/json")
  chunks, received = [], 0
  try:
    async with asyncio.timeout(BODY_SECONDS):
      if length <= DISCARDED * limit:
        async for chunk in request.stream():
          received += len(chunk)
          if received > DISCARDED * limit:
            break
          if received > limit:
            refusal = refusal or _too_large(limit)
          if refusal:
            chunks.clear()
          else:
            chunks.append(chunk)
  except TimeoutError:
    raise ApiError(408, f"the body did not come within {BODY_SECONDS:.0f} s") from None
  if refusal:
    raise refusal
  return b"".join(chunks)


async def until_gone(receive: Receive, work: Awaitable[T]) -> T:
  """What `work` gives. It is cancelled when the client goes away, which raises ClientDisconnect."""
  working = asyncio.ensure_future(work)
  gone = asyncio.ensure_future(_gone(receive))
  try:
    await asyncio.wait([working, gone], return_when=asyncio.FIRST_COMPLETED)
    if not working.done():
      raise ClientDisconnect
    return await working
  finally:
    for task in (working, gone):
      task.cancel()
    await asyncio.gather(working, gone, return_exceptions=True)


def server_sent(value: Mapping | str) -> bytes:
  """One server-sent event."""
  text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, separators=(",", ":"))
  return f"data: {text}\n\n".encode()


async def _gone(receive: Receive) -> None:
  while (await receive())["type"] != "http.disconnect":
    pass


def _too_large(limit: int) -> ApiError:
  return ApiError(413, f"the body has more than {limit} bytes; send smaller pictures", code="request_too_large")


class PatientUpToAPoint(H11Protocol):
  """uvicorn's protocol, which by itself waits for the end of a request's head for ever."""

  _head_timer: asyncio.TimerHandle | None = None

  def connection_made(self, transport) -> None:
    super().connection_made(transport)
    self._watch()

  def data_received(self, data: bytes) -> None:
    super().data_received(data)
    self._watch()

  def connection_lost(self, exc: Exception | None) -> None:
    super().connection_lost(exc)
    self._unwatch()

  def _watch(self) -> None:
    if self.conn.their_state is not h11.IDLE or self.transport.is_closing():
      self._unwatch()
    elif self._head_timer is None:
      self._head_timer = self.loop.call_later(HEADER_SECONDS, self.transport.close)

  def _unwatch(self) -> None:
    if self._head_timer is not None:
      self._head_timer.cancel()
      self._head_timer = None
