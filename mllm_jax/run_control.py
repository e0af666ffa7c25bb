"""What every stage of a run needs besides its own work: being stopped in order, speaking, small files."""

import errno
import fcntl
import json
import os
import signal
from pathlib import Path
from typing import IO

from mllm_jax.config import ConfigError
from mllm_jax.data.records import DataError
from mllm_jax.places import PlaceError

PUT_RIGHT_FIRST = (ConfigError, DataError, PlaceError)
LOCK = ".lock"  # in the workdir
NOT_WRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)


class Stop:
  """Remembers the first SIGTERM or SIGINT, so that the step under way is still done and saved."""

  def __init__(self):
    self.signal = 0
    for number in (signal.SIGTERM, signal.SIGINT):
      signal.signal(number, self._remember)

  def _remember(self, number, frame):
    self.signal = number
    say(f"\n{signal.Signals(number).name}: finishing this step and saving; once more to stop at once")
    for each in (signal.SIGTERM, signal.SIGINT):
      signal.signal(each, signal.SIG_DFL)


class Stopped(Exception):
  """The run ends before it is done, in all its processes alike; `status` is the exit status."""

  def __init__(self, status: int, message: str):
    super().__init__(message)
    self.status = status


def status_of(error: Exception) -> int:
  """The exit status for an error that a user can do something about; 0 for any other, which is a mistake of ours."""
  if isinstance(error, Stopped):
    return error.status
  if isinstance(error, PUT_RIGHT_FIRST):
    return 2
  if isinstance(error, OSError):
    return 1 if error.errno in NOT_WRITABLE else 0
  if isinstance(error, RuntimeError):
    from mllm_jax.training.checkpoint import CheckpointError  # imports jax and orbax, which are there by now

    return 1 if isinstance(error, CheckpointError) else 0
  return 0


def message_of(error: Exception) -> str:
  """What to tell a user of such an error."""
  if not isinstance(error, OSError) or isinstance(error, PUT_RIGHT_FIRST):
    return str(error)
  return (
    f"{error.filename or ''}: {error.strerror}; what was saved before is still there. Make room, or use a --workdir "
    "that can be written, and start the same command again"
  )


def say(*text) -> None:
  """A line for people, from one process only."""
  import jax

  if jax.process_index() == 0:
    print(*text, flush=True)


def lock(workdir: Path) -> IO:
  """Keeps other runs out of a workdir, where two would write the same checkpoints, for as long as what is returned is
  kept. Raises ConfigError where another run is under way there."""
  file = open(workdir / LOCK, "w")
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError as error:
    file.close()
    raise ConfigError(f"{workdir}: another run is under way there; stop it, or use another --workdir") from error
  except OSError:  # mounted buckets know no locks
    pass
  return file


def write_json(path: Path, content) -> None:
  """Writes beside, then renames: a reader never finds half a file."""
  partial = path.with_name(path.name + ".partial")
  partial.write_text(json.dumps(content, indent=1), encoding="utf-8")
  os.replace(partial, path)
