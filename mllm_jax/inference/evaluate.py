"""Evaluation: a held-out LLaVA file is asked question by question, and the answers are compared with the file's."""

import collections
import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence

from PIL import Image

from mllm_jax.data import images
from mllm_jax.data.processor import Processor, Row
from mllm_jax.data.records import IMAGE_PLACEHOLDER, DataError, Records, Turn
from mllm_jax.inference.engine import Engine
from mllm_jax.inference.requests import Request

WINDOW = 512  # questions whose pictures are held at a time


@dataclasses.dataclass(frozen=True)
class Question:
  """One question of a file. images: paths. category: what it is counted under ("" for nothing but the whole)."""

  sample_id: str
  images: tuple[str, ...]
  text: str
  gold: str
  category: str
  system: str | None = None


@dataclasses.dataclass(frozen=True)
class Prediction:
  """A question with the model's answer, and the one it gave with the pictures blanked (None where not asked)."""

  question: Question
  answer: str
  blank_answer: str | None = None

  @property
  def correct(self) -> bool:
    return self.answer.strip() == self.question.gold.strip()

  @property
  def blank_correct(self) -> bool:
    return self.blank_answer is not None and self.blank_answer.strip() == self.question.gold.strip()


@dataclasses.dataclass(frozen=True)
class Score:
  """exact_match and blank: fractions of `count` questions; blank is None where it was not asked."""

  exact_match: float
  blank: float | None
  count: int

  @classmethod
  def of(cls, predictions: Sequence[Prediction]) -> "Score":
    """The score of at least one prediction."""
    count = len(predictions)
    blanked = all(prediction.blank_answer is not None for prediction in predictions)
    return cls(
      sum(prediction.correct for prediction in predictions) / count,
      sum(prediction.blank_correct for prediction in predictions) / count if blanked else None,
      count,
    )


@dataclasses.dataclass(frozen=True)
class EvaluationResult:
  """Predictions in the file's order; `overall` counts all of them, `categories` those of each, sorted by name."""

  predictions: list[Prediction]

  @property
  def overall(self) -> Score:
    return Score.of(self.predictions)

  @property
  def categories(self) -> dict[str, Score]:
    groups = collections.defaultdict(list)
    for prediction in self.predictions:
      groups[prediction.question.category].append(prediction)
    return {category: Score.of(groups[category]) for category in sorted(groups) if category}

  def metrics(self) -> dict[str, float]:
    """What a log row holds: eval/exact_match and eval/exact_match/CATEGORY, and the same under eval/blank if asked."""
    scores = {"": self.overall, **{f"/{category}": score for category, score in self.categories.items()}}
    row = {f"eval/exact_match{suffix}": score.exact_match for suffix, score in scores.items()}
    row |= {f"eval/blank{suffix}": score.blank for suffix, score in scores.items() if score.blank is not None}
    return row


def exact_match(
  engine: Engine,
  processor: Processor,
  records: Records,
  *,
  max_new_tokens: int,
  blank: bool,
  progress: Callable[[int, int], None] | None = None,
) -> EvaluationResult:
  """Asks every question of every sample on its own, greedily, and compares exactly, apart from outer white space.

  A question later in a conversation is asked as if it were the first, with all of the sample's pictures before it.

  Args:
    engine: answers.
    processor: makes the prompts.
    records: samples whose answers are the gold ones; a category is an answer's own or else its sample's.
    max_new_tokens: longest answer; a gold answer that needs more is counted wrong.
    blank: ask again with every picture replaced by one of the vision tower's mean colour.
    progress: called with (questions answered, all questions), the blanked ones included, as they are.

  Raises:
    DataError: no question in the file, or a sample that cannot be used; the message names it.
  """
  questions = list_questions(records)
  rounds = [False, True] if blank else [False]
  total = len(questions) * len(rounds)
  answers = []
  for blanked, start in itertools.product(rounds, range(0, len(questions), WINDOW)):
    rows = _rows(processor, questions[start : start + WINDOW], blanked)
    told = None if progress is None else lambda done, _, before=len(answers): progress(before + done, total)
    answers += [answer.text for answer in engine.answer([Request(row, max_new_tokens) for row in rows], told)]
  seen, unseen = answers[: len(questions)], answers[len(questions) :] or [None] * len(questions)
  return EvaluationResult([Prediction(*fields) for fields in zip(questions, seen, unseen, strict=True)])


def list_questions(records: Records) -> list[Question]:
  """Every human turn that has an answer, in the file's order. Raises DataError if there is none, or if
  images are no files."""
  questions = []
  for i in range(len(records)):
    sample = records[i]
    if not all(isinstance(image, str) for image in sample.images):  # they would be held, and written into the report
      raise DataError(f"{sample.name}: its images are inside the record; set evaluation.path to a JSON file")
    for human, gpt in zip(sample.turns[::2], sample.turns[1::2]):
      text = human.text.replace(IMAGE_PLACEHOLDER, "").strip()
      category = gpt.category or sample.category
      questions.append(Question(sample.id, sample.images, text, gpt.text, category, sample.system))
  if not questions:
    raise DataError(f"{records.source}: holds no question with an answer; set evaluation.path to a file that does")
  return questions


def _rows(processor: Processor, questions: Sequence[Question], blanked: bool) -> list[Row]:
  """The questions' rows. Blanked, a picture has one colour everywhere: the mean that the tower subtracts, as in the
  padding around pictures that are not square."""
  colour = tuple(int(255 * mean) for mean in processor.vision.mean)

  @functools.lru_cache(maxsize=4)  # the questions about a picture follow each other
  def picture(path: str) -> Image.Image:
    loaded = images.load(path)
    return Image.new("RGB", loaded.size, colour) if blanked else loaded

  rows = []
  for question in questions:
    with _naming(question):
      pictures = [picture(path) for path in question.images]
      rows.append(processor.with_room(len(pictures)).prompt(_turns(question), pictures, system=question.system))
  return rows


def _turns(question: Question) -> list[Turn]:
  return [Turn("human", f"{IMAGE_PLACEHOLDER}\n" * len(question.images) + question.text)]


@contextlib.contextmanager
def _naming(question: Question):
  """DataError inside names the question."""
  try:
    yield
  except DataError as error:
    raise DataError(f"sample {question.sample_id!r}, question {question.text!r}: {error}") from error
