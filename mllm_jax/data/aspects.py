"""Aspects: the ways of making images of any shape fit the vision tower, `data.image_aspect`.

Each says how many crops an image becomes, what they show, and which visual tokens stand where in its place in the text.
"""

import dataclasses
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image

from mllm_jax.config import VisionConfig
from mllm_jax.data import dynamic_tiles, images, slices, tiles


class Places(NamedTuple):
  """What stands at each of the N places of an image.

  rows: int32 [N], the row of the image's own table of visual tokens (crop after crop), `batch.NEWLINE`, or -1 where a
    token of the text's vocabulary stands.
  tokens: int32 [N], that token; 0 elsewhere.
  """

  rows: np.ndarray
  tokens: np.ndarray


class Aspect(Protocol):
  """How images are made to fit.

  by_size: whether crops and places depend on an image's size. tokens_per_crop: T. patches: P, the most that a crop has.
  most_crops: how many an image can become. whole: which of the crops shows the whole image.
  """

  vision: VisionConfig
  tokens_per_crop: int
  patches: int
  most_crops: int
  whole: int
  by_size: bool

  def tiling(self, width: int, height: int) -> tuple[int, int]:
    """(columns, rows) in which the other crops, row by row, make up the image; (0, 0) if there are none."""

  def crops_of(self, width: int, height: int) -> int:
    """How many crops an image of this size becomes. Raises DataError for a size that cannot be used."""

  def places_of(self, width: int, height: int) -> int:
    """How many places it takes."""

  def places(self, width: int, height: int) -> Places:
    """What stands at them."""

  def crops(self, image: Image.Image) -> list[np.ndarray]:
    """The crops of an RGB image, each uint8 [H, W, 3]."""


@dataclasses.dataclass(frozen=True)
class Square:
  """The whole image, padded to a square (LLaVA-1.5), or, `cut`, the square that the tower's own preprocessing leaves of
  it (LLaVA, and the first stage of LLaVA-1.5)."""

  vision: VisionConfig
  tokens_per_crop: int
  cut: bool = False
  most_crops: int = 1
  whole: int = 0
  by_size: bool = False

  @property
  def patches(self) -> int:
    return self.vision.grid**2

  def tiling(self, width: int, height: int) -> tuple[int, int]:
    return 0, 0

  def crops_of(self, width: int, height: int) -> int:
    return 1

  def places_of(self, width: int, height: int) -> int:
    return self.tokens_per_crop

  def places(self, width: int, height: int) -> Places:
    return _table_only(np.arange(self.tokens_per_crop, dtype=np.int32))

  def crops(self, image: Image.Image) -> list[np.ndarray]:
    return [(images.crop_to_square if self.cut else images.preprocess)(image, self.vision)]


@dataclasses.dataclass(frozen=True)
class Anyres:
  """Square tiles and the whole image: LLaVA-1.6."""

  vision: VisionConfig
  tokens_per_crop: int
  most_crops: int = tiles.CROPS
  whole: int = 0
  by_size: bool = True

  @property
  def patches(self) -> int:
    return self.vision.grid**2

  def tiling(self, width: int, height: int) -> tuple[int, int]:
    return tiles.best_grid(width, height, self.vision.image_size)

  def crops_of(self, width: int, height: int) -> int:
    return tiles.crops_of(width, height, self.vision)

  def places_of(self, width: int, height: int) -> int:
    return len(self.places(width, height).rows)

  def places(self, width: int, height: int) -> Places:
    return _table_only(tiles.table_rows(width, height, self.vision, self.tokens_per_crop))

  def crops(self, image: Image.Image) -> list[np.ndarray]:
    return list(tiles.crop(image, self.vision))


@dataclasses.dataclass(frozen=True)
class Tiles:
  """Square tiles in a grid of nearly the image's shape, and the whole image after them: InternVL.

  frame: token ids before and after an image's tokens; () for none.
  """

  vision: VisionConfig
  tokens_per_crop: int
  max_tiles: int
  frame: tuple[int, ...]
  whole: int = -1
  by_size: bool = True

  @property
  def patches(self) -> int:
    return self.vision.grid**2

  @property
  def most_crops(self) -> int:
    return 1 if self.max_tiles == 1 else 1 + self.max_tiles

  def tiling(self, width: int, height: int) -> tuple[int, int]:
    grid = dynamic_tiles.best_grid(width, height, self.vision.image_size, self.max_tiles)
    return (0, 0) if grid == (1, 1) else grid

  def crops_of(self, width: int, height: int) -> int:
    return dynamic_tiles.crops_of(width, height, self.vision, self.max_tiles)

  def places_of(self, width: int, height: int) -> int:
    return self.crops_of(width, height) * self.tokens_per_crop + len(self.frame)

  def places(self, width: int, height: int) -> Places:
    rows = np.arange(self.crops_of(width, height) * self.tokens_per_crop, dtype=np.int32)
    if not self.frame:
      return _table_only(rows)
    start, end = self.frame
    return Places(np.pad(rows, 1, constant_values=-1), np.pad(np.zeros_like(rows), 1, constant_values=(start, end)))

  def crops(self, image: Image.Image) -> list[np.ndarray]:
    return dynamic_tiles.crop(image, self.vision, self.max_tiles)


@dataclasses.dataclass(frozen=True)
class Slices:
  """Slices of the image's own shape, and the whole image: LLaVA-UHD.

  organisation: "spatial" or "slices", as `slices.table_rows` has them. separators: token ids that end a slice, and a
  row. Raises ConfigError for an organisation that there is not, or that tokens_per_crop do not suit.
  """

  vision: VisionConfig
  tokens_per_crop: int
  max_slices: int
  organisation: str
  separators: tuple[int, int]
  whole: int = -1
  by_size: bool = True

  def __post_init__(self):
    slices.length(1, 1, self.organisation, self.tokens_per_crop)  # raises where the two do not go together

  @property
  def patches(self) -> int:
    return slices.max_patches(self.vision)

  @property
  def most_crops(self) -> int:
    return 1 if self.max_slices == 1 else 1 + self.max_slices

  def tiling(self, width: int, height: int) -> tuple[int, int]:
    plan = slices.plan(width, height, self.vision, self.max_slices)
    return plan.columns, plan.rows

  def crops_of(self, width: int, height: int) -> int:
    return slices.crops_of(width, height, self.vision, self.max_slices)

  def places_of(self, width: int, height: int) -> int:
    plan = slices.plan(width, height, self.vision, self.max_slices)
    return slices.length(plan.columns, plan.rows, self.organisation, self.tokens_per_crop)

  def places(self, width: int, height: int) -> Places:
    plan = slices.plan(width, height, self.vision, self.max_slices)
    return Places(*slices.table_rows(plan.columns, plan.rows, self.organisation, self.tokens_per_crop, self.separators))

  def crops(self, image: Image.Image) -> list[np.ndarray]:
    return slices.crop(image, self.vision, self.max_slices)


def _table_only(rows: np.ndarray) -> Places:
  return Places(rows, np.zeros_like(rows))
