"""LLaVA-SP's projector: what each spatial token is made of, and where its details come from (paper, figure 5)."""

import math

import jax
import numpy as np

from mllm_jax.config import ProjectorConfig
from mllm_jax.models.mllm import Mllm
from mllm_jax.models.projectors.maps import map_sizes, pooling_matrix, windows
from mllm_jax.models.projectors.spatial import DFI_STRIDE
from mllm_jax.visualization import crops, pictures
from mllm_jax.visualization.crops import NARROW, Crop
from mllm_jax.visualization.page import Figure, Section

TILE = 168  # pixels of a tile of a montage, at least
LEAST = 6  # pixels between lines that are worth drawing


def sections(model: Mllm, crop: Crop) -> list[Section]:
  """The features of one crop, its spatial tokens' maps, and their attention to details where there is any."""
  found = [crops.features(crop), _maps(model.config.projector, crop)]
  if model.projector.dfi is not None:
    found.append(_details(model, crop))
  return found


def _windows(config: ProjectorConfig, crop: Crop) -> Section:
  grid, size, step = crop.grid[0], config.window, math.ceil(TILE / config.window)
  shown = crop.enlarged(step)[None]
  cut = np.asarray(windows(shown, size * step, tuple(stride * step for stride in config.window_strides)))[0]
  hues = pictures.hues(len(cut))
  tiles = [pictures.badge(tile, 6, 6, str(k), hue) for k, (tile, hue) in enumerate(zip(cut, hues, strict=True))]
  across = (grid - size) // config.window_strides[1] + 1
  text = (
    f"{len(cut)} spatial tokens, 0 to {len(cut) - 1}: windows of {size} patches along each side, convolved to a token "
    "each by one kernel."
  )
  figure = Figure("maps", pictures.montage(tiles, across), "What each spatial token sees", "As they lie on the crop.")
  return Section("Spatial tokens", text, [[figure]])


def _maps(config: ProjectorConfig, crop: Crop) -> Section:
  if config.sfe == "windows":
    return _windows(config, crop)
  grid = crop.grid[0]
  sizes = map_sizes(config, grid)
  hues = pictures.hues(len(sizes))
  draw = _pools if config.maps == "pooling" else _squares
  tiles = [
    pictures.badge(tile, 6, 6, str(k), hue) for k, (tile, hue) in enumerate(zip(draw(crop, sizes), hues, strict=True))
  ]
  row = [Figure("maps", pictures.montage(tiles, 4), "What each spatial token sees", "From the smallest map on.")]
  listed = ", ".join(str(size) for size in sizes)
  if config.maps == "pooling":
    text = (
      f"{len(sizes)} spatial tokens, 0 to {len(sizes) - 1}: the whole map of patches pooled to {listed} cells along "
      "each side, shown by its colours, and each made into one token."
    )
    return Section("Spatial tokens", text, [row])
  step = 2 * crop.step if NARROW // len(sizes) < 40 else crop.step
  nested = crop.enlarged(step)
  for size, hue in reversed(list(zip(sizes, hues))):
    start = (grid - size) // 2 * step
    nested = pictures.box(nested, start, start, start + size * step, start + size * step, hue)
  for k, (size, hue) in enumerate(zip(sizes, hues)):
    nested = pictures.badge(nested, (grid + size) // 2 * step - 26, (grid - size) // 2 * step + 4, str(k), hue)
  text = (
    f"{len(sizes)} spatial tokens, 0 to {len(sizes) - 1}: squares of {listed} patches along each side around the "
    "centre, each made into one token."
  )
  return Section("Spatial tokens", text, [[Figure("squares", nested, "The squares on the crop"), *row]])


def _squares(crop: Crop, sizes: tuple[int, ...]) -> list[np.ndarray]:
  """Each square as a tile."""
  grid, step = crop.grid[0], math.ceil(TILE / crop.grid[0])
  shown = crop.enlarged(step)
  starts = [(grid - size) // 2 * step for size in sizes]
  cut = [shown[start : start + size * step, start : start + size * step] for start, size in zip(starts, sizes)]
  return [pictures.resized(square, grid * step, grid * step) for square in cut]


def _pools(crop: Crop, sizes: tuple[int, ...]) -> list[np.ndarray]:
  """The crop's colours pooled as the features are, a tile for each size."""
  grid, step = crop.grid[0], math.ceil(TILE / crop.grid[0])
  shown = crop.enlarged(step).reshape(grid, step, grid, step, 3).mean((1, 3))
  tiles = []
  for size in sizes:
    matrix = pooling_matrix(grid, size)
    pooled = np.einsum("ij,jkc,lk->ilc", matrix, shown, matrix)
    cell = math.ceil(grid * step / size)
    tile = pictures.nearest((pooled + 0.5).astype(np.uint8), cell)
    borders = [i * cell for i in range(1, size)]
    tile = pictures.lines(tile, borders, borders, pictures.FAINT, width=1) if cell >= LEAST else tile
    tiles.append(pictures.resized(tile, grid * step, grid * step))
  return tiles


@jax.jit
def _attention(projector, patch_map):
  return projector.dfi.attention(projector.sfe(patch_map), projector.dfi.details(patch_map))


def attention(model: Mllm, crop: Crop) -> np.ndarray:
  """How much each spatial token takes of each place of the detail map, float32 [n, m, m]; each of n sums to 1."""
  weights = np.asarray(_attention(model.projector, crop.features.reshape(1, *crop.grid, -1)))[0]
  side = math.isqrt(weights.shape[-1])
  return weights.reshape(-1, side, side)


def warmth(weights: np.ndarray, width: int, height: int) -> np.ndarray:
  """Attention [m, m] over a picture, from 0 where it is least to 1 where it is most; even attention is 0 everywhere."""
  spread = float(weights.max() - weights.min())
  if spread < 1e-6 * float(weights.max()):
    return np.zeros((height, width), np.float32)
  return (pictures.heat(weights, width, height) - weights.min()) / spread


def _details(model: Mllm, crop: Crop) -> Section:
  found, grid = attention(model, crop), crop.grid[0]
  hues, step = pictures.hues(len(found)), math.ceil(TILE / crop.grid[0])
  shown = crop.enlarged(step)
  tiles = [
    pictures.badge(pictures.overlay(shown, warmth(weights, grid * step, grid * step)), 6, 6, str(k), hue)
    for k, (weights, hue) in enumerate(zip(found, hues))
  ]
  side, kernel = found.shape[-1], model.config.projector.dfi_kernel
  text = (
    f"The detail map has {side} x {side} places, each a convolution of {kernel} x {kernel} patches, {DFI_STRIDE} "
    "patches apart. Each spatial token attends to it: bright is where it takes most from. Every picture has its own "
    "scale, from the token's least weight to its largest."
  )
  most = ", ".join(f"{weights.max():.3f}" for weights in found)
  caption = f"The largest weights are {most}; even attention is {1 / side**2:.3f}."
  figure = Figure("details", pictures.montage(tiles, 6), "Attention of each spatial token", caption)
  return Section("Detail features", text, [[figure]])
