"""Drawing with NumPy and Pillow: features as colours, heat maps, lines and badges on pictures.

Pictures are uint8 [H, W, 3]; a place on one is (x, y) in pixels, and a border at x lies between columns x - 1 and x.
"""

import colorsys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]
WHITE, INK, FAINT, MARK = (255, 255, 255), (20, 20, 22), (150, 150, 156), (255, 176, 32)
ROBUST = (1, 99)  # percentiles that become 0 and 255: single outliers must not take all of the range
# From nothing to everything, growing evenly in lightness so that it also reads without colours.
HEAT = np.array([(12, 8, 40), (84, 20, 110), (170, 40, 95), (232, 92, 48), (250, 176, 40), (252, 250, 190)], np.float64)


class Components(NamedTuple):
  """Three directions in a feature space and the range along each that is shown.

  mean: float64 [C]. directions: float64 [C, 3], orthonormal; zeros where there are fewer. low, high: float64 [3].
  """

  mean: np.ndarray
  directions: np.ndarray
  low: np.ndarray
  high: np.ndarray


def components(features: np.ndarray) -> Components:
  """The first three principal components of features [..., C], and the range of these features along them.

  The sign of a component is free; the largest number of each direction is made positive, so that one model always gets
  the same colours.
  """
  rows = features.reshape(-1, features.shape[-1]).astype(np.float64)
  mean = rows.mean(0)
  _, _, found = np.linalg.svd(rows - mean, full_matrices=False)
  directions = np.zeros((rows.shape[1], 3))
  count = min(3, len(found))
  directions[:, :count] = found[:count].T
  largest = np.abs(directions).argmax(0)
  directions *= np.where(directions[largest, range(3)] < 0, -1, 1)
  low, high = np.percentile((rows - mean) @ directions, ROBUST, axis=0)
  return Components(mean, directions, low, high)


def pca_picture(features: np.ndarray, shared: Components) -> np.ndarray:
  """Features [h, w, C] as a picture [h, w, 3]: along each component the range that is shown as 0..255, a component
  without any range as middle grey."""
  along = (features.astype(np.float64) - shared.mean) @ shared.directions
  span = shared.high - shared.low
  flat = span <= 1e-9 * max(span.max(), 1e-300)
  values = np.where(flat, 0.5, (along - shared.low) / np.where(flat, 1, span))
  return (255 * np.clip(values, 0, 1) + 0.5).astype(np.uint8)


def nearest(pixels: np.ndarray, factor: int) -> np.ndarray:
  """Every pixel as factor x factor of them."""
  return pixels.repeat(factor, axis=0).repeat(factor, axis=1)


def resized(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
  """Smoothly resized."""
  return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))


def fitted(pixels: np.ndarray, longer: int) -> np.ndarray:
  """The same shape with a longer side of so many pixels."""
  height, width = pixels.shape[:2]
  scale = longer / max(height, width)
  return resized(pixels, max(1, round(width * scale)), max(1, round(height * scale)))


def heat(weights: np.ndarray, width: int, height: int) -> np.ndarray:
  """A small map [h, w] upscaled bilinearly to float32 [height, width]. Where the size is a multiple of the map's, the
  mean stays what it was."""
  small = Image.fromarray(np.ascontiguousarray(weights, np.float32))
  return np.asarray(small.resize((width, height), Image.Resampling.BILINEAR))


def overlay(pixels: np.ndarray, warmth: np.ndarray) -> np.ndarray:
  """A picture in grey under a heat map: warmth float [H, W] in 0..1, clipped to it."""
  warmth = np.clip(warmth, 0, 1)[..., None]
  position = warmth[..., 0] * (len(HEAT) - 1)
  low = np.minimum(position.astype(int), len(HEAT) - 2)
  beyond = (position - low)[..., None]
  colour = HEAT[low] * (1 - beyond) + HEAT[low + 1] * beyond
  grey = pixels.astype(np.float64) @ (0.299, 0.587, 0.114)
  opacity = 0.35 + 0.35 * warmth
  return (grey[..., None] * (1 - opacity) + colour * opacity + 0.5).astype(np.uint8)


def hues(count: int) -> list[Colour]:
  """So many colours that neighbours in the list can be told apart, on light grounds and dark ones."""
  steps = [(0.58 + index * 0.381966) % 1 for index in range(count)]  # by the golden angle
  return [tuple(round(255 * part) for part in colorsys.hls_to_rgb(hue, 0.56, 0.62)) for hue in steps]


def lines(
  pixels: np.ndarray, xs: Sequence[float], ys: Sequence[float], colour: Colour = WHITE, width: int = 2
) -> np.ndarray:
  """The picture with lines from side to side, centred on borders at xs and ys. A dark edge sets off all but hairlines
  of 1 pixel from light ground."""
  drawn = pixels.copy()
  for tint, thick in ((INK, width + 2), (colour, width)) if width > 1 else ((colour, width),):
    for x in xs:
      drawn[:, _band(x, thick, drawn.shape[1])] = tint
    for y in ys:
      drawn[_band(y, thick, drawn.shape[0])] = tint
  return drawn


def _band(border: float, width: int, length: int) -> slice:
  """The `width` rows or columns around a border, all of them on the picture."""
  start = min(max(round(border) - width // 2, 0), max(length - width, 0))
  return slice(start, start + width)


def box(
  pixels: np.ndarray, left: float, top: float, right: float, bottom: float, colour: Colour, width: int = 3
) -> np.ndarray:
  """The picture with a frame just inside the borders."""
  image = Image.fromarray(pixels)
  draw = ImageDraw.Draw(image)
  corners = [round(left), round(top), max(round(right) - 1, round(left)), max(round(bottom) - 1, round(top))]
  draw.rectangle([corners[0] - 1, corners[1] - 1, corners[2] + 1, corners[3] + 1], outline=INK, width=width + 2)
  draw.rectangle(corners, outline=colour, width=width)
  return np.asarray(image)


def montage(tiles: Sequence[np.ndarray], columns: int, gap: int = 8) -> np.ndarray:
  """Pictures of one size in rows of `columns`, uint8 [H, W, 4], with nothing between them."""
  height, width = tiles[0].shape[:2]
  columns = min(columns, len(tiles))
  rows = -(-len(tiles) // columns)
  canvas = np.zeros((rows * (height + gap) - gap, columns * (width + gap) - gap, 4), np.uint8)
  for place, tile in enumerate(tiles):
    top, left = place // columns * (height + gap), place % columns * (width + gap)
    canvas[top : top + height, left : left + width, :3] = tile
    canvas[top : top + height, left : left + width, 3] = 255
  return canvas


def badge(pixels: np.ndarray, x: float, y: float, text: str, colour: Colour) -> np.ndarray:
  """The picture with a small label whose upper left corner is at (x, y), moved where it would leave the picture."""
  image = Image.fromarray(pixels)
  draw, font = ImageDraw.Draw(image), ImageFont.load_default(13)
  left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
  width, height = right - left + 12, bottom - top + 8
  x, y = max(0, min(round(x), image.width - width)), max(0, min(round(y), image.height - height))
  draw.rounded_rectangle([x, y, x + width - 1, y + height - 1], 5, fill=colour, outline=INK)
  draw.text((x + 6 - left, y + 4 - top), text, font=font, fill=INK)
  return np.asarray(image)
