"""Order: which samples stand in which row of which step. Everything here is a pure function of the seed and the step.

Rows are numbered through the whole run, over all steps, micro-batches and processes: row r is in step r // batch_size.
An order has `steps`; `samples(row)`, the records that row holds; and `length(micro_batch)`, the places of the rows of a
micro-batch, these too numbered through the run. Every process has the whole order and so knows the same lengths.
"""

from typing import Protocol

import grain
import numpy as np

from mllm_jax.data.grouping import choose_buckets, longest_first, released_order
from mllm_jax.data.lengths import LengthTable
from mllm_jax.data.packing import pack


class Order(Protocol):
  """See the module's docstring."""

  steps: int

  def samples(self, row: int) -> tuple[int, ...]: ...

  def length(self, micro_batch: int) -> int: ...


class FixedOrder:
  """One sample in each row, shuffled anew in every epoch. Epochs follow one another without a gap, so that a batch may
  hold the end of one and the start of the next; only what fills no batch at the end of the run is dropped."""

  def __init__(self, count: int, max_length: int, batch_size: int, epochs: float, steps: int, seed: int):
    self.steps = steps or int(epochs * count) // batch_size
    self._max_length = max_length
    # Grain shuffles epoch e with its seed + e: not spread out, seed 1 would begin with the second epoch of seed 0.
    spread_seed = int(np.random.SeedSequence(seed).generate_state(1)[0]) // 2
    self._order = grain.MapDataset.range(count).shuffle(seed=spread_seed).repeat()

  def samples(self, row: int) -> tuple[int, ...]:
    return (int(self._order[row]),)

  def length(self, micro_batch: int) -> int:
    return self._max_length


class GroupedOrder:
  """One sample in each row, the steps those of the released sampler; rows of nothing fill up an epoch's last step.

  The steps do not depend on the number of devices, nor on that of micro-batches: the released sampler takes these only
  to deal out a step's samples, and here they are sorted by length instead.
  """

  def __init__(
    self,
    table: LengthTable,
    max_length: int,
    buckets: tuple[int, ...],
    batch_size: int,
    accumulation: int,
    epochs: float,
    steps: int,
    seed: int,
  ):
    epoch_steps = -(-len(table) // batch_size)
    self.steps = steps or int(epochs * epoch_steps)
    places = np.minimum(table.places, max_length)
    # At least one epoch, as the buckets should not depend on how many steps are taken.
    parts = [
      self._epoch(table.signed_words, places, batch_size, accumulation, seed, epoch)
      for epoch in range(max(1, -(-self.steps // epoch_steps)))
    ]
    needed = [self._needed(part, places, batch_size // accumulation) for part in parts]
    self.buckets = buckets or choose_buckets(needed[0], max_length, int(places.max()))
    self._samples = np.concatenate(parts).ravel()
    self._lengths = np.array(self.buckets)[np.searchsorted(self.buckets, np.concatenate(needed))]

  def samples(self, row: int) -> tuple[int, ...]:
    sample = int(self._samples[row])
    return (sample,) if sample >= 0 else ()

  def length(self, micro_batch: int) -> int:
    return int(self._lengths[micro_batch])

  @staticmethod
  def _epoch(
    words: np.ndarray, places: np.ndarray, batch_size: int, accumulation: int, seed: int, epoch: int
  ) -> np.ndarray:
    """int32 [steps, batch_size]: an epoch's samples; -1 is none."""
    permute = np.random.default_rng([seed, epoch]).permutation
    order = released_order(words, batch_size // accumulation, accumulation, permute)
    return longest_first(order, places, batch_size).astype(np.int32)

  @staticmethod
  def _needed(samples: np.ndarray, places: np.ndarray, rows: int) -> np.ndarray:
    """int [micro-batches]: the longest sample of each micro-batch of `rows` rows, which is its first."""
    first = samples[:, ::rows].ravel()
    return np.where(first < 0, 0, places[first])


class PackedOrder:
  """Rows of several samples. Rows of different epochs may share a step; what fills no batch at the end is dropped.

  padding: the share of the places that no sample fills.
  """

  def __init__(
    self,
    table: LengthTable,
    max_length: int,
    row_length: int,
    max_images: int,
    batch_size: int,
    epochs: float,
    steps: int,
    seed: int,
  ):
    self._row_length = row_length
    places = np.minimum(table.places, max_length)
    rows: list[tuple[int, ...]] = []
    epoch = 0
    while len(rows) < steps * batch_size if steps else epoch < epochs:
      order = np.random.default_rng([seed, epoch]).permutation(len(table))
      packed = pack(places, table.crops, order, row_length, max_images)
      rows += packed if steps else packed[: int(min(1.0, epochs - epoch) * len(packed))]
      epoch += 1
    self.steps = steps or len(rows) // batch_size
    # Two arrays and not a list of tuples: this goes to every worker process.
    self._start = np.cumsum([0, *map(len, rows)])
    self._samples = np.array([sample for row in rows for sample in row], np.int32)
    self.padding = 1 - int(places[self._samples].sum()) / (row_length * max(1, len(rows)))

  def samples(self, row: int) -> tuple[int, ...]:
    return tuple(self._samples[self._start[row] : self._start[row + 1]].tolist())

  def length(self, micro_batch: int) -> int:
    return self._row_length
