"""Conversations: what a task shows and asks becomes turns and pictures.

Pictures stand at the front of their turn, in the task's order: the templates put them there in training too. Where a
task writes `<image>` into its question, that says no more than how many there are, and it is left out.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from PIL import Image

from mllm_jax.data.processor import as_picture
from mllm_jax.data.records import IMAGE_PLACEHOLDER, DataError, Turn

ROLES = {"user": "human", "assistant": "gpt"}


class Conversation(NamedTuple):
  """As `Processor.prompt` takes it."""

  turns: list[Turn]
  pictures: list[Image.Image]
  system: str | None = None


def of_text(text: str, visuals: Sequence[Any] | None) -> Conversation:
  """A question, and what is to be seen with it. Raises DataError where that is no picture."""
  pictures = [_picture(visual) for visual in visuals or []]
  return Conversation([Turn("human", _placed(text, len(pictures)))], pictures)


def of_messages(messages: Sequence[Mapping[str, Any]]) -> Conversation:
  """Chat messages: {"role": ..., "content": text, or [{"type": "text" or "image", ...}]}. Messages of one role in a row
  are one turn. Raises DataError where a part is neither text nor picture."""
  system, turns, pictures = [], [], []
  for message in messages:
    content = message["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    shown = [part for part in parts if part["type"] != "text"]
    for part in shown:
      if part["type"] != "image":
        raise DataError(f"it has a part of type {part['type']!r}; this model takes text and pictures")
    pictures += [_picture(part["url"]) for part in shown]
    text = "\n".join(part["text"] for part in parts if part["type"] == "text")
    if message["role"] == "system":
      system.append(text)
      continue
    role = ROLES[message["role"]]
    if role == "human":
      text = _placed(text, len(shown))
    if turns and turns[-1].role == role:
      text = f"{turns.pop().text}\n{text}"
    turns.append(Turn(role, text))
  return Conversation(turns, pictures, "\n".join(system) if system else None)


def _placed(text: str, count: int) -> str:
  return f"{IMAGE_PLACEHOLDER}\n" * count + text.replace(IMAGE_PLACEHOLDER, "").strip()


def _picture(visual: Any) -> Image.Image:
  if not isinstance(visual, Image.Image | str | os.PathLike):
    raise DataError(f"it shows a {type(visual).__name__}; this model takes text and pictures")
  return as_picture(visual)
