"""Adaptive convolution with upsampling on flat maps: every pixel that comes out has a kernel of its own.

A cell of the source map becomes n x n pixels, each a weighted sum of the d x d cells around it, all channels alike. On
a flat map of width w the cell at (dy, dx) from place p is p + dy w + dx, whatever p is; so a run of places in a row
takes its windows from d stretches of the map, one for each dy, and is one product of a banded matrix with them. No
array has an entry for every pixel, tap and channel, and there is no border: a tap beyond the map must weigh 0. What a
convolution pads its map with is put into the weights instead, see `vdim.py`.
"""

import jax
import jax.numpy as jnp

from mllm_jax.models import flat

RUN = 16  # places in one product: longer runs multiply more zeros, shorter ones copy the source more often
RUNS_AT_ONCE = 16  # in one step of the loop; bounds the memory of windows
EXACT = jax.lax.Precision.HIGHEST  # float32 products also where the hardware would round to bfloat16 or TF32


@jax.custom_vjp
def adaptive_conv(source: jax.Array, weights: jax.Array, grid: jax.Array) -> jax.Array:
  """One map, upsampled: pixel (i, j) of cell p is the sum over dy, dx of weights[i, j, dy, dx, p] cell[p + (dy, dx)].

  source: [P, C], finite everywhere. weights: float32 [n, n, d, d, P] with d odd, the middle one the cell itself; those
  of cells beyond the map are 0. grid: int32 [2], (h, w). Returns the flat map of (n h, n w), [n * n * P, C], padding 0,
  in the type of source; products and sums are float32.
  """
  n, diameter, count = weights.shape[0], weights.shape[2], source.shape[0]
  starts = _starts(grid, diameter, count)
  rows = _with_margin(source, diameter)

  def step(_, operands):
    weights, start = operands
    window = _windows(rows, start, diameter)
    return None, jnp.einsum("rok,rkc->roc", _bands(weights), window, precision=EXACT).astype(source.dtype)

  _, cells = jax.lax.scan(step, None, (_by_step(weights, starts.shape), starts))
  return flat.from_cells(cells.reshape(-1, n * n, source.shape[1])[:count], grid, n)


def _forward(source: jax.Array, weights: jax.Array, grid: jax.Array):
  return adaptive_conv(source, weights, grid), (source, weights, grid)


def _backward(residuals, cotangent: jax.Array):
  source, weights, grid = residuals
  (count, width), n, diameter = source.shape, weights.shape[0], weights.shape[2]
  starts = _starts(grid, diameter, count)
  rows = _with_margin(source, diameter)
  lines, valid = (_padded_places(x, starts.shape) for x in flat.lines_of_cells(grid, count, n))
  cotangent_lines = cotangent.reshape(n * count, n * width)
  margin = RUN + diameter - 1

  def step(gradient, operands):
    weights, start, line, is_cell = operands
    window = _windows(rows, start, diameter)
    pixels = jnp.where(is_cell[..., None, None], cotangent_lines[line], 0).astype(jnp.float32)
    pixels = pixels.reshape(window.shape[0], -1, width)
    band_gradient = jnp.einsum("roc,rkc->rok", pixels, window, precision=EXACT)
    window_gradient = jnp.einsum("rok,roc->rkc", _bands(weights), pixels, precision=EXACT)
    window_gradient = window_gradient.reshape(*start.shape, margin, width)
    gradient = gradient.at[start[..., None] + jnp.arange(margin)].add(window_gradient)
    return gradient, _from_bands(band_gradient, n * n, diameter)

  operands = (_by_step(weights, starts.shape), starts, lines, valid)
  gradient, weight_gradients = jax.lax.scan(step, jnp.zeros(rows.shape, jnp.float32), operands)
  return gradient[margin : margin + count].astype(source.dtype), _from_steps(weight_gradients, weights.shape), None


adaptive_conv.defvjp(_forward, _backward)


