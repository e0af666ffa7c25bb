"""Records: LLaVA's JSON and JSON Lines files, read into Samples, and a check that finds bad ones before a run does.

A sample of such a file:

  {"id": "000000033471", "image": "coco/train2017/000000033471.jpg",
   "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": "A bus."}]}
"""

import dataclasses
import json
import os
from collections.abc import Sequence
from typing import Any

IMAGE_PLACEHOLDER = "<image>"
ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}


class DataError(ValueError):
  """Data that cannot be used; the message names the file, the sample's index and id, the value and the remedy."""


@dataclasses.dataclass(frozen=True)
class Turn:
  """One turn of a conversation. `category` is what an evaluation counts this answer under ("" if nothing)."""

  role: str  # "human" or "gpt"
  text: str
  category: str = ""


@dataclasses.dataclass(frozen=True)
class Sample:
  """One conversation and the images it is about.

  id: the file's own id as text; the sample's index where the file gives none.
  index: place in the file, from 0.
  images: paths, already joined to the image folder, in the order of the placeholders.
  turns: beginning with a human one, roles alternating.
  category: what an evaluation counts the sample under ("" if nothing).
  system: replaces the template's system text; None keeps it.
  source: the file it came from.
  """

  id: str
  index: int
  images: tuple[str, ...]
  turns: tuple[Turn, ...]
  category: str = ""
  system: str | None = None
  source: str = ""

  @property
  def name(self) -> str:
    """How errors call this sample: "data/train.json, sample 1234 ('000000033471')"."""
    return _name(self.source, self.index, self.id)


class Records(Sequence):
  """The samples of one file, in its order. Its dicts are kept as they are; a Sample is built when asked for."""

  def __init__(self, raw: list[Any], source: str, image_folder: str):
    self._raw = raw
    self.source = source
    self.image_folder = image_folder

  @classmethod
  def load(cls, path: str, image_folder: str) -> "Records":
    """Reads a JSON list, or JSON Lines where the name ends in .jsonl; joins relative image paths to `image_folder`.

    Raises:
      DataError: the file is missing, unreadable, neither of the two formats, or holds no sample.
    """
    try:
      with open(path, encoding="utf-8-sig") as file:  # -sig: files saved on Windows begin with a byte order mark
        raw = _read_lines(file, path) if path.endswith(".jsonl") else json.load(file)
    except FileNotFoundError:
      raise DataError(f"{path}: no such file; set data.path to a LLaVA JSON or JSON Lines file") from None
    except OSError as error:
      raise DataError(
        f"{path}: cannot be read ({error.strerror}); set data.path to a LLaVA JSON or JSON Lines file"
      ) from error
    except json.JSONDecodeError as error:
      hint = "; JSON Lines files must be named .jsonl" if error.msg == "Extra data" else ""
      raise DataError(
        f"{path}: not JSON (line {error.lineno}: {error.msg}){hint or '; write it again as a JSON list'}"
      ) from error
    except UnicodeDecodeError as error:
      raise DataError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    if not isinstance(raw, list):
      raise DataError(
        f"{path}: holds a JSON {type(raw).__name__} where a list of samples is needed; put the samples in [...]"
      )
    if not raw:
      raise DataError(f"{path}: holds no samples; set data.path to a file with at least one")
    return cls(raw, path, image_folder)

  def __len__(self) -> int:
    return len(self._raw)

  def __getitem__(self, i: int) -> Sample:
    """Sample i. Raises IndexError past the end, DataError if its structure is not a LLaVA sample's."""
    raw = self._raw[i]
    index = i + len(self) if i < 0 else i
    name = _name(self.source, index, raw.get("id", index) if isinstance(raw, dict) else None)
    if not isinstance(raw, dict):
      raise DataError(
        f"{name}: is a {type(raw).__name__} where an object is needed; write {{'id': ..., 'conversations': [...]}}"
      )
    identity = raw.get("id", index)
    if isinstance(identity, bool) or not isinstance(identity, str | int):
      raise DataError(f"{name}: id is a {type(identity).__name__}; write a text or an integer")
    system, turns = _turns(raw.get("conversations"), name)
    images = tuple(os.path.join(self.image_folder, path) for path in _image_paths(raw.get("image"), name))
    return Sample(str(identity), index, images, turns, _text(raw, "category", name), system, self.source)


def check(records: Records, *, max_images: int) -> list[str]:
  """Looks for everything that would stop a run, without decoding images. Returns one line per problem, in file order.

  Found are: samples whose structure is wrong, missing image files, a number of `<image>` placeholders in the human
  turns other than the number of images, more than `max_images` images, no human turn, and no answer to train on.
  """
  problems = []
  for i in range(len(records)):
    try:
      sample = records[i]
    except DataError as error:
      problems.append(str(error))
    else:
      problems += [f"{sample.name}: {problem}" for problem in sample_problems(sample, max_images)]
  return problems


