"""LLaVA-UHD's projectors: the pyramid's levels (paper, figures 12 and 13), and the windows that become tokens."""

import jax
import numpy as np
from PIL import Image

from mllm_jax.models.mllm import Mllm
from mllm_jax.models.projectors import pyramid, windows
from mllm_jax.visualization import crops, pictures
from mllm_jax.visualization.crops import NARROW, Crop
from mllm_jax.visualization.page import Figure, Section

DETAIL = 240  # pixels along the longer side of a window
SETS = {"hiwin": "four sets of queries that a linear layer merges", "uhd_v1": "one query"}
LEAST = 6  # pixels between lines that are worth drawing
NAMES = {"vdim": "VDIM", "bilinear": "Bilinear", "deconv": "Deconvolution", "convnext": "ConvNeXt"}


def sections(model: Mllm, crop: Crop) -> list[Section]:
  """The pyramid and the windows of one crop."""
  config = model.config.projector
  if config.kind == "uhd_v1" or config.levels == (0,):
    plain = crops.features(crop)
    levels = plain._replace(
      text=plain.text + " This model has no pyramid: its tokens are made of these features alone."
    )
  else:
    levels = _pyramid(model, crop)
  return [levels, _windows(model, crop) if config.kind in SETS else _without_windows(model, crop)]


@jax.jit
def _maps(module, features, patches, grids):
  return module(features, patches, grids)


def level_maps(module, crop: Crop) -> dict[int, np.ndarray]:
  """What a pyramid makes of a crop: {level: float32 [2^level h, 2^level w, C]}."""
  maps = _maps(module, crop.features, crop.patches, crop.grids)
  height, width = crop.grid
  return {
    level: np.asarray(x[0], np.float32).reshape(height * 2**level, width * 2**level, -1) for level, x in maps.items()
  }