def _steps(count: int) -> tuple[int, int]:
  """(steps, runs in a step) that cover `count` places."""
  runs = -(-count // RUN)
  steps = -(-runs // RUNS_AT_ONCE)
  return steps, -(-runs // steps)


def _with_margin(source: jax.Array, diameter: int) -> jax.Array:
  """The map between margins of zeros that hold a whole stretch: where one that weighs nothing may lie."""
  margin = RUN + diameter - 1
  return jnp.pad(source, ((margin, margin), (0, 0)))


def _starts(grid: jax.Array, diameter: int, count: int) -> jax.Array:
  """Where the stretches of each run begin in the map with its margins, int32 [steps, runs, d]."""
  steps, runs = _steps(count)
  first = jnp.arange(steps * runs, dtype=jnp.int32).reshape(steps, runs, 1) * RUN
  margin, radius = RUN + diameter - 1, diameter // 2
  start = first + jnp.arange(-radius, radius + 1, dtype=jnp.int32) * grid[1] - radius
  return jnp.clip(start + margin, 0, count + margin)


def _windows(rows: jax.Array, starts: jax.Array, diameter: int) -> jax.Array:
  """The stretches at starts [runs, d], one after another: float32 [runs, d * (RUN + d - 1), C]."""
  size = (RUN + diameter - 1, rows.shape[1])
  take = jax.vmap(jax.vmap(lambda start: jax.lax.dynamic_slice(rows, (start, 0), size)))
  return take(starts).reshape(starts.shape[0], -1, rows.shape[1]).astype(jnp.float32)


def _padded_places(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """x [P, ...] -> [steps, runs, RUN, ...], what is added being 0."""
  steps, runs = shape[:2]
  x = jnp.pad(x, ((0, steps * runs * RUN - x.shape[0]), *[(0, 0)] * (x.ndim - 1)))
  return x.reshape(steps, runs, RUN, *x.shape[1:])


def _by_step(weights: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Weights [n, n, d, d, P] -> [steps, n * n, d, d, runs, RUN]."""
  steps, runs = shape[:2]
  n, _, diameter, _, count = weights.shape
  weights = jnp.pad(weights, ((0, 0),) * 4 + ((0, steps * runs * RUN - count),))
  return jnp.moveaxis(weights.reshape(n * n, diameter, diameter, steps, runs, RUN), 3, 0)


def _from_steps(weights: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """The transpose of `_by_step`, to this shape of weights."""
  weights = jnp.moveaxis(weights, 0, 3)
  return weights.reshape(*weights.shape[:3], -1)[..., : shape[-1]].reshape(shape)


def _bands(weights: jax.Array) -> jax.Array:
  """The weights of a step, [n * n, d, d, runs, RUN], as banded matrices [runs, RUN * n * n, d * (RUN + d - 1)].

  A row of d weights is filled up to the length of a stretch and one more, and all rows are written one after another:
  read in lengths of a stretch, each lies one place further right than the one above.
  """
  pixels, diameter, _, runs, _ = weights.shape
  stretch = RUN + diameter - 1
  places = weights.transpose(3, 0, 1, 4, 2)
  skewed = jnp.pad(places, ((0, 0),) * 4 + ((0, stretch + 1 - diameter),)).reshape(runs, pixels, diameter, -1)
  skewed = skewed[..., : RUN * stretch].reshape(runs, pixels, diameter, RUN, stretch)
  return skewed.transpose(0, 3, 1, 2, 4).reshape(runs, RUN * pixels, diameter * stretch)


def _from_bands(bands: jax.Array, pixels: int, diameter: int) -> jax.Array:
  """The transpose of `_bands`: what lies on the bands, [n * n, d, d, runs, RUN]."""
  runs, stretch = bands.shape[0], RUN + diameter - 1
  skewed = bands.reshape(runs, RUN, pixels, diameter, stretch).transpose(0, 2, 3, 1, 4)
  skewed = jnp.pad(skewed.reshape(runs, pixels, diameter, -1), ((0, 0),) * 3 + ((0, RUN),))
  places = skewed.reshape(runs, pixels, diameter, RUN, stretch + 1)[..., :diameter]
  return places.transpose(1, 2, 4, 0, 3)
