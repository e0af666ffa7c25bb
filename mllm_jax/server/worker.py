"""Worker: the one thread that owns the engine, and what hands its events over to the event loop."""

import asyncio
import collections
import contextlib
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Protocol

from mllm_jax.inference.requests import Event, Request
from mllm_jax.server.errors import ApiError

log = logging.getLogger(__name__)


class Engine(Protocol):
  """What the worker needs of `inference.engine.Engine`."""

  max_length: int
  waiting: int
  running: int

  def submit(self, request: Request) -> int: ...

  def step(self) -> list[Event]: ...

  def cancel(self, ticket: int) -> None: ...

  def warm_up(self) -> list[Callable[[], None]]: ...


class Asked:
  """Requests that are answered together. Their events come through a queue of the event loop's."""

  def __init__(self, requests: Sequence[Request]):
    self.requests = requests
    self.tickets: list[int] = []  # the worker's own
    self.queue: asyncio.Queue[tuple[int, Event] | ApiError] = asyncio.Queue()

  async def events(self, deadline: float) -> AsyncIterator[tuple[int, Event]]:
    """(number of the request, event) until all are answered. Raises ApiError where they cannot be, or not by
    `deadline` on the event loop's clock."""
    unfinished = len(self.requests)
    while unfinished:
      try:
        async with asyncio.timeout_at(deadline):
          item = await self.queue.get()
      except TimeoutError:
        raise late() from None
      if isinstance(item, ApiError):
        raise item
      unfinished -= item[1].answer is not None
      yield item


class Worker(threading.Thread):
  """Warms the engine up, then steps it while it has anything to do, and goes on warming it up while it has not. Made in
  the event loop's thread.

  ready: whether it is warm. failed: whether the engine broke; it answers nothing more then. on_failure is called in
  the event loop. waiting, running: of the engine after its last step.
  """

  def __init__(self, engine: Engine, on_failure: Callable[[], None]):
    super().__init__(name="engine", daemon=True)
    self.ready = self.failed = False
    self.waiting = self.running = 0
    self._engine = engine
    self._on_failure = on_failure
    self._loop = asyncio.get_running_loop()
    self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
    self._asked: dict[int, tuple[Asked, int]] = {}  # ticket -> whose it is, and the number among its requests
    self._open: set[Asked] = set()  # the event loop's own
    self._later: collections.deque[Callable[[], None]] = collections.deque()  # what is left of the warming up

  # ---- in the event loop's thread ----

  @contextlib.contextmanager
  def ask(self, requests: Sequence[Request]) -> Iterator[Asked]:
    """Submits requests; those not answered when the context is left are cancelled."""
    asked = Asked(requests)
    if self.failed:
      asked.queue.put_nowait(_broken())
    self._open.add(asked)
    self._commands.put(lambda: self._submit(asked))
    try:
      yield asked
    finally:
      self._open.discard(asked)
      self._commands.put(lambda: self._cancel(asked))

  def refuse_all(self, error: ApiError) -> None:
    """Gives everyone who waits an error in place of an answer."""
    for asked in self._open:
      asked.queue.put_nowait(error)

  def stop(self, seconds: float) -> None:
    """Ends the thread, but waits no longer than this: it may be in the middle of a compilation."""
    self._commands.put(None)
    self.join(seconds)

  def _deliver(self, items: Sequence[tuple[Asked, int, Event]]) -> None:
    for asked, number, event in items:
      asked.queue.put_nowait((number, event))

  def _broke(self) -> None:
    self.failed = True
    self.refuse_all(_broken())
    self._on_failure()

  # ---- in this one ----

  def run(self) -> None:
    try:
      self._later.extend(self._engine.warm_up())
      self.ready = True
      while self._obey():
        events = self._engine.step()
        items = [(*self._asked[event.ticket], event) for event in events if event.ticket in self._asked]
        for event in events:
          if event.answer is not None:
            self._asked.pop(event.ticket, None)
        self._notice()
        if items:
          self._tell(self._deliver, items)
    except Exception:
      log.exception("the engine broke")
      self._tell(self._broke)

  def _obey(self) -> bool:
    """Carries commands out, and waits for one where there is nothing else to do; False when told to end."""
    while True:
      idle = not (self._engine.running or self._engine.waiting)
      try:
        command = self._commands.get(block=idle and not self._later)
      except queue.Empty:
        if not idle:
          return True
        self._later.popleft()()
        continue
      if command is None:
        return False
      command()
      self._notice()

  def _submit(self, asked: Asked) -> None:
    try:
      for number, request in enumerate(asked.requests):
        ticket = self._engine.submit(request)
        asked.tickets.append(ticket)
        self._asked[ticket] = asked, number
    except ValueError as error:
      self._cancel(asked)
      refusal = ApiError(400, str(error), param="messages", code="context_length_exceeded")
      self._tell(asked.queue.put_nowait, refusal)

  def _cancel(self, asked: Asked) -> None:
    for ticket in asked.tickets:
      if self._asked.pop(ticket, None):
        self._engine.cancel(ticket)

  def _notice(self) -> None:
    self.waiting, self.running = self._engine.waiting, self._engine.running

  def _tell(self, function: Callable, *args) -> None:
    with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody listens
      self._loop.call_soon_threadsafe(function, *args)


def late() -> ApiError:
  """What is said when the time of a request is over."""
  return ApiError(504, "the answer took longer than the server's --timeout; ask for fewer tokens", code="timeout")


def _broken() -> ApiError:
  return ApiError(500, "the engine broke; its server is being stopped and its log says why", code="engine_failed")
