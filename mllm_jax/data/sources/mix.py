"""Several sources as one, each with a share of its samples."""

import re
from collections.abc import Sequence

import numpy as np

from mllm_jax.config import ConfigError, DataConfig
from mllm_jax.data.records import DataError, Records, Sample
from mllm_jax.data.sources import open_source

COUNT = re.compile(r"(first|random):([0-9][0-9_]*)")
SHARES = "a share is a factor such as 0.5 or 2.0, first:COUNT or random:COUNT"


class MixedRecords(Records):
  """The chosen samples of several sources, one source behind the other. Can be pickled, and used by several threads.

  Args:
    sources: where they come from.
    chosen: for each, int64 [N], its samples in their order; the same one may stand there several times.
  """

  def __init__(self, sources: Sequence[Records], chosen: Sequence[np.ndarray]):
    self.source = " + ".join(records.source for records in sources)
    self._sources, self._chosen = tuple(sources), tuple(chosen)
    self._first = np.concatenate([[0], np.cumsum([len(each) for each in chosen])]).astype(np.int64)

  @property
  def parts(self) -> list[tuple[Records, np.ndarray]]:
    """The sources, each with the samples chosen of it."""
    return list(zip(self._sources, self._chosen, strict=True))

  def outlines(self) -> "MixedRecords":
    """The same mix of the sources' outlines."""
    return MixedRecords([records.outlines() for records in self._sources], self._chosen)

  def __len__(self) -> int:
    return int(self._first[-1])

  def __getitem__(self, i: int) -> Sample:
    """Sample i as its source gives it: `index` and `source` are those there. Raises IndexError past the end."""
    index = self._index(i)
    number = int(np.searchsorted(self._first, index, side="right")) - 1
    return self._sources[number][int(self._chosen[number][index - self._first[number]])]


def choose(count: int, share: str | float, seed: Sequence[int]) -> np.ndarray:
  """Which of `count` samples a share takes: int64, growing; a pure function of its arguments.

  A factor of 2.5 takes every sample twice and a random half of them once more; "random:N" and the fraction take none
  twice.

  Raises:
    ConfigError: a share that is not written so, or a count above the number of samples.
  """
  found = COUNT.fullmatch(share) if isinstance(share, str) else None
  if found:
    wanted = int(found[2])
    if not 0 < wanted <= count:
      raise ConfigError(f"the share {share!r} asks for {wanted} of {count} samples; ask for 1 to {count}, or a factor")
    return np.arange(wanted) if found[1] == "first" else _some(count, wanted, seed)
  try:
    factor = float(share)
  except ValueError:
    factor = -1.0
  if not 0 < factor < float("inf"):
    raise ConfigError(f"the share {share!r} is not understood; {SHARES}")
  whole, extra = int(factor), round((factor % 1) * count)
  return np.sort(np.concatenate([np.repeat(np.arange(count), whole), _some(count, extra, seed)]))


def _some(count: int, wanted: int, seed: Sequence[int]) -> np.ndarray:
  return np.sort(np.random.default_rng(list(seed)).permutation(count)[:wanted])


def open_data(data: DataConfig, seed: int) -> Records:
  """What a stage trains on: the source `data.path` as a whole, and those of `data.mix` with their shares.

  Raises:
    ConfigError: a row of the mix that is not (path, image folder, share), or a share that its source cannot give.
    DataError: a source that cannot be used, or none at all.
  """
  rows = [(data.path, data.image_folder, "1")] if data.path else []
  for row in data.mix:
    if not (isinstance(row, tuple | list) and len(row) == 3 and all(isinstance(part, str) for part in row[:2])):
      raise ConfigError(f"data.mix: {row!r} is not (path, image folder, share); {SHARES}")
    rows.append(tuple(row))
  if not rows:
    raise DataError("there is no data: set data.path, or data.mix")
  if not data.mix:
    return open_source(data.path, data.image_folder)
  sources, chosen = [], []
  for number, (path, image_folder, share) in enumerate(rows):
    records = open_source(path, image_folder)
    try:
      taken = choose(len(records), share, (seed, number))
    except ConfigError as error:
      raise ConfigError(f"data.mix, {path}: {error}") from error
    if not len(taken):
      raise ConfigError(f"data.mix, {path}: the share {share!r} of {len(records)} samples is none; raise it")
    sources.append(records)
    chosen.append(taken)
  return MixedRecords(sources, chosen)