def sample_problems(sample: Sample, max_images: int) -> list[str]:
  """What `check` reports about one well-formed sample, without its name."""
  problems = []
  for path in sample.images:
    if not os.path.isfile(path):
      problems.append(f"image {path} is missing; restore the file, set data.image_folder, or take the sample out")
  mismatch = placeholder_problem(sample.turns, len(sample.images))
  if mismatch:
    problems.append(mismatch)
  if len(sample.images) > max_images:
    problems.append(f"has {len(sample.images)} images, and a row has room for {max_images}; raise data.max_images")
  if not any(turn.role == "human" for turn in sample.turns):
    problems.append("has no human turn; add the question or take the sample out")
  if not any(turn.role == "gpt" and turn.text for turn in sample.turns):
    problems.append("has no answer that is not empty, so nothing to train on; add one or take the sample out")
  return problems


def placeholder_problem(turns: Sequence[Turn], n_images: int) -> str:
  """What is wrong unless the human turns hold one `<image>` per image, else ""; in answers it is plain text."""
  placeholders = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns if turn.role == "human")
  if placeholders == n_images:
    return ""
  return (
    f"{placeholders} {IMAGE_PLACEHOLDER} in the human turns but {n_images} images; "
    f"write one {IMAGE_PLACEHOLDER} for each image, and none in questions about no image"
  )


def _name(source: str, index: int, identity: Any) -> str:
  return f"{source}, sample {index}" + (f" ({str(identity)!r})" if identity is not None else "")


def _read_lines(file, path: str) -> list[Any]:
  """The objects of a JSON Lines file; blank lines are nothing."""
  raw = []
  for number, line in enumerate(file, start=1):
    if line.strip():
      try:
        raw.append(json.loads(line))
      except json.JSONDecodeError as error:
        raise DataError(f"{path}: line {number} is not JSON ({error.msg}); write one object on each line") from error
  return raw


def _image_paths(value: Any, name: str) -> list[str]:
  """The paths under "image": a text, a list of texts, or nothing."""
  if value is None or value == "" or value == []:
    return []
  paths = [value] if isinstance(value, str) else value
  if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
    raise DataError(f"{name}: image is {value!r}; write a path or a list of paths")
  return paths


def _turns(conversation: Any, name: str) -> tuple[str | None, tuple[Turn, ...]]:
  """(system text or None, turns). Answers before the first question are dropped, as LLaVA drops them."""
  if not isinstance(conversation, list) or not all(isinstance(turn, dict) for turn in conversation):
    raise DataError(
      f"{name}: conversations is a {type(conversation).__name__}, not a list of objects; "
      "write [{'from': 'human', 'value': ...}, {'from': 'gpt', 'value': ...}]"
    )
  system, turns = None, []
  for number, raw in enumerate(conversation):
    turn_name = f"{name}, turn {number}"
    role, text = _role_and_text(raw, turn_name)
    if role == "system":
      if number != 0:
        raise DataError(f"{turn_name}: a system turn must be the first; move it there")
      system = text
    elif turns and turns[-1].role == role:
      raise DataError(f"{turn_name}: two {role} turns follow one another; join them or take one out")
    elif turns or role == "human":
      turns.append(Turn(role, text, _text(raw, "category", turn_name)))
  return system, tuple(turns)


def _role_and_text(raw: dict, name: str) -> tuple[str, str]:
  """The turn's role in our words and its text, from either pair of keys in use."""
  keys = ("role", "content") if "role" in raw else ("from", "value")
  role = raw.get(keys[0])
  if not isinstance(role, str) or role not in ROLES:
    raise DataError(f"{name}: unknown role {role!r}; use one of {', '.join(ROLES)}")
  if keys[1] not in raw:
    raise DataError(f"{name}: has no {keys[1]!r}; write the turn's text there")
  return ROLES[role], _text(raw, keys[1], name)


def _text(raw: dict, key: str, name: str) -> str:
  """raw[key] as text that can be tokenized; "" where the key is absent."""
  value = raw.get(key, "")
  if not isinstance(value, str):
    raise DataError(f"{name}: {key} is a {type(value).__name__}; write a text")
  try:
    value.encode("utf-8")
  except UnicodeEncodeError as error:  # JSON may hold half of a surrogate pair: "\ud83d" alone
    raise DataError(
      f"{name}: {key} holds half a character ({error.object[error.start]!r}); write the text again"
    ) from error
  return value
