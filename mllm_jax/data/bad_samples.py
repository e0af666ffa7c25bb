"""Bad samples: what a run does with one that cannot be used, and how many it puts up with.

A worker makes a row with `make`, which turns an error into what the policy says and is a pure function of seed and
index, so that every process and every resumed run gets the same. Whoever puts the rows into batches tells
`BadSamples` of each in their order; it counts, writes down and stops.
"""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from mllm_jax.config import ConfigError
from mllm_jax.data.records import DataError, Records, Sample

POLICIES = ("error", "skip", "replace")
ATTEMPTS = 100  # substitutes tried; were half of all samples bad, all of them would fail once in 10^30
MINIMUM = 1000  # samples seen before their share means something
FILE = "bad_samples.jsonl"

T = TypeVar("T")


class Made(NamedTuple, Generic[T]):
  """What became of one sample.

  name: the id of the sample that `value` was made of, or that is skipped.
  value: None for a sample to skip.
  problem: the error of the sample that was asked for, "" if there was none.
  index, used: the sample that was asked for, and the one that was used (-1: none).
  """

  name: str
  value: T | None
  problem: str
  index: int
  used: int


def make(records: Records, index: int, function: Callable[[Sample], T], policy: str, seed: int) -> Made[T]:
  """function(records[index]), or what the policy has for a sample that raises DataError.

  "error" raises it. "skip" gives no value. "replace" gives function of another sample, chosen by seed and index alone,
  and of a further one where that is bad too.

  Raises:
    DataError: the policy is "error", or ATTEMPTS substitutes are bad as well.
  """
  if policy not in POLICIES:
    raise ConfigError(f"data.on_bad_sample={policy!r} is unknown; known: {', '.join(POLICIES)}")
  name = str(index)
  try:
    sample = records[index]
    name = sample.id
    return Made(name, function(sample), "", index, index)
  except DataError as error:
    if policy == "error":
      raise
    problem = str(error)
  if policy == "skip":
    return Made(name, None, problem, index, -1)
  for used in substitutes(seed, index, len(records)):
    try:
      sample = records[used]
      return Made(sample.id, function(sample), problem, index, used)
    except DataError:
      continue
  raise DataError(f"{problem}; and {ATTEMPTS} other samples tried in its place are bad too")


def substitutes(seed: int, index: int, count: int) -> list[int]:
  """The samples to try in the place of sample `index`, in order; never itself, if there is another."""
  drawn = np.random.default_rng([seed, index]).integers(0, count, ATTEMPTS).tolist()
  return [other for other in drawn if other != index]


class BadSamples:
  """Counts and writes down bad samples in the order of the batches, and stops the run when there are too many.

  A run that goes on takes up the count with `resume`.

  Args:
    max_share: of the samples seen so far that may be bad, once `minimum` have been seen.
    folder: where FILE is written, one JSON object a line: step, place in it, index, problem, and substitute
      (another index, or null). None writes nothing. Processes may share it.
  """

  def __init__(self, max_share: float, folder: str | os.PathLike | None = None, minimum: int = MINIMUM):
    self.max_share, self.minimum = max_share, minimum
    self.path = None if folder is None else Path(folder) / FILE
    self.seen = self.bad = 0
    self._written: set[tuple[int, int, int]] = set()  # (step, place, index) of what stands in the file

  def resume(self, step: int, seen: int, processes: int = 1) -> None:
    """Counts as if the run had come to `step` without a break.

    Args:
      step: the one that comes next.
      seen: samples that this process has seen before it.
      processes: that write the file. What they found before is shared evenly among them; nobody can tell whose it was.
    """
    self._written = set(_read(self.path))
    self.seen, self.bad = seen, round(sum(at < step for at, *_ in self._written) / processes)

  def note(self, made: Made, step: int, place: int) -> None:
    """Takes account of one sample, the place-th that this process has in a step.

    Raises DataError, naming the file, where the share is exceeded.
    """
    self.seen += 1
    if made.problem:
      self.bad += 1
      self._write(made, step, place)
    if self.seen >= self.minimum:
      check_share(self.bad, self.seen, self.max_share, self._where())

  def _where(self) -> str:
    return f"; {self.path} lists them" if self.path else ""

  def _write(self, made: Made, step: int, place: int) -> None:
    # A step that is done again, after a crash, finds what it wrote before.
    if self.path is None or (step, place, made.index) in self._written:
      return
    self._written.add((step, place, made.index))
    line = {
      "step": step,
      "place": place,
      "index": made.index,
      "problem": made.problem,
      "substitute": made.used if made.used >= 0 else None,
    }
    self.path.parent.mkdir(parents=True, exist_ok=True)
    # A single write of a file opened for appending is not mixed with another process's.
    handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
      os.write(handle, (json.dumps(line, ensure_ascii=False) + "\n").encode())
    finally:
      os.close(handle)


def _read(path: Path | None) -> Iterator[tuple[int, int, int]]:
  """(step, place, index) of every line. A line that a crash has cut, or that an older version wrote, does not count."""
  if path is None or not path.is_file():
    return
  with open(path, encoding="utf-8", errors="replace") as file:
    for line in file:
      try:
        content = json.loads(line)
        yield int(content["step"]), int(content["place"]), int(content["index"])
      except (ValueError, KeyError, TypeError):
        continue


def check_share(bad: int, seen: int, max_share: float, where: str = "") -> None:
  """Raises DataError where more than `max_share` of the samples seen are bad."""
  if bad > max_share * seen:
    raise DataError(
      f"{bad} of {seen} samples cannot be used ({bad / seen:.1%}), and data.max_bad_share is {max_share:.1%}{where}; "
      "run `python -m mllm_jax.data check`, repair the data or raise data.max_bad_share"
    )
