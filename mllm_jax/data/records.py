"""Records: what a sample is, how one is read from LLaVA's JSON, and a check that finds bad ones before a run does.

A sample of such a file:

  {"id": "000000033471", "image": "coco/train2017/000000033471.jpg",
   "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": "A bus."}]}
"""

import dataclasses
import multiprocessing
import os
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from mllm_jax import places
from mllm_jax.data.image_files import locate

IMAGE_PLACEHOLDER = "<image>"
CHECKED = 20_000  # samples that a process checks at a time
ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}


class DataError(ValueError):
  """Data that cannot be used; the message names the file, the sample's index and id, the value and the remedy."""


@dataclasses.dataclass(frozen=True)
class Turn:
  """One turn of a conversation. `category` is what an evaluation counts this answer under ("" if nothing)."""

  role: str  # "human" or "gpt"
  text: str
  category: str = ""


class ImageSize(NamedTuple):
  """An image of which nothing but its size in pixels is at hand."""

  width: int
  height: int


@dataclasses.dataclass(frozen=True)
class Sample:
  """One conversation and the images it is about.

  id: the file's own id as text; the sample's index where the file gives none.
  index: place in the file, from 0.
  images: in the order of the placeholders: paths, already joined to the image folder, or the encoded bytes themselves,
    or, in `Records.outlines`, their sizes.
  turns: beginning with a human one, roles alternating.
  category: what an evaluation counts the sample under ("" if nothing).
  system: replaces the template's system text; None keeps it.
  source: the file it came from.
  names: the images' paths as the file has them; () where nothing says them.
  """

  id: str
  index: int
  images: tuple[str | bytes | ImageSize, ...]
  turns: tuple[Turn, ...]
  category: str = ""
  system: str | None = None
  source: str = ""
  names: tuple[str, ...] = ()

  @property
  def name(self) -> str:
    """How errors call this sample: "data/train.json, sample 1234 ('000000033471')"."""
    return _name(self.source, self.index, self.id)


class Records(Sequence):
  """The samples of one source in its order; each is made when it is asked for.

  `source` is how errors call the source. Every kind can be pickled, and used by several threads at a time.
  """

  source: str

  @staticmethod
  def load(path: str, image_folder: str) -> "Records":
    """Opens a source of any kind by its path; `mllm_jax.data.sources` says which there are.

    Raises:
      DataError: there is nothing there, it is none of those kinds, or it holds no sample.
    """
    from mllm_jax.data.sources import open_source  # the kinds are made of what stands in this file

    return open_source(path, image_folder)

  def outlines(self) -> "Records":
    """The same samples for those who look at no pixel; images may be sizes alone, where that saves reading them."""
    return self

  def _index(self, i: int) -> int:
    """`i` counted from the beginning. Raises IndexError outside the source."""
    index = i + len(self) if i < 0 else i
    if not 0 <= index < len(self):
      raise IndexError(f"{self.source}: there is no sample {i} among {len(self)}")
    return int(index)


def parse_sample(raw: Any, index: int, source: str, image_folder: str) -> Sample:
  """A Sample out of a LLaVA file's object. Raises DataError where its structure is another."""
  try:
    if not isinstance(raw, dict):
      raise DataError(
        f"is a {type(raw).__name__} where an object is needed; write {{'id': ..., 'conversations': [...]}}"
      )
    identity = raw.get("id", index)
    if isinstance(identity, bool) or not isinstance(identity, str | int):
      raise DataError(f"id is a {type(identity).__name__}; write a text or an integer")
    system, turns = _turns(raw.get("conversations"))
    names = tuple(_image_paths(raw.get("image")))
    images = tuple([join_image(image_folder, name) for name in names])
    return Sample(str(identity), index, images, turns, _text(raw, "category"), system, source, names)
  except DataError as error:
    name = _name(source, index, raw.get("id", index) if isinstance(raw, dict) else None)
    separator = ", " if str(error).startswith("turn ") else ": "
    raise DataError(f"{name}{separator}{error}") from error


def join_image(folder: str, path: str) -> str:
  """An image's path as it is where it is whole, else inside the folder."""
  if "://" in folder or "://" in path:
    return path if "://" in path or path.startswith("/") else str(places.join(folder, path))
  return os.path.join(folder, path)


class Problem(NamedTuple):
  """What makes a sample unusable: its kind in a word or two, and a text with the remedy, without the sample's name."""

  kind: str
  text: str


def check(records: Records, *, max_images: int, processes: int = 1) -> list[tuple[int, str]]:
  """Looks for everything that would stop a run, without decoding images.

  Returns (sample, one line with its name, the problem and the remedy) for each problem, in file order.

  Found are: samples whose structure is wrong, missing image files, a number of `<image>` placeholders in the human
  turns other than the number of images, more than `max_images` images, no human turn, and no answer to train on.
  `processes` share the work where it is enough for that.
  """
  records = records.outlines()
  parts = [range(start, min(start + CHECKED, len(records))) for start in range(0, len(records), CHECKED)]
  if processes == 1 or len(parts) < 4:
    return [line for part in parts for line in check_part(records, part, max_images)]
  # Not forked: a process that runs JAX has threads, whose locks would be copied as they are.
  context = multiprocessing.get_context("spawn")
  with context.Pool(min(processes, len(parts)), _remember, (records,)) as pool:
    found = pool.imap(_check_remembered, [(part, max_images) for part in parts])
    return [line for lines in found for line in lines]


