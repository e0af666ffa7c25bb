"""Rows: from the numbers of the samples that a row holds to the row, whatever becomes of bad samples among them.

Worker processes import this and not the pipeline: what they do needs neither grain nor an order of samples.
"""

import functools
from typing import NamedTuple

from mllm_jax.data.bad_samples import Made, make
from mllm_jax.data.processor import Processor, Row
from mllm_jax.data.records import DataError, Records, Sample


class Wanted(NamedTuple):
  """A row to be made.

  samples: records that it holds; none for a row of padding.
  length: places of the row.
  rooms: (places, crops) that each sample may take, nothing where it was found bad before; () where bad ones stop the
    run.
  """

  samples: tuple[int, ...]
  length: int
  rooms: tuple[tuple[int, int], ...] = ()


class RowMaker:
  """(what became of each sample, the row) of a Wanted; can be pickled and used by several threads.

  Args:
    shared: a row may hold several samples, and is of the length that is wanted; else it holds one and is of the
      processor's, and is None where that sample is skipped.
    policy: "error", "skip" or "replace", see `bad_samples`. In a shared row a skipped sample's places become padding,
      and so do those of one in whose place no other fits.
    seed: chooses the samples that replace bad ones, and the images that are enlarged.
  """

  def __init__(self, records: Records, processor: Processor, shared: bool, policy: str, seed: int):
    self._records, self._processor, self._shared = records, processor, shared
    self._policy, self._seed = policy, seed

  def __call__(self, wanted: Wanted) -> tuple[list[Made], Row | None]:
    if not self._shared:
      row = functools.partial(self._processor.row, seed=self._seed)
      made = make(self._records, wanted.samples[0], row, self._policy, self._seed)
      return [made._replace(value=None)], made.value
    try:
      samples = [self._records[i] for i in wanted.samples]
      row = self._processor.packed_row(samples, wanted.length, self._seed)
      return [Made(sample.id, None, "", i, i) for i, sample in zip(wanted.samples, samples)], row
    except ValueError:  # a DataError, or, where a picture came back that was not there before, a row too full
      if self._policy == "error":
        raise
    # Bad samples are rare: which of them it is, is asked only now.
    made = [self._make(i, *room) for i, room in zip(wanted.samples, wanted.rooms, strict=True)]
    samples = [each.value for each in made if each.value is not None]
    row = self._processor.packed_row(samples, wanted.length, self._seed)
    return [each._replace(value=None) for each in made], row

  def _make(self, index: int, places: int, crops: int) -> Made[Sample]:
    """A sample that a row can be made of and that takes no more than this, or none."""

    def usable(sample: Sample) -> Sample:
      row = self._processor.with_room(len(sample.images)).row(sample, self._seed)
      taken = int((row.segment_ids > 0).sum()), int(row.grids.any(axis=1).sum())
      if taken[1] > self._processor.max_images:
        raise DataError(
          f"{sample.name}: {taken[1]} crops, and a row has room for {self._processor.max_images}; raise data.max_images"
        )
      if taken[0] > places or taken[1] > crops:
        raise DataError(
          f"{sample.name}: takes {taken[0]} places and {taken[1]} crops where {places} and {crops} are free"
        )
      return sample

    try:
      return make(self._records, index, usable, self._policy, self._seed)
    except DataError as error:
      if self._policy != "replace":
        raise
      return make(self._records, index, usable, "skip", self._seed)._replace(problem=str(error))
