"""What a benchmark is: questions out of published files, a credit for each answer, and a summary of the credits."""

import collections
import dataclasses
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from mllm_jax.data import images


@dataclasses.dataclass(frozen=True)
class Picture:
  """A picture that is read when it is asked about. name: its path, or what errors call it; content: gives its encoded
  bytes where it is no file of its own."""

  name: str
  content: Callable[[], bytes] | None = None

  def load(self) -> Image.Image:
    """8-bit RGB. Raises DataError that names it."""
    return images.load(self.content(), sample_name=self.name) if self.content else images.load(self.name)

  def size(self) -> tuple[int, int]:
    """(width, height). Raises DataError that names it."""
    return images.size(self.content(), sample_name=self.name) if self.content else images.size(self.name)


@dataclasses.dataclass(frozen=True)
class Question:
  """One question of a benchmark.

  id: unique in the benchmark. prompt: what the model is asked, with `<image>` for each of its pictures or, without any,
  behind them. gold: what the scorer compares with; None where it is hidden. facts: what else the scorer or the
  submission needs.
  """

  id: str
  prompt: str
  images: tuple[Picture, ...]
  gold: Any = None
  category: str = ""
  facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Result:
  """An answered question. credit: 0 to 1, None where the gold answer is hidden. verdict: what the judge wrote."""

  question: Question
  answer: str
  credit: float | None = None
  verdict: str = ""


@dataclasses.dataclass(frozen=True)
class Summary:
  """score: the number that papers print. details: other numbers of the metric, by name. categories: the metric within
  each category."""

  score: float
  details: Mapping[str, float] = dataclasses.field(default_factory=dict)
  categories: Mapping[str, float] = dataclasses.field(default_factory=dict)


def percent(results: Iterable[Result]) -> float:
  """100 x the mean credit of at least one result."""
  return 100 * statistics.fmean(result.credit for result in results)


def grouped(results: Iterable[Result], key: Callable[[Result], Any]) -> dict[Any, list[Result]]:
  """Results by key, in the order in which the keys first appear."""
  groups = collections.defaultdict(list)
  for result in results:
    groups[key(result)].append(result)
  return dict(groups)


def by_category(results: Sequence[Result], score: Callable[[list[Result]], float] = percent) -> dict[str, float]:
  """The score within each category, sorted by name; results without a category are left out."""
  groups = grouped(results, lambda result: result.question.category)
  return {name: score(groups[name]) for name in sorted(groups) if name}


def mean(results: Sequence[Result]) -> Summary:
  """The mean credit in percent, overall and by category."""
  return Summary(percent(results), categories=by_category(results))


@dataclasses.dataclass(frozen=True)
class File:
  """A published file or folder (it ends in "/"). pattern: where below --data; the parquet files of a split are found by
  `*` and `**`. origin: who publishes it, in words."""

  pattern: str
  origin: str


@dataclasses.dataclass(frozen=True)
class Judge:
  """How a language model judges an answer.

  ask: (question, answer) -> the chat messages, or None where rules settle it and the answer stands as its own verdict.
  credit: (question, verdict) -> 0 to 1, or None where the verdict cannot be read and the judge is to be asked again.
  """

  ask: Callable[[Question, str], list[dict[str, str]] | None]
  credit: Callable[[Question, str], float | None]


@dataclasses.dataclass(frozen=True)
class Benchmark:
  """One benchmark, with one prompt and one metric.

  title: as papers call it. metric, prompt: in words, for --list. files: all that must be there. read: questions from
  the `source.Source` of those files. credit: of an answer to a question; None where the gold answers are hidden or a
  `judge` gives it. summarise: of the results of all questions. full: the highest score. submission: writes the file
  for the server, given the results, the source and the folder, and returns its path.
  """

  name: str
  title: str
  metric: str
  prompt: str
  files: tuple[File, ...]
  read: Callable[[Any], list[Question]]
  credit: Callable[[Question, str], float] | None = None
  summarise: Callable[[Sequence[Result]], Summary] = mean
  full: float = 100
  submission: Callable[[Sequence[Result], Any, Path], Path] | None = None
  judge: Judge | None = None
  max_new_tokens: int = 128

  @property
  def scored(self) -> bool:
    """Whether the answers can be scored here."""
    return self.credit is not None or self.judge is not None
