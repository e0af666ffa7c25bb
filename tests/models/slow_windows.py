"""RoI-align and window attention written plainly, in float64 with loops, from their definitions."""

import itertools
import math

import numpy as np


def align_axis(length: int, start: float, size: float, bins: int) -> np.ndarray:
  """What each cell of an axis weighs in each bin, float64 [bins, length]: the mean of ceil(size / bins) samples, each
  interpolated linearly between cells at integers; samples before -1 or after `length` count as zero."""
  weights = np.zeros((bins, length))
  size = max(size, 1.0)
  samples = math.ceil(size / bins - 1e-9)
  for bin, sample in itertools.product(range(bins), range(samples)):
    at = start + (bin + (sample + 0.5) / samples) * size / bins
    if at < -1 or at > length + 1e-9:
      continue
    at = min(max(at, 0.0), length - 1.0)
    low = int(at)
    weights[bin, low] += (1 - (at - low)) / samples
    weights[bin, min(low + 1, length - 1)] += (at - low) / samples
  return weights


def pool_windows(patch_map: np.ndarray, windows: int, rows: int, columns: int) -> np.ndarray:
  """[H, W, C] -> [windows, windows, rows * columns, C]."""
  height, width, channels = patch_map.shape
  pooled = np.zeros((windows, windows, rows, columns, channels))
  for i, j in itertools.product(range(windows), repeat=2):
    by_row = align_axis(height, i * height / windows, height / windows, rows)
    by_column = align_axis(width, j * width / windows, width / windows, columns)
    pooled[i, j] = np.einsum("yh,xw,hwc->yxc", by_row, by_column, patch_map)
  return pooled.reshape(windows, windows, rows * columns, channels)


def best_bins(height: int, width: int) -> tuple[int, int]:
  """(rows, columns) of selective pooling, the first of the best."""
  candidates = ((4, 2), (3, 2), (4, 3), (3, 3), (2, 4), (2, 3), (3, 4))
  columns, rows = min(candidates, key=lambda c: abs(math.log(width / height) - math.log(c[0] / c[1])))
  return rows, columns


def cubic_axis(target: int, source: int) -> np.ndarray:
  """Bicubic resizing with a = -0.75, border cells repeated, float64 [target, source]."""

  def kernel(x):
    x = abs(x)
    if x <= 1:
      return 1.25 * x**3 - 2.25 * x**2 + 1
    return -0.75 * x**3 + 3.75 * x**2 - 6 * x + 3 if x < 2 else 0.0

  weights = np.zeros((target, source))
  for place in range(target):
    at = (place + 0.5) * source / target - 0.5
    for cell in range(math.floor(at) - 1, math.floor(at) + 3):
      weights[place, min(max(cell, 0), source - 1)] += kernel(at - cell)
  return weights


def layer_norm(x: np.ndarray, gain: np.ndarray, offset: np.ndarray) -> np.ndarray:
  x = x - x.mean(-1, keepdims=True)
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * gain + offset


def softmax(x: np.ndarray) -> np.ndarray:
  x = np.exp(x - x.max(-1, keepdims=True))
  return x / x.sum(-1, keepdims=True)


def hiwin(w: dict[str, np.ndarray], maps: dict[int, np.ndarray], heads: int, side: int, bins: dict) -> np.ndarray:
  """Hiwin attention of one image step by step. w: parameters by their path in `HiwinAttention`; maps: {level: [H, W,
  C]}; bins: {level: (rows, columns)}. -> [side * side, D]."""
  w = {path: value.astype(np.float64) for path, value in w.items()}
  norm = lambda x, name: layer_norm(x, w[f"{name}/scale"], w[f"{name}/bias"])
  linear = lambda x, name: x @ w[f"{name}/kernel"] + w[f"{name}/bias"]
  positions = w["attention/pos_embed"]
  keys, values = [], []
  for index, (level, patch_map) in enumerate(maps.items()):
    cells = norm(linear(patch_map, f"attention/level_projectors/{index}"), "attention/key_norm")
    rows, columns = (cubic_axis(length, side) for length in patch_map.shape[:2])
    table = np.einsum("hy,wx,yxe->hwe", rows, columns, positions.reshape(side, side, -1))
    keys.append(pool_windows(cells + table + w["attention/level_embeddings"][index], side, *bins[level]))
    values.append(pool_windows(cells, side, *bins[level]))
  split = lambda x: x.reshape(*x.shape[:-1], heads, -1)
  keys, values = (np.concatenate(x, 2).reshape(side * side, -1, positions.shape[-1]) for x in (keys, values))
  keys, values = split(linear(keys, "attention/k_proj")), split(linear(values, "attention/v_proj"))
  query = norm(w["attention/queries"], "attention/query_norm") + positions
  query = split(linear(query, "attention/q_proj"))
  weights = softmax(np.einsum("qwhd,wthd->qwht", query, keys) / math.sqrt(query.shape[-1]))
  found = np.einsum("qwht,wthd->wqhd", weights, values)
  found = linear(found.reshape(*found.shape[:2], -1), "attention/out_proj")
  merged = linear(norm(found, "set_norm").reshape(found.shape[0], -1), "merge")
  return norm(merged, "out_norm") @ w["proj/kernel"]
