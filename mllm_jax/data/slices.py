"""Slices: LLaVA-UHD's way with pictures of any shape and size, without padding and without bending them.

A picture becomes an overview of its own shape and, where it has more pixels than the vision tower was trained on, the
slices of a grid that suits its shape and size. Every crop has about the tower's area and sides that are multiples of
the patch. The arithmetic is the released code's (which takes at most 7 slices in training and 9 in evaluation; the
paper says 6): sizes, pixels and the order of the visual tokens are the same.

One limit is ours. A crop has at most `max_patches` patches, because rounding up to one patch a side would let very thin
pictures (beyond about 600 to 1) grow without bound.
"""

import math
from typing import NamedTuple

import numpy as np
from PIL import Image

from mllm_jax.config import ConfigError, VisionConfig
from mllm_jax.data.records import DataError

ORGANISATIONS = ("spatial", "slices")
SEPARATORS = (29892, 13)  # "," and "\n" of Llama's vocabulary; the released code uses them with Qwen2 too


class Plan(NamedTuple):
  """What a picture becomes; sizes are (width, height) in pixels. Without slices, all but the overview is 0."""

  overview: tuple[int, int]
  columns: int
  rows: int
  slice: tuple[int, int]


def max_patches(vision: VisionConfig) -> int:
  """Patches of a crop at most: as many as the area of the tower's square holds (CLIP at 336 pixels: 576; SigLIP at 384
  pixels: 752, more than its 27 x 27 whole patches).
  """
  return vision.image_size**2 // vision.patch_size**2


