"""Tiles: LLaVA-1.6's way with pictures of any shape (`anyres`, `spatial_unpad`), as the scripts of LLaVA-SP use it.

A picture becomes the whole picture, squeezed into one square, and the tiles of a grid that suits its shape. Their
visual tokens are laid out as one map, without the borders that padding added, and with a token for the end of each row.
The arithmetic is the released code's: pixels and places are the same.
"""

import math

import numpy as np
from PIL import Image

from mllm_jax.config import VisionConfig
from mllm_jax.data.records import DataError

# (columns, rows) in the order of LLaVA-1.6's image_grid_pinpoints, which settles ties.
GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
CROPS = 1 + max(columns * rows for columns, rows in GRIDS)  # of a picture at most: the whole one and its tiles


def best_grid(width: int, height: int, tile: int) -> tuple[int, int]:
  """(columns, rows) of the grid of square tiles that keeps most of a picture's pixels, and then wastes least."""

  def merit(grid):
    columns, rows = grid
    scale = min(columns * tile / width, rows * tile / height)
    kept = min(int(width * scale) * int(height * scale), width * height)
    return kept, kept - columns * rows * tile * tile

  return max(GRIDS, key=merit)  # the first of equals


def crop(image: Image.Image, vision: VisionConfig) -> np.ndarray:
  """An RGB picture as uint8 [1 + tiles, image_size, image_size, 3]: the whole one first, then the tiles row by row.

  The whole picture is resized without regard to its shape; for the tiles it is fitted into the grid, on black.
  """
  tile = vision.image_size
  columns, rows = best_grid(*image.size, tile)
  width, height = columns * tile, rows * tile
  by_width, by_height = width / image.width, height / image.height
  if by_width < by_height:
    size = width, min(math.ceil(image.height * by_width), height)
  else:
    size = min(math.ceil(image.width * by_height), width), height
  canvas = Image.new("RGB", (width, height))
  canvas.paste(image.resize(size, Image.Resampling.BICUBIC), ((width - size[0]) // 2, (height - size[1]) // 2))
  tiles = np.asarray(canvas, np.uint8).reshape(rows, tile, columns, tile, 3).swapaxes(1, 2).reshape(-1, tile, tile, 3)
  whole = np.asarray(image.resize((tile, tile), Image.Resampling.BICUBIC), np.uint8)
  return np.concatenate([whole[None], tiles])


def crops_of(width: int, height: int, vision: VisionConfig) -> int:
  """How many crops a picture becomes."""
  columns, rows = best_grid(width, height, vision.image_size)
  return 1 + columns * rows


def table_rows(width: int, height: int, vision: VisionConfig, tokens_per_crop: int) -> np.ndarray:
  """int32 [N]: which row of the picture's own table of visual tokens (crops times tokens of a crop) stands at each of
  its places, or NEWLINE.

  First come the tokens before the patches (LLaVA-SP's spatial tokens) of every crop, then the patches of the whole
  picture, then those of the tiles as rows of one map, each ended by a newline.
  """
  grid = vision.grid
  columns, rows = best_grid(width, height, vision.image_size)
  before = tokens_per_crop - grid * grid
  if before < 0:
    raise DataError(f"{tokens_per_crop} tokens of a crop are no map of {grid} x {grid}; use data.image_aspect=pad")
  starts = np.arange(1 + columns * rows, dtype=np.int32) * tokens_per_crop
  summaries = starts[:, None] + np.arange(before, dtype=np.int32)
  patches = np.arange(before, tokens_per_crop, dtype=np.int32).reshape(grid, grid)
  tiled = starts[1:].reshape(rows, 1, columns, 1) + patches[:, None, :]
  unpadded = _unpad(tiled.reshape(rows * grid, columns * grid), width, height)
  from mllm_jax.batch import NEWLINE  # with jax, which worker processes that measure do without

  lines = np.pad(unpadded, ((0, 0), (0, 1)), constant_values=NEWLINE)
  return np.concatenate([summaries.ravel(), patches.ravel(), lines.ravel()]).astype(np.int32)


def _unpad(tiled: np.ndarray, width: int, height: int) -> np.ndarray:
  """The part of a map that shows the picture, with the released code's rounding: the border is taken off evenly."""
  rows, columns = tiled.shape
  if width / height > columns / rows:
    border = (rows - int(height * (columns / width))) // 2
    return tiled[border : rows - border]
  border = (columns - int(width * (rows / height))) // 2
  return tiled[:, border : columns - border]
