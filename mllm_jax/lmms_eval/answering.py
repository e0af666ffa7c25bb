"""Answering: many questions, whose pictures are in memory only while they wait for their turn."""

import collections
import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from mllm_jax.data.processor import Processor
from mllm_jax.inference.engine import Engine
from mllm_jax.inference.requests import Answer, Request
from mllm_jax.lmms_eval.conversations import Conversation

THREADS = 4  # decode pictures while the model answers


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
  requests = enumerate(_requests(engine.processor, questions, ahead=2 * engine.rows))
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


def _requests(processor: Processor, questions: Sequence[Question], ahead: int) -> Iterator[Request]:
  """The questions' requests, of which `ahead` are in the making."""
  with ThreadPoolExecutor(THREADS) as pool:
    making = (pool.submit(_request, processor, question) for question in questions)
    made = collections.deque(itertools.islice(making, ahead))
    while made:
      yield made.popleft().result()
      made.extend(itertools.islice(making, 1))


def _request(processor: Processor, question: Question) -> Request:
  with naming(question.name):
    turns, pictures, system = question.conversation()
    row = processor.with_room(len(pictures)).prompt(turns, pictures, system=system)
    crops = max(1, int(row.grids.any(axis=1).sum()))
    return Request(row._replace(patches=row.patches[:crops], grids=row.grids[:crops]), **question.settings)


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
  """Puts a question's name before the message of a ValueError."""
  try:
    yield
  except ValueError as error:
    raise ValueError(f"{name}: {error}") from error
