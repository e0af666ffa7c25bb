"""Outlines: the samples of prepared shards without their images, of which only the sizes are known.

The check at the start of a run and the measuring of lengths look at every sample and at no pixel. `prepare` writes what
they need beside each shard, a file NAME.outlines.gz of JSON lines, so that a machine of a pod reads a few hundred
megabytes of texts and not every image of the bucket before its first step.
"""

import dataclasses
import functools
import gzip
import json
from collections.abc import Sequence

import numpy as np

from mllm_jax.data.records import ImageSize, Records, Sample, parse_sample
from mllm_jax.data.sources import SHARD, shard_cache
from mllm_jax.places import PlaceError  # a damaged file is no fault of the samples', which might be skipped

SUFFIX = ".outlines.gz"
OPEN = 4  # files whose lines a process keeps: parts are measured in the order of the shards


def name_for(shard: str) -> str:
  """The name of the file beside a shard."""
  return shard.removesuffix(SHARD) + SUFFIX


def encode(header: dict, sizes: Sequence[tuple[int, int]]) -> str:
  """One line: a record's header, and the (width, height) of each of its images."""
  return json.dumps({**header, "images": [list(size) for size in sizes]}, ensure_ascii=False) + "\n"


def write(path: str, lines: Sequence[str]) -> None:
  """Writes the file of a shard. The same lines give the same bytes."""
  with open(path, "wb") as raw, gzip.GzipFile("", "wb", compresslevel=6, fileobj=raw, mtime=0) as file:
    file.write("".join(lines).encode())


class Outlines(Records):
  """The samples of shards, their images as sizes. Can be pickled, and used by several threads.

  Args:
    source: how errors call the samples, as the shards' own records do.
    files: one beside each shard.
    states: (bytes, version) of each file where they are remote, else ().
    counts: samples of each.
  """

  def __init__(self, source: str, files: Sequence[str], states: Sequence[tuple[int, str]], counts: Sequence[int]):
    self.source, self._files, self._states = source, tuple(files), tuple(states)
    self._first = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

  def __len__(self) -> int:
    return int(self._first[-1])

  def __getitem__(self, i: int) -> Sample:
    """Sample i. Raises IndexError past the end, PlaceError if the file holds something else."""
    index = self._index(i)
    number = int(np.searchsorted(self._first, index, side="right")) - 1
    first, count = int(self._first[number]), int(self._first[number + 1] - self._first[number])
    path = self._files[number]
    lines = _lines(path, self._states[number] if self._states else None)
    if len(lines) != count:
      raise PlaceError(
        f"{path}: has {len(lines)} lines for {count} samples; copy it again, or prepare the shards again"
      )
    try:
      header = json.loads(lines[index - first])
      sizes = tuple(ImageSize(*map(int, size)) for size in header.pop("images"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
      raise PlaceError(f"{path}, line {index - first + 1}: is damaged ({error}); prepare the shards again") from error
    sample = parse_sample(header, index, self.source, "")
    return dataclasses.replace(sample, images=sizes)


@functools.lru_cache(OPEN)
def _lines(path: str, state: tuple[int, str] | None) -> list[bytes]:
  local = path if state is None else str(shard_cache.local_copy(path, *state))
  try:
    with gzip.open(local) as file:
      return file.read().splitlines()
  except (OSError, EOFError) as error:
    raise PlaceError(f"{path}: cannot be read ({error}); copy it again, or prepare the shards again") from error
