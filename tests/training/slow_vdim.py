"""The stack of two up-sampling stages (VDIM 4x) written out tap by tap, as the loss's goldens were made with: square
maps, no dropout, float32. Parameters are under their released names.
"""

import jax
import jax.numpy as jnp
import numpy as np

RADIUS = 3


def conv(parameters, name, x):
  """A 1 x 1 convolution of a map [h, w, c]."""
  return x @ parameters[f"{name}.weight"][:, :, 0, 0].T + parameters[f"{name}.bias"]


def average_matrix(target, source):
  """Adaptive average pooling along one axis."""
  matrix = np.zeros((target, source))
  for place in range(target):
    start, end = place * source // target, -(-(place + 1) * source // target)
    matrix[place, start:end] = 1 / (end - start)
  return matrix.astype(np.float32)


def cubic_matrix(target, source):
  """Bicubic interpolation along one axis, a = -0.75, ends repeated."""
  matrix, a = np.zeros((target, source)), -0.75
  for place in range(target):
    position = (place + 0.5) * source / target - 0.5
    first = int(np.floor(position))
    for tap in range(first - 1, first + 3):
      x = abs(position - tap)
      weight = ((a + 2) * x - (a + 3)) * x * x + 1 if x <= 1 else ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
      matrix[place, min(max(tap, 0), source - 1)] += weight
  return matrix.astype(np.float32)


def along_axes(matrix, x):
  return jnp.einsum("yh,xw,hwc->yxc", matrix, matrix, x)


def neighbours(x):
  """The 49 neighbours of each cell: [h, w, 49, c]."""
  height, width, _ = x.shape
  padded = jnp.pad(x, ((RADIUS, RADIUS), (RADIUS, RADIUS), (0, 0)), mode="reflect")
  return jnp.stack([padded[i : i + height, j : j + width] for i in range(7) for j in range(7)], axis=2)


def stage(parameters, name, source, image):
  """One stage: source [h, h, C], image [L, L, 3] -> [2h, 2h, C]."""
  size = 2 * len(source)
  guidance = along_axes(average_matrix(size, len(image)), image)
  keys = conv(parameters, f"{name}.range_proj.0", guidance)
  keys = conv(parameters, f"{name}.range_proj.3", jax.nn.gelu(keys, approximate=False))
  temperature = jnp.clip(jnp.exp(parameters[f"{name}.range_temp"]), 1e-4, 1e4)
  alike = jax.nn.softmax(temperature * jnp.einsum("hwpc,hwc->hwp", neighbours(keys), keys), axis=-1)
  offsets = np.linspace(-1, 1, 7)
  apart = (offsets[:, None] ** 2 + offsets**2).ravel()
  weights = alike * jnp.exp(-apart / (2 * parameters[f"{name}.sigma_spatial"] ** 2))
  weights = weights / jnp.maximum(weights.sum(-1, keepdims=True), 1e-7)
  hidden = conv(parameters, f"{name}.fixup_proj.0", jnp.concatenate([weights, guidance], axis=-1))
  weights = weights + 0.1 * conv(parameters, f"{name}.fixup_proj.3", jax.nn.gelu(hidden, approximate=False))
  return jnp.einsum("hwp,hwpc->hwc", weights, neighbours(along_axes(cubic_matrix(size, len(source)), source)))


def levels(parameters, features, image):
  """(2x, 4x) maps as the loss sees them: the second stage does not teach the first."""
  twice = stage(parameters, "up1", features, image)
  four = stage(parameters, "up2", jax.lax.stop_gradient(twice), image)
  return twice, four + 0.1 * conv(parameters, "fixup_proj.1", four)
