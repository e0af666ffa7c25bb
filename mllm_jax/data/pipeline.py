"""Pipeline: the order in which samples are seen, and the threads that make batches of them.

Which samples make up step n is a pure function of the seed and n. It depends neither on the number of threads nor on
the number of processes, so a run that is resumed, or resumed on other hardware, sees what it would have seen.
"""

from collections.abc import Iterator

import grain
import numpy as np

from mllm_jax.batch import Batch
from mllm_jax.config import ConfigError
from mllm_jax.data.bad_samples import BadSamples, Made, make
from mllm_jax.data.processor import Processor, Row, collate
from mllm_jax.data.records import DataError, Records


class TrainingBatches:
  """The batches of one training stage; iterating gives (ids of this process's samples, Batch) for each step.

  Every epoch is shuffled anew. Epochs follow one another without a gap, so a batch may hold the end of one and the
  start of the next; only what is left at the end of the whole run and fills no batch is dropped.

  The arrays are [accumulation, batch_size / accumulation / process_count, ...]: each process holds its contiguous
  share of every micro-batch's rows, and the ids are in the order of the flattened rows.

  Args:
    records: the samples.
    processor: makes the rows.
    batch_size: samples of a step, over all micro-batches and processes.
    accumulation: micro-batches a step is computed in.
    epochs: how often each sample is seen; need not be whole.
    steps: number of steps; 0 takes as many as the epochs fill.
    seed: of the shuffling; not negative.
    process_index, process_count: this process among those that share a step.
    threads: that decode and tokenize; 0 does so when a batch is asked for.
    on_bad_sample: "error", "skip" (a row without trained-on tokens) or "replace"; see `bad_samples`.
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
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 4,
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
    self.steps = steps or int(epochs * len(records)) // batch_size
    if self.steps < 1:
      raise ConfigError(
        f"epochs={epochs} of {len(records)} samples fill no batch of {batch_size}; raise epochs or set steps"
      )
    self._records = records
    self._processor = processor
    self._batch_size = batch_size
    self._shape = (accumulation, batch_size // parts)
    self._process_index = process_index
    self._threads = threads
    self._seed = seed
    self._policy = on_bad_sample
    self._bad_samples = bad_samples
    # Grain shuffles epoch e with its seed + e: not spread out, seed 1 would begin with the second epoch of seed 0.
    spread_seed = int(np.random.SeedSequence(seed).generate_state(1)[0]) // 2
    self._order = grain.MapDataset.range(len(records)).shuffle(seed=spread_seed).repeat()

  def __len__(self) -> int:
    return self.steps

  @property
  def samples(self) -> int:
    """Samples of the data set."""
    return len(self._records)

  def __iter__(self) -> Iterator[tuple[list[str], Batch]]:
    return self.iterate()

  def indices(self, step: int) -> np.ndarray:
    """int64 [accumulation, rows]: which records this process takes in a step."""
    count = self._shape[0] * self._shape[1]
    return np.array([self._index(step * count + i) for i in range(count)]).reshape(self._shape)

  def _index(self, place: int) -> int:
    """The record of the place-th row that this process makes, counted over all steps."""
    micro_batches, rows = self._shape
    micro_batch, row = divmod(place, rows)  # micro-batches too are counted over all steps
    micro_batch_size = self._batch_size // micro_batches
    return int(self._order[micro_batch * micro_batch_size + self._process_index * rows + row])

  def iterate(self, start_step: int = 0) -> Iterator[tuple[list[str], Batch]]:
    """The batches from start_step on, the same as in a run from the beginning.

    Raises:
      ConfigError: start_step is not within 0 ... steps.
    """
    if not 0 <= start_step <= self.steps:
      raise ConfigError(f"start_step={start_step} is not within the run's {self.steps} steps")
    return self._iterate(start_step)

  def _iterate(self, start_step: int) -> Iterator[tuple[list[str], Batch]]:
    rows_per_step = self._shape[0] * self._shape[1]
    # Rows and not batches are what the threads share, so that the first batch is not made by one thread alone.
    places = grain.MapDataset.range(start_step * rows_per_step, self.steps * rows_per_step)
    options = grain.ReadOptions(
      num_threads=self._threads, prefetch_buffer_size=2 * rows_per_step if self._threads else 0
    )
    rows = iter(places.map(self._row).to_iter_dataset(options))
    for _ in range(start_step, self.steps):
      made = [next(rows) for _ in range(rows_per_step)]
      for each in made if self._bad_samples else ():
        self._bad_samples.note(each)
      yield (
        [each.name for each in made],
        self._batch([self._processor.empty_row() if each.value is None else each.value for each in made]),
      )

  def _row(self, place: int) -> Made[Row]:
    return make(self._records, self._index(int(place)), self._processor.row, self._policy, self._seed)

  def _batch(self, rows: list[Row]) -> Batch:
    flat = collate(rows)
    return Batch(
      **{field: getattr(flat, field).reshape(self._shape + getattr(flat, field).shape[1:]) for field in Row._fields}
    )
