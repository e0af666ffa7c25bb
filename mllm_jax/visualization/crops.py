"""What every model does with an image: crops, and the places of their visual tokens in the text."""

import math
from typing import NamedTuple

import jax
import numpy as np

from mllm_jax.batch import NEWLINE
from mllm_jax.config import ConfigError
from mllm_jax.data.aspects import Aspect, Places
from mllm_jax.data.patches import patchify
from mllm_jax.models.mllm import Mllm
from mllm_jax.visualization import pictures
from mllm_jax.visualization.page import Figure, Section

WIDE, NARROW = 700, 360  # pixels along the longer side of a large figure and of a small one
CELLS = range(7, 17)  # pixels of a place in the map of the sequence
SEPARATOR = (136, 136, 136, 255)


class Crop(NamedTuple):
  """A crop and what the tower makes of it.

  number: of it among the crops. pixels: uint8 [H, W, 3]. grid: (h, w) patches. patches: normalised, float32
  [1, h w, 3 p p]. features: [1, h w, C]. grids: int32 [1, 2].
  """

  number: int
  pixels: np.ndarray
  grid: tuple[int, int]
  patches: jax.Array
  features: jax.Array
  grids: np.ndarray

  @property
  def map(self) -> np.ndarray:
    """The features as a map, float32 [h, w, C]."""
    return np.asarray(self.features[0], np.float32).reshape(*self.grid, -1)

  @property
  def step(self) -> int:
    """Pixels of a patch along each side in a small figure."""
    return max(1, round(NARROW / max(self.grid)))

  def enlarged(self, step: int) -> np.ndarray:
    """What of it is in patches, each of step x step pixels."""
    (rows, columns), side = self.grid, math.isqrt(self.patches.shape[-1] // 3)
    return pictures.resized(self.pixels[: rows * side, : columns * side], columns * step, rows * step)


@jax.jit
def _encode(model: Mllm, patches, grids):
  images = model.vision.normalise(patches)
  return images, model.vision(images, grids)


def encode(model: Mllm, crops: list[np.ndarray], number: int) -> Crop:
  """Crop `number` through the tower. Raises ConfigError where there is none of that number."""
  if not 0 <= number < len(crops):
    raise ConfigError(f"--crop={number}: the image becomes {len(crops)} crops, 0 to {len(crops) - 1}")
  pixels, side = crops[number], model.config.vision.patch_size
  grid = pixels.shape[0] // side, pixels.shape[1] // side
  grids = np.array([grid], np.int32)
  images, features = _encode(model, patchify(pixels, side)[None], grids)
  return Crop(number, pixels, grid, images, features, grids)


def mosaic(crops: list[np.ndarray], aspect: Aspect, size: tuple[int, int]) -> tuple[np.ndarray, int, int]:
  """The crops but for the whole one put together again, (picture, columns, rows); without any the whole one, 1, 1."""
  columns, rows = aspect.tiling(*size)
  if not columns:
    return crops[aspect.whole], 1, 1
  parts = np.stack([crop for k, crop in enumerate(crops) if k != aspect.whole % len(crops)])
  height, width = parts.shape[1:3]
  whole = parts.reshape(rows, columns, height, width, 3).swapaxes(1, 2)
  return whole.reshape(rows * height, columns * width, 3), columns, rows


def slicing(crops: list[np.ndarray], aspect: Aspect, size: tuple[int, int]) -> Section:
  """The slices on the image, and the overview beside."""
  picture, columns, rows = mosaic(crops, aspect, size)
  whole, hues = aspect.whole % len(crops), pictures.hues(len(crops))
  overview = pictures.fitted(crops[whole], NARROW)
  overview = pictures.box(overview, 0, 0, overview.shape[1], overview.shape[0], hues[whole])
  height, width = crops[whole].shape[:2]
  side = aspect.vision.patch_size
  sizes = lambda w, h: f"{w} x {h} pixels, {w // side} x {h // side} patches."
  row = [Figure("overview", overview, f"The whole image, crop {whole}", sizes(width, height))]
  if columns * rows > 1:
    shown = pictures.fitted(picture, WIDE)
    height, width = shown.shape[:2]
    xs, ys = [i * width / columns for i in range(columns + 1)], [i * height / rows for i in range(rows + 1)]
    shown = pictures.lines(shown, xs[1:-1], ys[1:-1])
    numbers = [k for k in range(len(crops)) if k != whole]
    for place, k in enumerate(numbers):
      shown = pictures.badge(shown, xs[place % columns] + 4, ys[place // columns] + 4, str(k), hues[k])
    height, width = picture.shape[:2]
    cut = f"{columns} x {rows} of {sizes(width // columns, height // rows)}"
    row.insert(0, Figure("slices", shown, "Slices", cut))
  made = f"an image of {size[0]} x {size[1]} pixels becomes {len(crops)} {'crop' if len(crops) == 1 else 'crops'}."
  return Section("Crops", f"This is what the vision tower sees: {made} The numbers are those of --crop.", [row])


def reading_order(places: Places, tokens: int, before: int, whole: int) -> list[np.ndarray]:
  """The places of an image line by line as they are drawn: a list of their numbers, each int [n].

  A line ends after a separator, and between the tokens before the patches, the whole image's patches, and those of
  slices; the whole image's are cut into lines of their square map, if it is one. tokens: of a crop; before: how many of
  them come before its patches; whole: the number of the crop with the whole image.
  """
  visual = places.rows >= 0
  summary = visual & (places.rows % tokens < before)
  part = np.where(visual, 1 + 2 * summary + (places.rows // tokens == whole), 0)
  ends = (~visual)[:-1] | ((part[1:] != part[:-1]) & visual[1:])
  lines = np.split(np.arange(len(part)), np.flatnonzero(ends) + 1)
  edge = math.isqrt(tokens - before)
  if edge * edge != tokens - before:
    return lines
  cut = lambda line: np.split(line, range(edge, len(line), edge))
  return [short for line in lines for short in (cut(line) if part[line[0]] == 2 else [line])]


def layout(places: Places, aspect: Aspect, crops: int, before: int) -> Section:
  """Which place of the sequence comes from which crop."""
  tokens, whole = aspect.tokens_per_crop, aspect.whole % crops
  lines, hues = reading_order(places, tokens, before, whole), pictures.hues(crops)
  longest = max(map(len, lines))
  size = min(max(NARROW // longest, CELLS.start), CELLS.stop - 1)
  canvas = np.zeros((len(lines) * size, longest * size, 4), np.uint8)
  core = (slice(size // 4, -(size // 4)),) * 2
  for row, line in enumerate(lines):
    for column, place in enumerate(line):
      cell = canvas[row * size : (row + 1) * size - 1, column * size : (column + 1) * size - 1]
      if places.rows[place] < 0:
        cell[core] = SEPARATOR
        continue
      cell[:] = (*hues[places.rows[place] // tokens], 255)
      if places.rows[place] % tokens < before:
        cell[core] = 255
  separators = int((places.rows < 0).sum())
  kinds = "learned newlines" if (places.rows == NEWLINE).any() else "separators of the text's vocabulary"
  count = f"{len(places.rows):,} places: {crops} x {tokens} visual tokens"
  if (used := len(places.rows) - separators) != crops * tokens:
    count = f"{len(places.rows):,} places: {used:,} visual tokens"
  count += f", and {separators} {kinds} (the small gray squares)." if separators else "."
  text = "The image's places in the text, read from left to right and from top to bottom, in the colours of the crops"
  text += "; a white core marks spatial tokens." if before else "."
  return Section("Visual tokens", text, [[Figure("tokens", canvas, "The sequence", count)]])


def features(crop: Crop) -> Section:
  """The patch grid of a crop, and its features' principal components."""
  step = crop.step
  xs, ys = ([i * step for i in range(1, cells)] for cells in (crop.grid[1], crop.grid[0]))
  grid = pictures.lines(crop.enlarged(step), xs, ys, pictures.FAINT, width=1) if step >= 8 else crop.enlarged(step)
  shown = pictures.nearest(pictures.pca_picture(crop.map, pictures.components(crop.map)), step)
  rows, columns = crop.grid
  return Section(
    f"Features of crop {crop.number}",
    "The tower's features of each patch: their first three principal components as red, green and blue.",
    [
      [
        Figure("patches", grid, "Patches", f"{columns} x {rows} of them."),
        Figure("features", shown, "Features", "Patches that are alike have like colours."),
      ]
    ],
  )
