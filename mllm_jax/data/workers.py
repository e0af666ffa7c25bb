"""Workers: threads or processes that share work whose results come in the order of the tasks.

What goes to a process and back is pickled; large arrays of a result lie in memory that both share, so that they are
copied once into it and once out of it, and no pipe carries them.
"""

import collections
import concurrent.futures
import ctypes
import itertools
import multiprocessing
import multiprocessing.connection
import os
import pickle
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

SHARED_BYTES = 2**16  # arrays of fewer are pickled: a row has several small ones
SHARED_MEMORY = 2**28  # bytes that all processes together may hold results in
ALIGNMENT = 64
END_SECONDS = 5.0  # that a process has for ending by itself
SIGNALS = (signal.SIGINT, signal.SIGTERM)

Task, Result = TypeVar("Task"), TypeVar("Result")


def in_threads(function: Callable[[Task], Result], tasks: Iterable[Task], threads: int, ahead: int) -> Iterator[Result]:
  """function(task) of every task in their order, `ahead` of them begun before they are asked for.

  Without threads each is made when it is asked for. What the function raises is raised where its result would be.
  """
  if threads < 1:
    yield from map(function, tasks)
    return
  tasks = iter(tasks)
  pool = concurrent.futures.ThreadPoolExecutor(threads)
  try:
    pending = collections.deque(pool.submit(function, task) for task in itertools.islice(tasks, max(1, ahead)))
    while pending:
      result = pending.popleft().result()
      pending.extend(pool.submit(function, task) for task in itertools.islice(tasks, 1))
      yield result
  finally:
    pool.shutdown(cancel_futures=True)


