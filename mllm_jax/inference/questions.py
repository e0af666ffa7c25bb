"""Files of questions and answers in the field names of LLaVA's model_vqa_loader, which its scoring scripts read."""

import dataclasses
import json
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from mllm_jax.data import images
from mllm_jax.data.processor import Processor
from mllm_jax.data.records import IMAGE_PLACEHOLDER, DataError, Turn
from mllm_jax.inference.requests import Request


@dataclasses.dataclass(frozen=True)
class FileQuestion:
  """question_id: as in the file, and not always one of its kind there. image: a path, "" for none."""

  question_id: str | int
  image: str
  text: str


def read(path: str, image_folder: str) -> list[FileQuestion]:
  """All questions of a file. Raises DataError that names the line where one has no id or text, or its image is missing,
  so that nothing is found out after hours."""
  if not os.path.isfile(path):
    raise DataError(f"--questions {path}: no such file")
  found = []
  # Not splitlines: JSON's texts may hold U+2028 and others at which that cuts.
  for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), start=1):
    if not line.strip():
      continue
    try:
      content = json.loads(line)
    except ValueError as error:
      raise DataError(f"{path}, line {number}: is no JSON ({error})") from error
    fields = content if isinstance(content, dict) else {}
    ids_and_texts = isinstance(fields.get("question_id"), str | int) and isinstance(fields.get("text"), str)
    if not ids_and_texts or not isinstance(fields.get("image", ""), str):
      raise DataError(f'{path}, line {number}: must be {{"question_id": ..., "image": "...", "text": "..."}}')
    image = os.path.join(image_folder, fields["image"]) if fields.get("image") else ""
    if image and not os.path.isfile(image):
      raise DataError(f"{path}, line {number}: image {image} is missing; give its folder as --image_folder")
    found.append(FileQuestion(fields["question_id"], image, fields["text"].replace(IMAGE_PLACEHOLDER, "").strip()))
  if not found:
    raise DataError(f"--questions {path}: holds no question")
  return found


class AnswerFile:
  """The answers so far, one a line in the order of the questions; a context that appends to them.

  A last line that is only half there is dropped. Raises DataError where the file holds answers to other questions, or
  cannot be written.

  count: answers that it holds.
  """

  def __init__(self, path: str, asked: Sequence[FileQuestion]):
    self.path, self.count = path, 0
    try:
      self._file = open(path, "a+b")
    except OSError as error:
      raise DataError(f"--out {path}: {error.strerror}") from error
    self._file.seek(0)
    kept = 0
    for line in self._file:
      if not line.endswith(b"\n"):
        break
      if self.count == len(asked) or not _answers(line, asked[self.count]):
        self._file.close()
        raise DataError(
          f"--out {path}, line {self.count + 1}: is no answer to question {self.count + 1} of the file; name another"
        )
      self.count, kept = self.count + 1, kept + len(line)
    self._file.truncate(kept)

  def __enter__(self) -> "AnswerFile":
    return self

  def __exit__(self, *_) -> None:
    self._file.close()

  def write(self, question: FileQuestion, text: str, model: str) -> None:
    """Appends an answer, as a whole line that is on its way to the disk before this returns."""
    row = {
      "question_id": question.question_id,
      "prompt": question.text,
      "text": text,
      "answer_id": uuid.uuid4().hex,
      "model_id": os.path.basename(os.path.normpath(model)),
      "metadata": {},
    }
    self._file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
    self._file.flush()
    self.count += 1


def _answers(line: bytes, question: FileQuestion) -> bool:
  try:
    row = json.loads(line)
    return (row["question_id"], row["prompt"]) == (question.question_id, question.text)
  except (ValueError, KeyError, TypeError):
    return False


def answers(
  engine, processor: Processor, asked: Sequence[FileQuestion], settings: Mapping
) -> Iterator[tuple[FileQuestion, str]]:
  """(question, answer) in the order of the questions, each as soon as it and those before it are known.

  engine: an idle `inference.engine.Engine`, whose rows are kept full. settings: what a `Request` has beside its row.
  """
  tickets, texts, given, sent = {}, {}, 0, 0
  while given < len(asked):
    while sent < len(asked) and engine.waiting < engine.rows:
      tickets[engine.submit(_request(processor, asked[sent], settings))] = sent
      sent += 1
    for event in engine.step():
      if event.answer is not None:
        texts[tickets.pop(event.ticket)] = event.answer.text.strip()
    while given in texts:
      yield asked[given], texts.pop(given)
      given += 1


def _request(processor: Processor, question: FileQuestion, settings: Mapping) -> Request:
  pictures = [images.load(question.image)] if question.image else []
  turn = Turn("human", f"{IMAGE_PLACEHOLDER}\n" * len(pictures) + question.text)
  return Request(processor.with_room(len(pictures)).prompt([turn], pictures), **settings)
