"""What every stage of a run needs besides its own work: being stopped in order, speaking, small files."""

import json
import os
import signal
from pathlib import Path


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
  """The run ends before it is done; `status` is the exit status."""

  def __init__(self, status: int, message: str):
    super().__init__(message)
    self.status = status


def say(*text) -> None:
  """A line for people, from one process only."""
  import jax

  if jax.process_index() == 0:
    print(*text, flush=True)


def write_json(path: Path, content) -> None:
  """Writes beside, then renames: a reader never finds half a file."""
  partial = path.with_name(path.name + ".partial")
  partial.write_text(json.dumps(content, indent=1), encoding="utf-8")
  os.replace(partial, path)
