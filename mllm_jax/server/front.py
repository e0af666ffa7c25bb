"""Front: what the routes share. Lives in the event loop's thread."""

import asyncio
import concurrent.futures
import contextlib
import hmac
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from starlette.requests import HTTPConnection

from mllm_jax.data.processor import Processor
from mllm_jax.server.chat_request import Picture
from mllm_jax.server.errors import ApiError
from mllm_jax.server.limits import Limits
from mllm_jax.server.metrics import Metrics
from mllm_jax.server.pictures import Source
from mllm_jax.server.worker import Engine, Worker

DECODERS = 2  # threads that decode pictures and make prompts; each may hold one request's pixels
FETCHERS = 8  # threads that mostly wait for other machines
T = TypeVar("T")


class Front:
  """The engine behind its limits.

  Args:
    engine: whose thread `start` starts.
    processor: that makes its prompts.
    model: the name that it is served under.
    source: where pictures may come from.
    api_key: that clients must show; "" for none.
  """

  def __init__(
    self,
    engine: Engine,
    processor: Processor,
    model: str,
    limits: Limits,
    source: Source,
    api_key: str = "",
  ):
    self.processor = processor
    self.model = model
    self.limits = limits
    self.metrics = Metrics()
    self.api_key = api_key
    self.draining = False
    self.open = 0  # requests that have a place, their bodies still on the way or already in the engine
    self.worker: Worker | None = None
    self.end: Callable[[], None] = lambda: None  # ends the server; set by what runs it
    self._engine, self._source = engine, source
    self._nobody = asyncio.Event()
    self._nobody.set()
    self._decoders = concurrent.futures.ThreadPoolExecutor(DECODERS, "decode")
    self._fetchers = concurrent.futures.ThreadPoolExecutor(FETCHERS, "fetch")

  def start(self) -> None:
    """Starts the engine's thread. In the running event loop."""
    self.worker = Worker(self._engine, lambda: self.end())
    self.worker.start()

  def close(self) -> None:
    """Ends the threads that make prompts, without waiting for them."""
    for pool in (self._decoders, self._fetchers):
      pool.shutdown(wait=False, cancel_futures=True)

  @property
  def state(self) -> str:
    """ "ok", or why nothing should be sent here now."""
    if self.worker.failed:
      return "failed"
    return "draining" if self.draining else "ok" if self.worker.ready else "warming up"

  async def drain(self, seconds: float) -> None:
    """Takes nothing new, and returns when what there was is answered; what is not within `seconds` gets an error."""
    self.draining = True
    try:
      async with asyncio.timeout(seconds):
        await self._nobody.wait()
    except TimeoutError:
      self.cut_off()

  def cut_off(self) -> None:
    """Ends the wait of `drain`, and gives everyone who waits an error."""
    self.worker.refuse_all(_draining())
    self._nobody.set()

  def authorise(self, connection: HTTPConnection) -> None:
    """Raises ApiError for a client without the key."""
    scheme, _, key = connection.headers.get("authorization", "").partition(" ")
    # Compared as bytes: a header may hold any of them.
    right = hmac.compare_digest(key.strip().encode("utf-8", "replace"), self.api_key.encode())
    if self.api_key and not (right and scheme.lower() == "bearer"):
      raise ApiError(401, "this server wants its --api_key as Authorization: Bearer KEY", code="invalid_api_key")

  @contextlib.contextmanager
  def place(self) -> Iterator["Place"]:
    """A place among the requests that are answered or wait, given back when the context is left."""
    place = Place(self)
    try:
      yield place
    finally:
      place.give_back()

  def take(self, count: int) -> ApiError | None:
    """Takes places, or says why there are not so many."""
    if self.open + count > self.limits.rows + self.limits.max_queue:
      return ApiError(429, "too many requests wait already; ask again in a moment", code="queue_full", retry_after=1)
    self.open += count
    self._nobody.clear()
    return None

  def give_back(self, count: int) -> None:
    """Gives places back."""
    self.open -= count
    if not self.open:
      self._nobody.set()

  async def contents(self, pictures: Sequence[Picture]) -> list[bytes]:
    """The encoded pictures. Raises ApiError, also where they are more bytes than a body may have."""
    loop, found, total = asyncio.get_running_loop(), [], 0
    for picture in pictures:
      pool = self._fetchers if self._source.is_remote(picture) else self._decoders
      found.append(await loop.run_in_executor(pool, self._source.read, picture))
      total += len(found[-1])
      if total > self.limits.max_body:
        raise ApiError(413, f"the pictures have more than {self.limits.max_body} bytes", param=picture.param)
    return found

  async def in_thread(self, function: Callable[..., T], *args) -> T:
    """What a function gives that would hold the event loop up."""
    return await asyncio.get_running_loop().run_in_executor(self._decoders, function, *args)

  def gauges(self) -> dict[str, tuple[str, float]]:
    """What the metrics say of this moment."""
    worker = self.worker
    return {
      "mllm_queue_depth": ("Requests that wait for a row of the engine.", worker.waiting),
      "mllm_running_rows": ("Rows of the engine that are being answered.", worker.running),
      "mllm_open_requests": ("Requests between their arrival and their last token.", self.open),
      "mllm_ready": ("1 when requests are answered, 0 while warming up or draining.", int(self.state == "ok")),
    }


class Place:
  """refusal: why there is no place; None where there is one."""

  def __init__(self, front: Front):
    self._front = front
    self.refusal = _draining() if front.draining else front.take(1)
    self._count = 0 if self.refusal else 1

  def grow_to(self, count: int) -> None:
    """Places for so many answers. Raises ApiError where there are not so many."""
    refusal = self._front.take(count - self._count)
    if refusal:
      raise refusal
    self._count = count

  def give_back(self) -> None:
    """All of them."""
    self._front.give_back(self._count)
    self._count = 0


def _draining() -> ApiError:
  return ApiError(503, "the server is being stopped; ask another", code="draining")