def _pyramid(model: Mllm, crop: Crop) -> Section:
  config = model.config.projector
  found, plain = level_maps(model.projector.pyramid, crop), level_maps(pyramid.Bilinear(config.levels), crop)
  finest = 2 ** max(config.levels)
  step = finest * max(1, round(NARROW / (max(crop.grid) * finest)))  # whole pixels for the finest cell
  own = config.pyramid == "convnext"  # which makes level 0 too, and has nothing to do with the tower's features
  shared = pictures.components(found[config.levels[0]] if own else crop.map)

  def figure(name: str, title: str, level: int, features: np.ndarray) -> Figure:
    height, width = features.shape[:2]
    shown = pictures.nearest(pictures.pca_picture(features, shared), step // 2**level)
    return Figure(f"{name}-{level}", shown, f"{title}, level {level}", f"{width} x {height} cells.")

  first = [Figure("crop", crop.enlarged(step), f"Crop {crop.number}")]
  rows = [first if own else [*first, figure("features", "Features", 0, crop.map)]]
  for level in config.levels if own else sorted(set(config.levels) - {0}):
    row = [figure("pyramid", NAMES[config.pyramid], level, found[level])]
    if config.pyramid not in ("bilinear", "convnext"):
      row.append(figure("bilinear", "Bilinear", level, plain[level]))
    rows.append(row)
  text = (
    f"The visual tokens are made of {'level' if len(config.levels) == 1 else 'levels'} "
    f"{', '.join(map(str, config.levels))}. Features as red, green and blue: their first three principal "
    f"components, taken from level {config.levels[0] if own else 0} and the same in all of these pictures."
  )
  if config.pyramid not in ("bilinear", "convnext"):
    text += " For comparison the same features upsampled bilinearly, which know nothing of the image's edges."
  return Section(f"Pyramid of crop {crop.number}", text, rows)


def window(grid: tuple[int, int], count: int, level: int, row: int, column: int) -> tuple[float, float, float, float]:
  """(left, top, right, bottom) of one of count x count windows of a level, in cells of the tower's grid (h, w). A
  window is at least one cell of its level long, and then the last ones reach past the map (`windows.Axis`)."""
  (height, width), least = grid, 2.0**-level
  left, top = column * width / count, row * height / count
  return left, top, left + max(width / count, least), top + max(height / count, least)


def _windows(model: Mllm, crop: Crop) -> Section:
  config = model.config.projector
  count, levels = config.query_grid, (0,) if config.kind == "uhd_v1" else config.levels
  chosen = busiest(crop, count)
  step = crop.step
  frame = [side * step for side in window(crop.grid, count, levels[0], *chosen)]
  shown = pictures.box(_grid_lines(crop, count), *frame, pictures.MARK)
  figures = [Figure("windows", shown, "Windows", f"{count} x {count}, one for each visual token of the crop.")]
  total = 0
  for level in levels:
    pooling = windows.make_pooling(config.pooling, count, level)
    rows, columns = (int(bins[0]) for bins in pooling.bins(crop.grids))
    left, top, right, bottom = (side * 2**level for side in window(crop.grid, count, level, *chosen))
    total += rows * columns
    caption = f"{right - left:.3g} x {bottom - top:.3g} cells (gray) pooled to {columns} x {rows} tokens."
    figures.append(
      Figure(f"window-{level}", _pooled(crop, count, level, chosen, (rows, columns)), f"Level {level}", caption)
    )
  text = (
    f"Window {chosen[1] + 1} from the left and {chosen[0] + 1} from the top, marked, is the one with most contrast: it "
    f"is pooled to {total} tokens ({config.pooling} pooling), which {SETS[config.kind]} attends to. One "
    "visual token comes of it."
  )
  return Section(f"Windows of crop {crop.number}", text, [figures])


def _without_windows(model: Mllm, crop: Crop) -> Section:
  count = model.config.projector.query_grid
  if model.config.projector.kind == "perceiver":
    text = f"Each of {count} x {count} queries attends to every cell of all levels, and becomes one visual token."
    return Section(f"Queries of crop {crop.number}", text, [])
  text = "Every level is resized to this grid bilinearly; a cell of all levels, side by side, becomes one visual token."
  figure = Figure("windows", _grid_lines(crop, count), "Cells", f"{count} x {count}.")
  return Section(f"Cells of crop {crop.number}", text, [[figure]])


def _grid_lines(crop: Crop, count: int) -> np.ndarray:
  """The crop, enlarged, with the borders of count x count equal windows."""
  shown = crop.enlarged(crop.step)
  height, width = shown.shape[:2]
  inner = range(1, count)
  thick = 2 if min(height, width) >= 40 * count else 1  # many lines with edges would hide the crop
  return pictures.lines(shown, [i * width / count for i in inner], [i * height / count for i in inner], width=thick)


def busiest(crop: Crop, count: int) -> tuple[int, int]:
  """(row, column) of the window in which the pixels differ most."""
  height, width = crop.pixels.shape[:2]

  def contrast(place):
    row, column = divmod(place, count)
    rows = slice(row * height // count, max((row + 1) * height // count, row * height // count + 1))
    columns = slice(column * width // count, max((column + 1) * width // count, column * width // count + 1))
    return crop.pixels[rows, columns].astype(np.float64).std((0, 1)).sum()

  return divmod(max(range(count * count), key=contrast), count)


def _pooled(crop: Crop, count: int, level: int, chosen: tuple[int, int], bins: tuple[int, int]) -> np.ndarray:
  """One window of the crop, enlarged: the level's cells as hairlines, the bins as lines."""
  side = crop.pixels.shape[0] / crop.grid[0]
  left, top, right, bottom = window(crop.grid, count, level, *chosen)
  scale = DETAIL / max(right - left, bottom - top)
  width, height = max(1, round((right - left) * scale)), max(1, round((bottom - top) * scale))
  past = int(side) + 1  # a window of less than a cell reaches past the map
  pixels = np.pad(crop.pixels, ((0, past), (0, past), (0, 0)))
  cut = tuple(edge * side for edge in (left, top, right, bottom))
  shown = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC, box=cut))
  if scale / 2**level >= LEAST:
    cells = lambda low, high: np.arange(np.floor(low * 2**level) + 1, np.ceil(high * 2**level)) / 2**level
    xs, ys = (cells(left, right) - left) * scale, (cells(top, bottom) - top) * scale
    shown = pictures.lines(shown, xs, ys, pictures.FAINT, width=1)
  rows, columns = bins
  inside = [i * width / columns for i in range(1, columns)], [i * height / rows for i in range(1, rows)]
  return pictures.box(pictures.lines(shown, *inside, pictures.MARK), 0, 0, width, height, pictures.MARK)
