"""Worker processes: what each does when it starts."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading


def start_worker(*_) -> None:
  """Leaves signals to the main process, ends when that is gone, and keeps away from accelerators.

  Ctrl-C and a scheduler's SIGTERM reach a whole group of processes: the main one finishes its step and then ends its
  workers. One that was killed cannot, and its workers would wait for it for good.
  """
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
  os.environ["JAX_PLATFORMS"] = "cpu"
  if "jax" in sys.modules:  # grain imports it
    sys.modules["jax"].config.update("jax_platforms", "cpu")
  threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
  multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
  os._exit(1)