def check_part(records: Records, part: Iterable[int], max_images: int) -> list[tuple[int, str]]:
  """What `check` says of some samples."""
  problems = []
  for i in part:
    try:
      sample = records[i]
    except DataError as error:
      problems.append((i, str(error)))
    else:
      problems += [(i, f"{sample.name}: {problem.text}") for problem in sample_problems(sample, max_images)]
  return problems


def _remember(records: Records) -> None:
  global _records
  _records = records


def _check_remembered(work: tuple[range, int]) -> list[tuple[int, str]]:
  return check_part(_records, *work)


def sample_problems(sample: Sample, max_images: int) -> list[Problem]:
  """What is wrong with one well-formed sample, images not decoded."""
  problems = []
  for image in sample.images:
    if isinstance(image, str) and locate(image) is None:
      problems.append(
        Problem(
          "missing image", f"image {image} is missing; restore the file, set data.image_folder, or take the sample out"
        )
      )
  mismatch = placeholder_problem(sample.turns, len(sample.images))
  if mismatch:
    problems.append(Problem("placeholders", mismatch))
  if len(sample.images) > max_images:
    text = f"has {len(sample.images)} images, and a row has room for {max_images}; raise data.max_images"
    problems.append(Problem("too many images", text))
  roles = [turn.role for turn in sample.turns]
  if "human" not in roles:
    problems.append(Problem("no question", "has no human turn; add the question or take the sample out"))
  if "gpt" not in roles or not any([turn.text for turn in sample.turns if turn.role == "gpt"]):
    text = "has no answer that is not empty, so nothing to train on; add one or take the sample out"
    problems.append(Problem("no answer", text))
  return problems


def placeholder_problem(turns: Sequence[Turn], n_images: int) -> str:
  """What is wrong unless the human turns hold one `<image>` per image, else ""; in answers it is plain text."""
  placeholders = sum([turn.text.count(IMAGE_PLACEHOLDER) for turn in turns if turn.role == "human"])
  if placeholders == n_images:
    return ""
  return (
    f"{placeholders} {IMAGE_PLACEHOLDER} in the human turns but {n_images} images; "
    f"write one {IMAGE_PLACEHOLDER} for each image, and none in questions about no image"
  )


def _name(source: str, index: int, identity: Any) -> str:
  return f"{source}, sample {index}" + (f" ({str(identity)!r})" if identity is not None else "")


def _image_paths(value: Any) -> list[str]:
  """The paths under "image": a text, a list of texts, or nothing."""
  if value is None or value == "" or value == []:
    return []
  paths = [value] if isinstance(value, str) else value
  if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
    raise DataError(f"image is {value!r}; write a path or a list of paths")
  return paths


def _turns(conversation: Any) -> tuple[str | None, tuple[Turn, ...]]:
  """(system text or None, turns). Answers before the first question are dropped, as LLaVA drops them."""
  if not isinstance(conversation, list) or not all([isinstance(turn, dict) for turn in conversation]):
    raise DataError(
      f"conversations is a {type(conversation).__name__}, not a list of objects; "
      "write [{'from': 'human', 'value': ...}, {'from': 'gpt', 'value': ...}]"
    )
  system, turns, number = None, [], 0
  try:
    for number, raw in enumerate(conversation):
      role, text = _role_and_text(raw)
      if role == "system":
        if number != 0:
          raise DataError("a system turn must be the first; move it there")
        system = text
      elif turns and turns[-1].role == role:
        raise DataError(f"two {role} turns follow one another; join them or take one out")
      elif turns or role == "human":
        turns.append(Turn(role, text, _text(raw, "category") if "category" in raw else ""))
  except DataError as error:
    raise DataError(f"turn {number}: {error}") from error
  return system, tuple(turns)


def _role_and_text(raw: dict) -> tuple[str, str]:
  """The turn's role in our words and its text, from either pair of keys in use."""
  keys = ("role", "content") if "role" in raw else ("from", "value")
  role = raw.get(keys[0])
  if not isinstance(role, str) or role not in ROLES:
    raise DataError(f"unknown role {role!r}; use one of {', '.join(ROLES)}")
  if keys[1] not in raw:
    raise DataError(f"has no {keys[1]!r}; write the turn's text there")
  return ROLES[role], _text(raw, keys[1])


def _text(raw: dict, key: str) -> str:
  """raw[key] as text that can be tokenized; "" where the key is absent."""
  value = raw.get(key, "")
  if not isinstance(value, str):
    raise DataError(f"{key} is a {type(value).__name__}; write a text")
  if value.isascii():
    return value
  try:
    value.encode("utf-8")
  except UnicodeEncodeError as error:  # JSON may hold half of a surrogate pair: "\ud83d" alone
    raise DataError(f"{key} holds half a character ({error.object[error.start]!r}); write the text again") from error
  return value