def in_processes(
  function: Callable[[Task], Result],
  tasks: Iterable[Task],
  workers: int,
  threads: int = 1,
  ahead: int = 2,
  result_bytes: int = 0,
) -> Iterator[Result]:
  """What `in_threads` gives, made by `workers` processes with `threads` threads each.

  A result's arrays are good until the next one is asked for: the memory that they lie in is used again.

  Args:
    function: can be pickled.
    tasks: small things that can be pickled; task n goes to process n % workers.
    ahead: tasks that a process is given before their results are asked for.
    result_bytes: of a result's arrays of SHARED_BYTES and more; what is beyond is pickled.

  Raises:
    RuntimeError: a process ended before its work was done. Besides, what the function raises.
  """
  result_bytes = -(-result_bytes // ALIGNMENT) * ALIGNMENT
  if result_bytes:
    ahead = min(ahead, SHARED_MEMORY // (workers * result_bytes))
  ahead = max(2, ahead)
  team: list[_Process] = []
  try:
    team = [_Process(function, threads, ahead, result_bytes) for _ in range(workers)]
    tasks, given = iter(tasks), itertools.cycle(team)
    for process, task in zip(itertools.islice(given, workers * ahead), tasks):
      process.give(task)
    # Processes take turns, for tasks and for results: who has given a result gets the next task.
    for process in itertools.cycle(team):
      if not process.waiting:
        return
      yield process.take()
      for task in itertools.islice(tasks, 1):
        process.give(task)
  finally:
    for process in team:
      process.close()
    for process in team:
      process.end()


class _Process:
  """A worker process as the main process sees it. waiting: tasks whose results have not been taken."""

  def __init__(self, function: Callable, threads: int, slots: int, slot_bytes: int):
    # Forking a process that has threads, as jax has, can leave the child waiting for a lock for good.
    context = multiprocessing.get_context("spawn")
    self._connection, theirs = context.Pipe()
    # Nameless memory: nothing is left behind, however the processes end.
    shared = context.RawArray(ctypes.c_ubyte, slots * slot_bytes) if slot_bytes else None
    self._slots = _slots(shared, slots, slot_bytes)
    self._given = self._taken = 0
    self._process = context.Process(
      target=_serve, args=(theirs, pickle.dumps(function), threads, shared, slots, slot_bytes), daemon=True
    )
    # The child begins with these signals held back, until it ignores them: one that came before would end it.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
      self._process.start()
    finally:
      signal.pthread_sigmask(signal.SIG_SETMASK, before)
    theirs.close()  # so that a process that has gone is seen as the end of the connection

  @property
  def waiting(self) -> int:
    return self._given - self._taken

  def give(self, task: Any) -> None:
    try:
      self._connection.send((self._given % len(self._slots), task))
    except OSError:
      raise self._gone() from None
    self._given += 1

  def take(self) -> Any:
    slot = self._slots[self._taken % len(self._slots)]
    try:
      error, places, data = self._connection.recv()
    except (EOFError, OSError):
      raise self._gone() from None
    self._taken += 1
    if error is not None:
      raise error
    return pickle.loads(data, buffers=[slot[start:stop] for start, stop in places])

  def _gone(self) -> RuntimeError:
    self._process.join(END_SECONDS)
    code = self._process.exitcode
    return RuntimeError(
      f"a worker process of the data ended with exit code {code}"
      + ("; out of memory? fewer loader_workers or loader_threads take less" if code == -signal.SIGKILL else "")
    )

  def close(self) -> None:
    """Tells the process to end, which it does when its task is done."""
    self._connection.close()

  def end(self) -> None:
    self._process.join(END_SECONDS)
    if self._process.is_alive():
      self._process.kill()
      self._process.join()


def _slots(shared: Any, count: int, size: int) -> list[memoryview]:
  view = memoryview(shared if shared is not None else b"").cast("B")
  return [view[i * size : (i + 1) * size] for i in range(count)]


def _serve(connection, pickled: bytes, threads: int, shared: Any, slots: int, slot_bytes: int) -> None:
  """A worker process: takes tasks and sends what became of them until the other side is gone."""
  start_worker()
  attempt = _Attempt(pickle.loads(pickled), _slots(shared, slots, slot_bytes))
  results = queue.SimpleQueue()  # no longer than there are tasks given ahead
  with concurrent.futures.ThreadPoolExecutor(max(1, threads)) as pool:
    threading.Thread(target=_receive, args=(connection, pool, attempt, results), daemon=True).start()
    for result in iter(results.get, None):
      try:
        connection.send(result.result())
      except OSError:
        return


def _receive(connection, pool: concurrent.futures.Executor, attempt: "_Attempt", results: queue.SimpleQueue) -> None:
  while True:
    try:
      results.put(pool.submit(attempt, connection.recv()))
    except (EOFError, OSError, RuntimeError):  # RuntimeError: the pool is closed already
      results.put(None)
      return


class _Attempt:
  """function(task) as (error or None, where its large arrays lie in the task's slot, the rest pickled)."""

  def __init__(self, function: Callable, slots: list[memoryview]):
    self._function, self._slots = function, slots

  def __call__(self, numbered: tuple[int, Any]) -> tuple[Exception | None, list[tuple[int, int]], bytes]:
    number, task = numbered
    slot, places = self._slots[number], []

    def keep(buffer: pickle.PickleBuffer) -> bool:
      """Whether an array is to be pickled with the rest; else it is put into the slot."""
      content = buffer.raw()
      start = -(-(places[-1][1] if places else 0) // ALIGNMENT) * ALIGNMENT
      stop = start + content.nbytes
      if content.nbytes < SHARED_BYTES or stop > slot.nbytes:
        return True
      slot[start:stop] = content
      places.append((start, stop))
      return False

    try:
      data = pickle.dumps(self._function(task), 5, buffer_callback=keep)
    except Exception as error:
      return _sendable(error), [], b""
    return None, places, data


def _sendable(error: Exception) -> Exception:
  """The error, which knows its traceback as text: what it points to stays in this process."""
  error.add_note(f"in a worker process:\n{traceback.format_exc()}")
  try:
    pickle.loads(pickle.dumps(error))
  except Exception:
    return RuntimeError(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
  return error


def start_worker(*_) -> None:
  """Leaves signals to the main process, ends when that is gone, and keeps away from accelerators.

  Ctrl-C and a scheduler's SIGTERM reach a whole group of processes: the main one finishes its step and then ends its
  workers. One that was killed cannot, and its workers would wait for it for good.
  """
  for number in SIGNALS:
    signal.signal(number, signal.SIG_IGN)
  signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
  os.environ["JAX_PLATFORMS"] = "cpu"
  if "jax" in sys.modules:
    sys.modules["jax"].config.update("jax_platforms", "cpu")
  threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
  multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
  os._exit(1)
