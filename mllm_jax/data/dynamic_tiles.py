"""Dynamic tiles: InternVL's way with pictures of any shape (Chen et al. 2024, section 3.3), as in its released code.

A picture is squeezed into a grid of square tiles whose shape is the nearest to its own, and where that has several
tiles the whole picture, squeezed into one more, comes after them.
"""

import functools

import numpy as np
from PIL import Image

from mllm_jax.config import VisionConfig
from mllm_jax.data.records import DataError

START, END = "<img>", "</img>"  # stand around a picture's tokens, where the vocabulary has them


@functools.cache
def grids(most: int) -> tuple[tuple[int, int], ...]:
  """(columns, rows) of every grid of up to `most` tiles, small ones first."""
  found = [(columns, rows) for columns in range(1, most + 1) for rows in range(1, most // columns + 1)]
  return tuple(sorted(found, key=lambda grid: grid[0] * grid[1]))


def best_grid(width: int, height: int, tile: int, most: int) -> tuple[int, int]:
  """(columns, rows) of the grid of up to `most` tiles of `tile` x `tile` pixels whose shape is the nearest to the
  picture's; of equally near ones the largest of which the picture fills more than a half. Raises DataError for a
  picture without pixels."""
  if width < 1 or height < 1:
    raise DataError(f"a picture of {width} x {height} pixels cannot be used")
  shape, area = width / height, width * height
  best, nearest = (1, 1), float("inf")
  for columns, rows in grids(most):
    distance = abs(shape - columns / rows)
    if distance < nearest or (distance == nearest and area > 0.5 * tile * tile * columns * rows):
      best, nearest = (columns, rows), distance
  return best


def crop(image: Image.Image, vision: VisionConfig, most: int) -> list[np.ndarray]:
  """An RGB picture as crops, each uint8 [image_size, image_size, 3]: the tiles row by row, then the whole one, which is
  there once where it is the only tile."""
  tile = vision.image_size
  columns, rows = best_grid(*image.size, tile, most)
  squeeze = lambda *size: np.asarray(image.resize(size, Image.Resampling.BICUBIC), np.uint8)
  whole = squeeze(tile, tile)
  if columns * rows == 1:
    return [whole]
  pixels = squeeze(columns * tile, rows * tile)
  tiles = pixels.reshape(rows, tile, columns, tile, 3).swapaxes(1, 2).reshape(-1, tile, tile, 3)
  return [*tiles, whole]


def crops_of(width: int, height: int, vision: VisionConfig, most: int) -> int:
  """How many crops a picture becomes."""
  columns, rows = best_grid(width, height, vision.image_size, most)
  return 1 if columns * rows == 1 else columns * rows + 1
