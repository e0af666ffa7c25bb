"""Batch: the one thing that crosses from host to device.

Letters used all over the project: B batch rows, S sequence, K crops per row, P patches per crop, p pixels along a
patch, C vision width, T visual tokens per crop, D decoder width, H heads, N head width, V vocabulary, F feed-forward
width, L layers, R LoRA rank.
"""

import dataclasses
from typing import Any

import jax

NEWLINE = -2  # in visual_index: the token that ends a row of tiles


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
  """Rows of fixed shape. NumPy arrays on the host, jax arrays on the device.

  tokens         int32   [B, S]           token ids; 0 where a visual token or padding stands
  targets        int32   [B, S]           the id that position s must predict (already shifted); 0 where none
  loss_weights   float32 [B, S]           1 where the prediction is trained on, 0 elsewhere
  segment_ids    int32   [B, S]           1, 2, ...: the sample a place belongs to; 0: padding
  positions      int32   [B, S]           rotary position, restarting at 0 in every sample
  visual_index   int32   [B, S]           -1: a text token; k: row k of this row's K*T visual tokens; -2 (NEWLINE):
                                          the token that ends a row of tiles
  patches        uint8   [B, K, P, 3 p p] crops as decoded and resized, cut into patches: rows * columns of them row by
                                          row, each its pixels row by row, colours last; normalised on the device
  grids          int32   [B, K, 2]        patches (rows, columns) of each crop; 0 0: an unused crop
  """

  tokens: Any
  targets: Any
  loss_weights: Any
  segment_ids: Any
  positions: Any
  visual_index: Any
  patches: Any
  grids: Any
