"""Chat: from turns to token ids, and which of them are trained on.

A template turns a conversation into pieces of text that already know whether they are trained on. The text between
two image placeholders is tokenized in one go, so that the ids are those of the released code, and the offsets of the
tokens say which piece each belongs to. The released code instead searches the finished prompt for its separators and
counts tokens again; it loses a whole sample when an answer contains a separator, or when two ways of tokenizing
differ in length.
"""

from collections.abc import Sequence

import numpy as np

from mllm_jax.data import templates
from mllm_jax.data.records import DataError, Turn, placeholder_problem
from mllm_jax.data.templates import TEMPLATES, VICUNA_SYSTEM, Template, plain, vicuna_v1  # noqa: F401
from mllm_jax.data.tokenizer import (  # noqa: F401
  CUT,
  DECODER_TYPES,
  END,
  IMAGE,
  TOKENIZER_FILES,
  VOCABULARY_FILES,
  ChatTokenizer,
  Encoded,
  Piece,
  copy_tokenizer,
  hf_tokenizer,
  load_tokenizer,
)

IMAGE_TOKEN_INDEX = -200  # stands in the ids where an image's visual tokens will be; LLaVA's number


def encode(
  turns: Sequence[Turn], template: str, tokenizer: ChatTokenizer, n_images: int, system: str | None = None
) -> Encoded:
  """Token ids of a conversation, and which of them are trained on.

  Args:
    turns: human and gpt turns in alternation, human first. `<image>` in a human turn is a placeholder, moved to the
      turn's front; in an answer it is text.
    template: a name in TEMPLATES.
    tokenizer: from `load_tokenizer`.
    n_images: images of the conversation, which must be as many as its placeholders.
    system: replaces the template's system text; None keeps it.

  Raises:
    DataError: unknown template, or one that needs tokens which the tokenizer does not have; turns that do not
      alternate, placeholders that do not match the images.
  """
  found = templates.find(template)
  encoded = _encode_pieces(conversation(turns, template, tokenizer, n_images, system), tokenizer)
  if found.always_trained:
    encoded.trained_on[np.isin(encoded.ids, found.always_trained_ids(tokenizer))] = True
  return encoded


def conversation(
  turns: Sequence[Turn], template: str, tokenizer: ChatTokenizer, n_images: int, system: str | None = None
) -> list[Piece]:
  """The pieces of a conversation before they are tokenized. Arguments and errors as in `encode`."""
  found = templates.find(template)
  for i, turn in enumerate(turns):
    expected = ("human", "gpt")[i % 2]
    if turn.role != expected:
      raise DataError(
        f"turn {i} is of {turn.role!r} where one of {expected!r} is due; turns alternate and begin with 'human'"
      )
  problem = placeholder_problem(turns, n_images)
  if problem:
    raise DataError(problem)
  return found.pieces(turns, system, tokenizer)


def stretches(pieces: Sequence[Piece], tokenizer: ChatTokenizer) -> tuple[bool, list[list[Piece]]]:
  """(whether a beginning-of-sequence token leads, the pieces before, between and behind the images).

  Each stretch is tokenized as a text of its own.
  """
  named = [tokenizer.token_id(piece.text) for piece in pieces[:1] if piece.kind == "special"]
  found: list[list[Piece]] = [[]]
  for piece in pieces:
    if piece.kind == "image":
      found.append([])
    else:
      found[-1].append(piece)
  return tokenizer.bos_id not in (None, *named), found


def encode_prompt(
  turns: Sequence[Turn], template: str, tokenizer: ChatTokenizer, n_images: int, system: str | None = None
) -> np.ndarray:
  """int32 [N]: ids of a conversation up to where its next answer begins. Arguments and errors as in `encode`.

  Raises:
    DataError: also if the last turn is not a human one.
  """
  if not turns or turns[-1].role != "human":
    raise DataError("the last turn is not a question; end the conversation with a human turn")
  return encode([*turns, Turn("gpt", "")], template, tokenizer, n_images, system).ids


def end_id(template: str, tokenizer: ChatTokenizer) -> int:
  """The id that ends an answer. Raises DataError where the tokenizer does not fit the template."""
  return templates.find(template).end_id(tokenizer)


def _encode_pieces(pieces: Sequence[Piece], tokenizer: ChatTokenizer) -> Encoded:
  leads, found = stretches(pieces, tokenizer)
  parts = [_untrained(tokenizer.bos_id)] if leads else []
  for number, stretch in enumerate(found):
    if number:
      parts.append(_untrained(IMAGE_TOKEN_INDEX))
    parts.append(tokenizer.encode_chunk(stretch))
  return Encoded(*(np.concatenate(field) for field in zip(*parts, strict=True)))


def _untrained(token: int) -> Encoded:
  return Encoded(np.array([token], np.int32), np.array([False]))
