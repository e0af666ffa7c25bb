"""Answering, and weighing given answers: many questions, whose pictures are in memory only while they wait."""

import collections
import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from mllm_jax.data.processor import Processor, Row
from mllm_jax.inference.engine import Engine
from mllm_jax.inference.likelihood import Likelihood, answer_row
from mllm_jax.inference.requests import Answer, Request
from mllm_jax.lmms_eval.conversations import Conversation

THREADS = 4  # decode pictures while the model answers
BATCHES = 4  # of given answers, weighed in one call, so that those of like length meet


class Question(NamedTuple):
  """name: what errors call it. conversation: makes it, in another thread. settings: the other fields of its request."""

  name: str
  conversation: Callable[[], Conversation]
  settings: dict[str, Any]


def answer(engine: Engine, questions: Sequence[Question], progress: Callable[[], None]) -> list[Answer]:
  """Answers in the order of the questions; `progress` is told of each.

  Which requests the engine has at any step follows from the questions alone, so that several processes that are asked
  the same go through the same steps.

  Raises:
    ValueError: a question that cannot be asked; the message begins with its name.
  """
  tickets: dict[int, int] = {}
  answers: dict[int, Answer] = {}
  make = functools.partial(_request, engine.processor)
  requests = enumerate(_made(make, questions, ahead=2 * engine.rows))
  try:
    while len(answers) < len(questions):
      while engine.waiting < engine.rows and (item := next(requests, None)) is not None:
        number, request = item
        with naming(questions[number].name):
          tickets[engine.submit(request)] = number
      for event in engine.step():
        if event.answer is not None:
          answers[tickets.pop(event.ticket)] = event.answer
          progress()
  finally:
    for ticket in tickets:
      engine.cancel(ticket)
  return [answers[number] for number in range(len(questions))]


def weigh(engine: Engine, questions: Sequence[Question], progress: Callable[[int], None]) -> list[Likelihood]:
  """How likely the model's turns are that the questions' conversations end with, in their order; `progress` is told how
  many more are known. Raises ValueError as `answer`."""
  rows = _made(functools.partial(_answer_row, engine.processor), questions, ahead=2 * BATCHES * engine.rows)
  found: list[Likelihood] = []
  while part := list(itertools.islice(rows, BATCHES * engine.rows)):
    found += engine.likelihoods(part)
    progress(len(part))
  return found


def _made(make: Callable[[Any], Any], questions: Sequence, ahead: int) -> Iterator:
  """What is made of the questions, of which `ahead` are in the making."""
  with ThreadPoolExecutor(THREADS) as pool:
    making = (pool.submit(make, question) for question in questions)
    made = collections.deque(itertools.islice(making, ahead))
    while made:
      yield made.popleft().result()
      made.extend(itertools.islice(making, 1))


def _request(processor: Processor, question: Question) -> Request:
  with naming(question.name):
    turns, pictures, system = question.conversation()
    row = processor.with_room(len(pictures)).prompt(turns, pictures, system=system)
    return Request(_with_own_crops(row), **question.settings)


def _answer_row(processor: Processor, question: Question) -> Row:
  with naming(question.name):
    turns, pictures, system = question.conversation()
    return _with_own_crops(answer_row(processor.with_room(len(pictures)), turns, pictures, system))


def _with_own_crops(row: Row) -> Row:
  crops = max(1, int(row.grids.any(axis=1).sum()))
  return row._replace(patches=row.patches[:crops], grids=row.grids[:crops])


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
  """Puts a question's name before the message of a ValueError."""
  try:
    yield
  except ValueError as error:
    raise ValueError(f"{name}: {error}") from error
