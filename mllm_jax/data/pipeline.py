"""Pipeline: from an order of samples to batches, made by threads or by worker processes.

Which samples make up step n is a pure function of the seed and n (see `order`). It depends neither on the number of
threads and workers nor on the number of processes, so a run that is resumed, or resumed on other hardware, sees what it
would have seen.
"""

import itertools
from collections.abc import Iterator

import numpy as np

from mllm_jax.batch import Batch
from mllm_jax.config import ConfigError, DataConfig
from mllm_jax.data.bad_samples import BadSamples
from mllm_jax.data.batching import check_batching, packed_length
from mllm_jax.data.lengths import LengthTable
from mllm_jax.data.order import FixedOrder, GroupedOrder, Order, PackedOrder
from mllm_jax.data.processor import Processor, Row
from mllm_jax.data.records import DataError, Records
from mllm_jax.data.rows import RowMaker, Wanted
from mllm_jax.data.workers import SHARED_BYTES, in_processes, in_threads


class TrainingBatches:
  """The batches of one training stage; iterating gives (ids of this process's samples, batch) for each step.

  Batching "fixed" and "pack" give a Batch of arrays [accumulation, batch_size / accumulation / process_count, ...];
  "group" gives a tuple of `accumulation` Batches [1, batch_size / accumulation / process_count, ...], as each
  micro-batch has a length of its own. Each process holds its contiguous share of every micro-batch's rows, and the ids
  are in the order of the flattened rows.

  Args:
    records: the samples.
    processor: makes the rows.
    batch_size: rows of a step, over all micro-batches and processes.
    accumulation: micro-batches a step is computed in.
    epochs: how often each sample is seen; need not be whole.
    steps: number of steps; 0 takes as many as the epochs fill.
    seed: of the shuffling; not negative.
    batching, buckets, row_length: as in `DataConfig`.
    lengths: of all records; for "group" and "pack".
    process_index, process_count: this process among those that share a step.
    threads: that decode and tokenize, in each worker; 0 does so when a row is asked for.
    workers: processes that make the rows; 0 makes them in this one.
    on_bad_sample: "error", "skip" (places without trained-on tokens) or "replace"; see `bad_samples` and `rows`.
    bad_samples: is told of every sample in the order of the batches; None puts up with any number of bad ones.

  Raises:
    ConfigError: batch_size cannot be shared evenly, or the epochs fill no batch.
    DataError: fewer samples than a batch. While iterating: a sample that cannot be used (from `Processor.row`).
  """

  def __init__(
    self,
    records: Records,
    processor: Processor,
    *,
    batch_size: int,
    accumulation: int = 1,
    epochs: float = 1.0,
    steps: int = 0,
    seed: int = 0,
    batching: str = "fixed",
    buckets: tuple[int, ...] = (),
    row_length: int = 0,
    lengths: LengthTable | None = None,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 4,
    workers: int = 0,
    on_bad_sample: str = "error",
    bad_samples: BadSamples | None = None,
  ):
    parts = accumulation * process_count
    if batch_size < 1 or accumulation < 1 or batch_size % parts:
      raise ConfigError(
        f"batch_size={batch_size} cannot be shared by {accumulation} micro-batches x {process_count} processes; "
        f"set a multiple of {parts}"
      )
    if not 0 <= process_index < process_count:
      raise ConfigError(f"process_index={process_index} does not exist among {process_count} processes")
    if len(records) < batch_size:
      raise DataError(f"{records.source}: {len(records)} samples do not fill a batch of {batch_size}; lower batch_size")
    data = DataConfig(
      max_length=processor.max_length,
      max_images=processor.max_images,
      batching=batching,
      buckets=buckets,
      row_length=row_length,
    )
    self._order = make_order(data, len(records), lengths, batch_size, accumulation, epochs, steps, seed)
    self.steps = self._order.steps
    if self.steps < 1:
      raise ConfigError(
        f"epochs={epochs} of {len(records)} samples fill no batch of {batch_size}"
        f"{' rows' if batching == 'pack' else ''}; raise epochs, lower batch_size or set steps"
      )
    self._records = records
    self._processor = processor
    self._batching = batching
    self._make = RowMaker(records, processor, batching != "fixed", on_bad_sample, seed)
    # What a sample may take, or another in its place.
    self._rooms = None
    if batching != "fixed" and on_bad_sample != "error":
      self._rooms = np.stack([np.minimum(lengths.places, processor.max_length), lengths.crops], axis=1)
    self._shape = (accumulation, batch_size // parts)
    self._process_index, self._process_count = process_index, process_count
    self._threads, self._workers = threads, workers
    self._bad_samples = bad_samples

  def __len__(self) -> int:
    return self.steps

  @property
  def samples(self) -> int:
    """Samples of the data set."""
    return len(self._records)

  @property
  def order(self) -> Order:
    """What the steps are made of."""
    return self._order

  def __iter__(self) -> Iterator[tuple[list[str], Batch | tuple[Batch, ...]]]:
    return self.iterate()

  def rows(self, step: int) -> list[tuple[int, ...]]:
    """Which records this process takes in a step, for each of its rows; none in a row that only fills up."""
    count = self._shape[0] * self._shape[1]
    return [self._order.samples(self._place(step * count + i)[1]) for i in range(count)]

  def _place(self, number: int) -> tuple[int, int]:
    """(micro-batch, row) of the number-th row that this process makes; all three are counted over all steps."""
    rows = self._shape[1]
    micro_batch, row = divmod(number, rows)
    return micro_batch, (micro_batch * self._process_count + self._process_index) * rows + row

  def iterate(self, start_step: int = 0) -> Iterator[tuple[list[str], Batch | tuple[Batch, ...]]]:
    """The batches from start_step on, the same as in a run from the beginning.

    Raises:
      ConfigError: start_step is not within 0 ... steps.
    """
    if not 0 <= start_step <= self.steps:
      raise ConfigError(f"start_step={start_step} is not within the run's {self.steps} steps")
    return self._iterate(start_step)

  def _iterate(self, start_step: int) -> Iterator[tuple[list[str], Batch | tuple[Batch, ...]]]:
    if self._bad_samples:
      self._bad_samples.resume(start_step, self._seen(start_step), self._process_count)
    rows_per_step = self._shape[0] * self._shape[1]
    # Rows and not batches are what is shared out, so that the first batch is not made by one thread alone.
    wanted = map(self._wanted, range(start_step * rows_per_step, self.steps * rows_per_step))
    if self._workers:
      row = self._processor.empty_row()
      shared = sum(values.nbytes for values in row if values.nbytes >= SHARED_BYTES)
      ahead = -(-2 * rows_per_step // self._workers)
      rows = in_processes(self._make, wanted, self._workers, self._threads, ahead, shared)
    else:
      rows = in_threads(self._make, wanted, self._threads, 2 * rows_per_step)
    try:
      for step in range(start_step, self.steps):
        names: list[str] = []
        filled = self._noted(rows, step, names)
        count = self._shape[1]
        if self._batching == "group":
          batch = tuple(_batch(filled, (1, count)) for _ in range(self._shape[0]))
        else:
          batch = _batch(filled, self._shape)
        yield names, batch
    finally:
      rows.close()

  def _noted(self, rows: Iterator, step: int, names: list[str]) -> Iterator[Row]:
    """The rows of a step; the names of their samples are added to `names`. Each is good until the next is asked for."""
    for samples, row in itertools.islice(rows, self._shape[0] * self._shape[1]):
      for sample in samples:
        if self._bad_samples:
          self._bad_samples.note(sample, step, len(names))
        names.append(sample.name)
      yield self._processor.empty_row() if row is None else row

  def _wanted(self, number: int) -> Wanted:
    """The number-th row that this process makes."""
    micro_batch, row = self._place(number)
    samples = self._order.samples(row)
    rooms = tuple(map(tuple, self._rooms[list(samples)].tolist())) if self._rooms is not None else ()
    return Wanted(samples, self._order.length(micro_batch), rooms)

  def _seen(self, steps: int) -> int:
    """Samples that this process has taken in so many steps."""
    count = steps * self._shape[0] * self._shape[1]
    if self._batching == "fixed":
      return count
    return sum(len(self._order.samples(self._place(number)[1])) for number in range(count))


def make_order(
  data: DataConfig,
  count: int,
  lengths: LengthTable | None,
  batch_size: int,
  accumulation: int,
  epochs: float,
  steps: int,
  seed: int,
) -> Order:
  """The order of `count` samples that data.batching names.

  Raises:
    ConfigError: a batching that does not exist, buckets that cannot hold the samples, or rows too short for them.
    ValueError: no lengths, or those of other data, for a batching that needs them.
  """
  check_batching(data)
  if data.batching == "fixed":
    return FixedOrder(count, data.max_length, batch_size, epochs, steps, seed)
  if lengths is None or len(lengths) != count:
    raise ValueError(f"batching={data.batching!r} needs the lengths of all {count} samples")
  if data.batching == "group":
    return GroupedOrder(lengths, data.max_length, data.buckets, batch_size, accumulation, epochs, steps, seed)
  return PackedOrder(lengths, data.max_length, packed_length(data), data.max_images, batch_size, epochs, steps, seed)


def _batch(rows: Iterator[Row], shape: tuple[int, int]) -> Batch:
  """The next rows as a Batch whose arrays begin with `shape`. A row is copied before the next one is asked for."""
  count = shape[0] * shape[1]
  first = next(rows)
  arrays = [np.empty((count, *values.shape), values.dtype) for values in first]
  for number, row in enumerate(itertools.chain([first], itertools.islice(rows, count - 1))):
    for array, values in zip(arrays, row, strict=True):
      array[number] = values
  shaped = [array.reshape(shape + array.shape[1:]) for array in arrays]
  return Batch(**dict(zip(Row._fields, shaped, strict=True)))
