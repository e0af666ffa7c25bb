"""Lengths: how much room each sample takes in a row, measured once for a whole data set.

Grouping and packing have to know all lengths before the first step. Texts are tokenized for that; no image is opened.
"""

import collections
import concurrent.futures
import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from mllm_jax.data.processor import Processor
from mllm_jax.data.records import Records, Sample
from mllm_jax.data.workers import start_worker

CHUNK = 500  # samples given to a worker at a time
SAMPLES_PER_WORKER = 5000  # for fewer a worker is not worth the seconds that it takes to start


@dataclasses.dataclass(frozen=True)
class LengthTable:
  """What each of N samples takes, int32 [N] each.

  places: tokens with the visual ones among them, before anything is cut off.
  crops: image crops.
  words: words of all turns as the released code counts them: split at white space, placeholders included.
  images: images of the sample; 0 makes it a sample of text only.
  """

  places: np.ndarray
  crops: np.ndarray
  words: np.ndarray
  images: np.ndarray

  def __len__(self) -> int:
    return len(self.places)

  @property
  def signed_words(self) -> np.ndarray:
    """The released sampler's lengths: words, negative for samples of text only."""
    words = np.maximum(self.words, 1)
    return np.where(self.images > 0, words, -words)


FIELDS = tuple(field.name for field in dataclasses.fields(LengthTable))


def measure(
  records: Records,
  processor: Processor,
  workers: int | None = None,
  progress: Callable[[int], None] = lambda done: None,
) -> LengthTable:
  """Measures every sample.

  Args:
    records: the samples.
    processor: tokenizes them.
    workers: processes that do so; 0 stays in this one; None takes as many as the data set is worth.
    progress: is told how many more samples are done.

  Raises:
    DataError: a sample that no row can be made of; the message names it.
  """
  if workers is None:
    workers = min(os.cpu_count() or 1, len(records) // SAMPLES_PER_WORKER)
  chunks = ([records[i] for i in part] for part in _parts(len(records)))
  parts = []
  for part in _in_workers(processor, chunks, workers) if workers else (_measure(processor, chunk) for chunk in chunks):
    parts.append(part)
    progress(len(part))
  return LengthTable(*np.concatenate(parts).T.copy())


def measured(
  path: Path, records: Records, processor: Processor, progress: Callable[[int], None] = lambda done: None
) -> LengthTable:
  """What `measure` gives; read from `path` where that holds the lengths of just this data, else written there."""
  if not os.path.isfile(records.source):  # a folder, a mix or a bucket, which no date tells the state of
    return measure(records, processor, progress=progress)
  identity = fingerprint(records, processor)
  if path.is_file():
    with np.load(path) as content:
      if str(content["fingerprint"]) == identity:
        return LengthTable(**{name: content[name] for name in FIELDS})
  table = measure(records, processor, progress=progress)
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
  with open(partial, "wb") as file:
    np.savez(file, fingerprint=identity, **{name: getattr(table, name) for name in FIELDS})
  os.replace(partial, path)
  return table


def fingerprint(records: Records, processor: Processor) -> str:
  """A hash of what the lengths depend on: the data file's size and date, the tokenizer, the template, the crops."""
  stat = os.stat(records.source)
  content = [
    os.path.abspath(records.source),
    stat.st_size,
    stat.st_mtime_ns,
    len(records),
    processor.tokenizer.__reduce__()[1],
    processor.template,
    processor.tokens_per_crop,
  ]
  return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _parts(count: int) -> Iterator[range]:
  return (range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK))


def _measure(processor: Processor, samples: Sequence[Sample]) -> np.ndarray:
  """int32 [n, 4], a row of a LengthTable for each sample."""
  rows = [
    (*processor.measure(sample), sum(len(turn.text.split()) for turn in sample.turns), len(sample.images))
    for sample in samples
  ]
  return np.array(rows, np.int32)


def _in_workers(processor: Processor, chunks: Iterator[Sequence[Sample]], workers: int) -> Iterator[np.ndarray]:
  """`_measure` of all chunks in their order; few of them are read ahead."""
  # Forking a process that has threads, as jax has, can leave the child waiting for a lock for good.
  with concurrent.futures.ProcessPoolExecutor(
    workers, multiprocessing.get_context("spawn"), _start, (processor,)
  ) as pool:
    pending = collections.deque(pool.submit(_work, chunk) for chunk in itertools.islice(chunks, 3 * workers))
    try:
      while pending:
        yield pending.popleft().result()
        pending.extend(pool.submit(_work, chunk) for chunk in itertools.islice(chunks, 1))
    finally:
      for future in pending:
        future.cancel()


def _start(processor: Processor) -> None:
  global _processor
  start_worker()
  _processor = processor


def _work(samples: Sequence[Sample]) -> np.ndarray:
  return _measure(_processor, samples)
