"""Layout: which token, or which visual token, stands at which place of a row.

A projector makes a table of visual tokens for each row. Here every image placeholder becomes a run of indices into that
table, so that on the device one gather puts the visual tokens between the text's embeddings.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mllm_jax.data.chat import IMAGE_TOKEN_INDEX, Encoded


class RowArrays(NamedTuple):
  """One row's places, each [S]; the fields mean what they mean in `mllm_jax.batch.Batch`."""

  tokens: np.ndarray  # int32
  targets: np.ndarray  # int32
  loss_weights: np.ndarray  # float32
  segment_ids: np.ndarray  # int32
  positions: np.ndarray  # int32
  visual_index: np.ndarray  # int32


PADDING = RowArrays(tokens=0, targets=0, loss_weights=0, segment_ids=0, positions=0, visual_index=-1)
DTYPES = RowArrays(np.int32, np.int32, np.float32, np.int32, np.int32, np.int32)


def expand(
  encoded: Encoded,
  tokens_per_image: Sequence[int],
  max_length: int | None = None,
  table_rows: np.ndarray | None = None,
  table_tokens: np.ndarray | None = None,
) -> RowArrays:
  """Puts each image's visual tokens in the place of its placeholder, then cuts the row to `max_length` places.

  Place s is weighted 1 if place s + 1 is still in the row and is trained on.

  Args:
    encoded: ids with a placeholder for each image, and which of them are trained on.
    tokens_per_image: visual tokens of each image, in the order of the placeholders.
    max_length: places kept; None keeps all.
    table_rows: for all visual tokens in their order, which row of the row's visual-token table each one is,
      `batch.NEWLINE`, or -1 where a token of the vocabulary stands between them; None takes the table's rows in order.
    table_tokens: those tokens, 0 elsewhere; None where there are none.

  Returns:
    Arrays of length S = min(max_length, text + visual tokens), without padding.

  Raises:
    ValueError: the number of placeholders is not the number of images, or that of table_rows not that of the tokens.
  """
  is_image = encoded.ids == IMAGE_TOKEN_INDEX
  if is_image.sum() != len(tokens_per_image):
    raise ValueError(f"{is_image.sum()} image placeholders but {len(tokens_per_image)} images")
  repeats = np.ones(len(encoded.ids), np.int64)
  repeats[is_image] = tokens_per_image
  if table_rows is None:
    table_rows = np.arange(sum(tokens_per_image), dtype=np.int32)
  if len(table_rows) != sum(tokens_per_image):
    raise ValueError(f"{len(table_rows)} rows of the table for {sum(tokens_per_image)} visual tokens")
  is_visual = np.repeat(is_image, repeats)[:max_length]
  tokens = np.where(is_visual, 0, np.repeat(encoded.ids, repeats)[:max_length]).astype(np.int32)
  trained_on = np.repeat(encoded.trained_on & ~is_image, repeats)[:max_length]
  visual_index = np.full(len(tokens), -1, np.int32)
  visual_index[is_visual] = table_rows[: is_visual.sum()]
  if table_tokens is not None:
    tokens[is_visual] = table_tokens[: is_visual.sum()]

  length = len(tokens)
  targets, loss_weights = np.zeros(length, np.int32), np.zeros(length, np.float32)
  targets[:-1] = np.where(trained_on[1:], tokens[1:], 0)
  loss_weights[:-1] = trained_on[1:]
  return RowArrays(
    tokens, targets, loss_weights, np.ones(length, np.int32), np.arange(length, dtype=np.int32), visual_index
  )


def pad(row: RowArrays, length: int) -> RowArrays:
  """The row with padding on the right up to `length` places. Raises ValueError if it is longer."""
  missing = length - len(row.tokens)
  if missing < 0:
    raise ValueError(f"a row of {len(row.tokens)} places cannot be padded to {length}")
  return RowArrays(
    *(np.pad(values, (0, missing), constant_values=fill) for values, fill in zip(row, PADDING, strict=True))
  )


def take_segment(row: RowArrays, segment: int, table_start: int) -> RowArrays:
  """The places of a row of one sample, without padding, as segment number `segment` of a row shared with others.

  table_start: where the sample's visual tokens begin in the shared row's table.
  """
  used = row.segment_ids > 0
  row = RowArrays(*(values[used] for values in row))
  return row._replace(
    segment_ids=np.full_like(row.segment_ids, segment),
    visual_index=np.where(row.visual_index >= 0, row.visual_index + np.int32(table_start), row.visual_index),
  )
