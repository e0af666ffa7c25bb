"""Asking a model a benchmark's questions, so that an interrupted run goes on where it was."""

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from PIL import Image

from mllm_jax.benchmarks.question import Benchmark, Question
from mllm_jax.benchmarks.store import Store
from mllm_jax.data.processor import Processor, as_turns
from mllm_jax.data.records import DataError
from mllm_jax.data.slices import long_side
from mllm_jax.inference.requests import Request

BICUBIC = Image.Resampling.BICUBIC
BATCHES = 4  # that are prepared and handed over at once


def digest(questions: Sequence[Question]) -> str:
  """A hash of what is asked, in its order."""
  asked = [[question.id, question.prompt, len(question.images)] for question in questions]
  return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]


def request(processor: Processor, question: Question, max_new_tokens: int, beams: int, longest_side: int) -> Request:
  """A question as the engine takes it, with pictures resized to their longest side (0: as they are). Raises DataError
  that names it."""
  try:
    pictures = [picture.load() for picture in question.images]
    if longest_side:
      pictures = [picture.resize(long_side(picture.size, longest_side), BICUBIC) for picture in pictures]
    turns = as_turns(question.prompt, len(pictures))
    row = processor.with_room(len(pictures)).prompt(turns, pictures)
  except DataError as error:
    raise DataError(f"question {question.id}: {error}") from error
  return Request(row, max_new_tokens=max_new_tokens, beams=beams)


def ask(
  engine,
  processor: Processor,
  benchmark: Benchmark,
  questions: Sequence[Question],
  store: Store,
  *,
  beams: int,
  longest_side: int,
  batch_size: int,
  progress: Callable[[int], None],
) -> None:
  """Puts the answers that the store does not hold yet into it; `progress` hears how many more there are.

  While the model answers, the next pictures are read.

  Raises:
    DataError: a picture or a prompt that cannot be used; what was answered before is kept.
  """
  waiting = [question for question in questions if question.id not in store.rows]
  size = batch_size * BATCHES
  parts = [waiting[start : start + size] for start in range(0, len(waiting), size)]
  how = benchmark.max_new_tokens, beams, longest_side
  prepare = lambda part: [request(processor, question, *how) for question in part]
  with ThreadPoolExecutor(1) as reader:
    ahead = reader.submit(prepare, parts[0]) if parts else None
    for number, part in enumerate(parts, start=1):
      requests, told = ahead.result(), 0
      ahead = reader.submit(prepare, parts[number]) if number < len(parts) else None

      def tell(count: int, _: int):
        nonlocal told
        progress(count - told)
        told = count

      for question, answer in zip(part, engine.answer(requests, tell), strict=True):
        store.append({"id": question.id, "prompt": question.prompt, "text": answer.text.strip()})