def plan(width: int, height: int, vision: VisionConfig, max_slices: int) -> Plan:
  """How a picture is cut. With max_slices=1 it never is (stage 1 of the training).

  Raises DataError for a picture without pixels, or so thin that a crop would pass the limit above.
  """
  if width < 1 or height < 1:
    raise DataError(f"an image of {width} x {height} pixels has nothing to show; remove its sample")
  overview = _resized(width, height, vision)
  wanted = min(math.ceil(width * height / vision.image_size**2), max_slices)
  if wanted <= 1:
    sizes = Plan(overview, 0, 0, (0, 0))
  else:
    columns, rows = _grid(width, height, wanted, max_slices)
    # A cell of the picture whose sides are shortened to multiples of the grid.
    cell = max(width // columns, 1), max(height // rows, 1)
    sizes = Plan(overview, columns, rows, _resized(*cell, vision))
  for side_x, side_y in (sizes.overview, *[sizes.slice] * (sizes.columns > 0)):
    patches = (side_x // vision.patch_size) * (side_y // vision.patch_size)
    if not 1 <= patches <= max_patches(vision):
      raise DataError(
        f"an image of {width} x {height} pixels is too thin: no crop of its shape has 1 to {max_patches(vision)} "
        "patches; crop or pad it, or remove its sample"
      )
  return sizes


def _grid(width: int, height: int, wanted: int, max_slices: int) -> tuple[int, int]:
  """(columns, rows) of about `wanted` slices whose shape is nearest to the picture's, by the logarithm of the ratio."""
  counts = [count for count in (wanted - 1, wanted, wanted + 1) if 1 < count <= max_slices]
  grids = [(columns, count // columns) for count in counts for columns in range(1, count + 1) if count % columns == 0]
  ratio = math.log(width / height)
  return min(grids, key=lambda grid: abs(ratio - math.log(grid[0] / grid[1])))  # the first of equals


def _resized(width: int, height: int, vision: VisionConfig) -> tuple[int, int]:
  """The size of the tower's area and this shape, each side cut to a multiple of the patch but for the first patch.

  (0, 0) where the shape is so thin that a side would be under one pixel.
  """
  ratio = width / height
  scaled_height = int(vision.image_size / math.sqrt(ratio))
  scaled_width = int(scaled_height * ratio)
  if scaled_width < 1 or scaled_height < 1:
    return 0, 0
  patch = vision.patch_size
  return max(scaled_width // patch, 1) * patch, max(scaled_height // patch, 1) * patch


def crops_of(width: int, height: int, vision: VisionConfig, max_slices: int) -> int:
  """How many crops a picture becomes: its slices and the overview."""
  sizes = plan(width, height, vision, max_slices)
  return sizes.columns * sizes.rows + 1


def crop(image: Image.Image, vision: VisionConfig, max_slices: int) -> list[np.ndarray]:
  """An RGB picture as crops, uint8 [height, width, 3] each: the slices row by row, all of one size, then the overview.

  Raises DataError as `plan` does.
  """
  sizes = plan(*image.size, vision, max_slices)
  overview = np.asarray(image.resize(sizes.overview, Image.Resampling.BICUBIC), np.uint8)
  if not sizes.columns:
    return [overview]
  (width, height), columns, rows = sizes.slice, sizes.columns, sizes.rows
  whole = np.asarray(image.resize((columns * width, rows * height), Image.Resampling.BICUBIC), np.uint8)
  slices = whole.reshape(rows, height, columns, width, 3).swapaxes(1, 2).reshape(-1, height, width, 3)
  return [*slices, overview]


def long_side(size: tuple[int, int], length: int) -> tuple[int, int]:
  """The size (width, height) of the same shape whose longer side is `length`, up or down (the released code takes 1024
  for pictures of TextVQA).
  """
  width, height = size
  if width > height:
    return length, max(int(length / width * height), 1)
  return max(int(length / height * width), 1), length


def to_area(size: tuple[int, int], area: int) -> tuple[int, int]:
  """The size (width, height) of the same shape with about `area` pixels.

  With six times the tower's area, most pictures give six slices.
  """
  width, height = size
  scale = math.sqrt(area / height / width)  # in the released order, on which the last pixel may depend
  return max(int(width * scale), 1), max(int(height * scale), 1)


def table_rows(
  columns: int,
  rows: int,
  organisation: str,
  tokens_per_crop: int = 144,
  separators: tuple[int, int] = SEPARATORS,
) -> tuple[np.ndarray, np.ndarray]:
  """What stands at each place of a picture: two int32 arrays [N], (rows, tokens).

  A visual token is row k of the picture's own table (crops in `crop`'s order, times tokens of a crop) with token 0; a
  separator is row -1 with its token's id. An unsliced picture (columns and rows 0) is just its overview's tokens.

  organisation:
    "spatial": the tokens of all slices as the rows of one map, as they lie in the picture, each row ended by a newline;
      then one separator; then the overview (the paper's).
    "slices": slice after slice, each followed by a comma, or by a newline where its row ends; then the overview
      (the code released for Qwen2).
  separators: ids of (comma, newline).

  Raises ConfigError for another organisation, and for tokens that are no square map where a map is needed.
  """
  _check_organisation(organisation, tokens_per_crop)
  count = columns * rows
  table = np.arange((count + 1) * tokens_per_crop, dtype=np.int32).reshape(count + 1, tokens_per_crop)
  if not count:
    return table[0], np.zeros(tokens_per_crop, np.int32)
  comma, newline = separators
  ends = np.full((rows, columns), comma, np.int32)  # after each slice
  ends[:, -1] = newline
  if organisation == "slices":
    lines, line_ends = table[:-1], ends.ravel()
  else:
    edge = math.isqrt(tokens_per_crop)
    lines = table[:-1].reshape(rows, columns, edge, edge).swapaxes(1, 2).reshape(rows * edge, columns * edge)
    line_ends = np.full(rows * edge, newline, np.int32)
  places = np.pad(lines, ((0, 0), (0, 1)), constant_values=-1).ravel()
  tokens = np.concatenate([np.zeros_like(lines), line_ends[:, None]], axis=1).ravel()
  if organisation == "spatial":  # the separator before the overview is what follows the first slice
    places, tokens = np.append(places, np.int32(-1)), np.append(tokens, ends[0, 0])
  return np.concatenate([places, table[-1]]), np.concatenate([tokens, np.zeros(tokens_per_crop, np.int32)])


def length(columns: int, rows: int, organisation: str, tokens_per_crop: int = 144) -> int:
  """How many places `table_rows` fills. Raises ConfigError as it does."""
  _check_organisation(organisation, tokens_per_crop)
  if not columns * rows:
    return tokens_per_crop
  if organisation == "slices":
    return columns * rows * (tokens_per_crop + 1) + tokens_per_crop
  edge = math.isqrt(tokens_per_crop)
  return rows * edge * (columns * edge + 1) + 1 + tokens_per_crop


def _check_organisation(organisation: str, tokens_per_crop: int) -> None:
  if organisation not in ORGANISATIONS:
    raise ConfigError(f"projector.organisation={organisation!r} is unknown; known: {', '.join(ORGANISATIONS)}")
  if organisation == "spatial" and math.isqrt(tokens_per_crop) ** 2 != tokens_per_crop:
    raise ConfigError(
      f"{tokens_per_crop} tokens of a crop are no square map, which the organisation 'spatial' lays out; "
      "use 'slices', or a square number of tokens"
    )
