"""Lifetime: from the first connection to the last, and an end at which nothing is lost that can be finished in time."""

import asyncio
import socket
import time

import uvicorn

from mllm_jax.server import app
from mllm_jax.server.connection import PatientUpToAPoint
from mllm_jax.server.front import Front
from mllm_jax.terminal import note

CLOSING_SECONDS = 5  # for the last bytes of answers, and for the engine's last step
KEEP_ALIVE_SECONDS = 75  # longer than clients keep an idle connection, so that they close it and never write into one
HEAD_BYTES = 2**15


def run(front: Front, bound: socket.socket, grace: float) -> None:
  """Serves at a bound socket until told to end, by a signal or by `front.end`; then for `grace` seconds at most.

  `front.worker` tells whether the engine broke, and is still alive if it could not be ended in the middle of a step.
  """
  config = uvicorn.Config(
    app.make(front),
    http=PatientUpToAPoint,
    ws="none",
    loop="asyncio",
    lifespan="on",
    log_level="error",
    access_log=False,
    server_header=False,
    h11_max_incomplete_event_size=HEAD_BYTES,
    timeout_keep_alive=KEEP_ALIVE_SECONDS,
    timeout_graceful_shutdown=CLOSING_SECONDS,
  )
  _Server(config, front, grace).run(sockets=[bound])
  front.worker.stop(CLOSING_SECONDS)
  note("ended")


class _Server(uvicorn.Server):
  """Drains when told to end; uvicorn's own way is to refuse new connections, those that ask for its health too."""

  def __init__(self, config: uvicorn.Config, front: Front, grace: float):
    super().__init__(config)
    self._front, self._grace = front, grace
    self._tasks: list[asyncio.Task] = []
    self._draining = False
    front.end = self._end

  async def serve(self, sockets: list[socket.socket] | None = None) -> None:
    self._loop = asyncio.get_running_loop()
    self._tasks.append(self._loop.create_task(self._announce()))
    await super().serve(sockets)
    for task in self._tasks:
      task.cancel()

  def handle_exit(self, sig: int, frame) -> None:
    self._loop.call_soon_threadsafe(self._end)

  def _end(self) -> None:
    if self._draining:
      self._front.cut_off()
    else:
      self._draining = True
      self._tasks.append(self._loop.create_task(self._drain()))

  async def _drain(self) -> None:
    note(f"ending; {self._front.open} requests are open")
    await self._front.drain(self._grace)
    self.should_exit = True

  async def _announce(self) -> None:
    begun = time.perf_counter()
    while self._front.worker is None or self._front.state == "warming up":
      await asyncio.sleep(0.1)
    if self._front.state == "ok":
      note(f"ready after {time.perf_counter() - begun:.1f} s")
