"""Lengths: how much room each sample takes in a row, measured once for a whole data set.

Grouping and packing have to know all lengths before the first step. Texts are tokenized for that; of the images at most
the headers are read, where a picture's size decides how many crops and tokens it becomes.
"""

import dataclasses
import gc
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from mllm_jax.data import chat, images
from mllm_jax.data.bad_samples import make
from mllm_jax.data.counting import TokenCounter
from mllm_jax.data.processor import Processor
from mllm_jax.data.records import DataError, Records, Sample, check, check_part, sample_problems
from mllm_jax.data.tokenizer import Piece
from mllm_jax.data.workers import in_processes

CHUNK = 500  # samples measured at a time
IS_LETTER = bytes(not chr(byte).isspace() for byte in range(256))
SAMPLES_PER_WORKER = 5000  # for fewer a worker is not worth the seconds that it takes to start


@dataclasses.dataclass(frozen=True)
class LengthTable:
  """What each of N samples takes, int32 [N] each. A bad sample that is skipped takes nothing.

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
  policy: str = "error",
  seed: int = 0,
  problems: list[tuple[int, str]] | None = None,
) -> LengthTable:
  """Measures every sample.

  Args:
    records: the samples.
    processor: what makes rows of them.
    workers: processes that measure; 0 stays in this one; None takes as many as the data set is worth.
    progress: is told how many more samples are done.
    policy: what becomes of a sample that no row can be made of, as in `bad_samples`. One that is replaced has the
      lengths of the sample in its place.
    seed: chooses that one, and the images that are enlarged.
    problems: is given what `records.check` finds, in the same pass, and what else no row can be made of; with "error"
      such samples then count as nothing.

  Raises:
    DataError: a sample that no row can be made of, where the policy is "error" and nobody asks for the problems; the
      message names it.
  """
  if workers is None:
    workers = min(os.cpu_count() or 1, len(records) // SAMPLES_PER_WORKER)
  task = _Measure(records.outlines(), processor, policy, seed, problems is not None)
  parts = []
  for part, found in in_processes(task, _parts(len(records)), workers) if workers else map(task, _parts(len(records))):
    parts.append(part)
    if problems is not None:
      problems += found
    progress(len(part))
  return LengthTable(*np.concatenate(parts).T.copy())


def measured(
  path: Path,
  records: Records,
  processor: Processor,
  progress: Callable[[int], None] = lambda done: None,
  policy: str = "error",
  seed: int = 0,
  problems: list[tuple[int, str]] | None = None,
) -> LengthTable:
  """What `measure` gives; read from `path` where that holds the lengths of just this data, else written there."""
  identity = fingerprint(records, processor, policy, seed)
  if identity is not None and path.is_file():
    with np.load(path) as content:
      if str(content["fingerprint"]) == identity:
        if problems is not None:  # the files may have gone since
          problems += check(records, max_images=processor.max_images, processes=os.cpu_count() or 1)
        return LengthTable(**{name: content[name] for name in FIELDS})
  table = measure(records, processor, progress=progress, policy=policy, seed=seed, problems=problems)
  if identity is None or (problems and policy == "error"):
    return table
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
  with open(partial, "wb") as file:
    np.savez(file, fingerprint=identity, **{name: getattr(table, name) for name in FIELDS})
  os.replace(partial, path)
  return table


def fingerprint(records: Records, processor: Processor, policy: str = "error", seed: int = 0) -> str | None:
  """A hash of what the lengths depend on: the data's files with sizes and dates, which of their samples are taken, the
  tokenizer, the template, the crops, which images are enlarged, and what becomes of bad samples. None where no date
  tells the state of the data: a JSON file in a bucket, a TensorFlow data set."""
  state = source_state(records)
  if state is None:
    return None
  content = [
    3,  # version of what is measured
    state,
    processor.tokenizer.__reduce__()[1],
    processor.template,
    repr((processor.aspect, processor.enlarging)),
    processor.max_images,
    [policy, seed if policy == "replace" or processor.enlarging else 0],
  ]
  return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def source_state(records: Records) -> list | None:
  """Each file of a source with its size and date, the folder of its images, and the samples chosen of it; None where
  nothing tells."""
  if hasattr(records, "parts"):  # a mix
    states = [(source_state(part), hashlib.sha256(chosen.tobytes()).hexdigest()) for part, chosen in records.parts]
    return None if any(state is None for state, _ in states) else [list(pair) for pair in states]
  if getattr(records, "states", ()):  # remote shards
    return [len(records), [[shard, *state] for shard, state in zip(records.shards, records.states)]]
  files = getattr(records, "shards", None) or (records.source,)
  if not all(os.path.isfile(file) for file in files):
    return None
  stats = [(os.path.abspath(file), os.stat(file)) for file in files]
  folder = getattr(records, "image_folder", "")
  return [len(records), folder, [[file, stat.st_size, stat.st_mtime_ns] for file, stat in stats]]


def _words(samples: Sequence[Sample]) -> list[int]:
  """Of each sample the words of its turns, as `str.split` finds them; of plain text all at once."""
  texts = ["\n".join([turn.text for turn in sample.turns]) for sample in samples]
  plain = [number for number, text in enumerate(texts) if text.isascii()]
  lines = [texts[number] + "\n" for number in plain]
  letters = np.frombuffer("".join(lines).encode().translate(IS_LETTER), bool)
  begins = letters.copy()
  begins[1:] &= ~letters[:-1]
  words = [0 if text.isascii() else len(text.split()) for text in texts]
  if plain:
    firsts = np.cumsum([0, *map(len, lines[:-1])])
    for number, count in zip(plain, np.add.reduceat(begins, firsts, dtype=np.int64).tolist(), strict=True):
      words[number] = count
  return words


def _parts(count: int) -> Iterator[range]:
  return (range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK))


class _Measure:
  """(int32 [n, 4], a row of a LengthTable for each sample of a range; their problems, if these are asked for). Can be
  pickled; for one thread."""

  def __init__(self, records: Records, processor: Processor, policy: str, seed: int, checks: bool):
    self._records, self._processor = records, processor
    self._policy, self._seed, self._checks = policy, seed, checks
    self._counter: TokenCounter | None = None

  def __getstate__(self):
    return self.__dict__ | {"_counter": None}  # holds open tokenizers

  def __call__(self, part: Iterable[int]) -> tuple[np.ndarray, list[tuple[int, str]]]:
    collects = gc.isenabled()
    gc.disable()  # a third of the time goes there otherwise, and there are no cycles to find
    try:
      samples = [self._records[i] for i in part]
      if self._checks and any(sample_problems(sample, self._processor.max_images) for sample in samples):
        return self._one_by_one(part)
      return np.array(self._rows(samples), np.int32), []
    except DataError:  # whose, and what becomes of it, is asked only now
      return self._one_by_one(part)
    finally:
      if collects:
        gc.enable()

  def _one_by_one(self, part: Iterable[int]) -> tuple[np.ndarray, list[tuple[int, str]]]:
    rows, problems = [], []
    policy = "skip" if self._checks and self._policy == "error" else self._policy
    for i in part:
      made = make(self._records, i, self._one, policy, self._seed)
      rows.append((0, 0, 0, 0) if made.value is None else made.value)
      if self._checks:
        problems += check_part(self._records, [i], self._processor.max_images) or [(i, made.problem)] * bool(
          made.problem
        )
    return np.array(rows, np.int32), problems

  def _one(self, sample: Sample) -> tuple[int, int, int, int]:
    try:
      return self._rows([sample])[0]
    except DataError as error:
      raise DataError(f"{sample.name}: {error}") from error

  def _rows(self, samples: Sequence[Sample]) -> list[tuple[int, int, int, int]]:
    """Rows of a LengthTable. Raises DataError for what `Processor.row` refuses a sample for, but for its pixels."""
    maker = self._processor
    self._counter = self._counter or TokenCounter(maker.tokenizer)
    rest: list[tuple[int, ...]] = []  # of each sample: chunks of text, other places, crops, words, images

    def chunks() -> Iterator[list[Piece]]:
      for sample in samples:
        pieces = chat.conversation(sample.turns, maker.template, maker.tokenizer, len(sample.images), sample.system)
        leads, found = chat.stretches(pieces, maker.tokenizer)
        crops, visual = self._costs(sample)
        rest.append((len(found), leads + visual, crops, len(sample.images)))
        yield from found

    counts = iter(self._counter.count(chunks()))
    return [
      (others + sum(itertools.islice(counts, texts)), crops, words, images)
      for (texts, others, crops, images), words in zip(rest, _words(samples), strict=True)
    ]

  def _costs(self, sample: Sample) -> tuple[int, int]:
    """(crops, visual tokens) of a sample's images. Raises DataError where a row has no room for them."""
    maker = self._processor
    if not maker.aspect.by_size:  # then no image need be looked at
      crops, visual = len(sample.images), len(sample.images) * maker.tokens_per_crop
    else:
      sizes = maker.training_sizes(sample, [images.size(image) for image in sample.images], self._seed)
      costs = [maker.image_cost(*size) for size in sizes]
      crops, visual = (sum(cost) for cost in zip((0, 0), *costs))
    if crops > maker.max_images:
      raise DataError(f"{crops} crops, and a row has room for {maker.max_images}; raise data.max_images")
    return crops, visual
