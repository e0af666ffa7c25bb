"""VDIM, the learned joint bilateral upsampler of LLaVA-UHD v2 (section 3.2, eq. 8): patch features at 2, 4 and 8 times
the resolution, after the edges of the image.

A stage doubles the resolution. Each pixel of its result is a weighted mean of the 7 x 7 pixels around it in the
bicubically upsampled map; the weights come from how alike the image looks there (the range kernel), how far off it is
(the spatial kernel), and a small network that corrects the two. As released a stage computes in float32, whatever
comes in.

The map is never upsampled by itself: a bicubic pixel is a sum of cells, so the 7 x 7 weights of pixels become 7 x 7
weights of cells (`cell_weights`), which `adaptive_conv` applies to the small map. Weights and keys are held by place of
the small map, [2, 2, ..., P]: a pixel is one of the 2 x 2 of a cell, and its neighbours are at the same distance along
the flat map everywhere.

The released code reflects at the border, which takes at least 4 pixels along an axis, and raises where a map has a
single row or column. Here the border pixel is repeated along such an axis.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from mllm_jax.config import ConfigError
from mllm_jax.models import flat
from mllm_jax.models.adaptive_conv import EXACT, adaptive_conv
from mllm_jax.models.layers import Linear, uniform
from mllm_jax.models.projectors.maps import pooling_matrix

RADIUS = 3
TAPS = 2 * RADIUS + 1
KEY_WIDTH = 32
COLOURS = 3
KEY_DROPOUT, KERNEL_DROPOUT, FIXUP_DROPOUT = 0.1, 0.1, 0.2
FIXUP_SCALE = 0.1  # of both corrections: that of a stage's kernel and that of its result
LEAST_SUM = 1e-7  # the weights are divided by their sum, but by no less
TEMPERATURES = (1e-4, 1e4)
LEVELS = 3


def conv1x1(in_width: int, out_width: int, rngs: nnx.Rngs) -> Linear:
  """A 1 x 1 convolution with a bias, initialised as PyTorch does it."""
  init = uniform(1 / math.sqrt(in_width))
  return Linear(in_width, out_width, bias=True, rngs=rngs, kernel_init=init, bias_init=init)


def apply_to_channels(layer: Linear, x: jax.Array) -> jax.Array:
  """A linear layer on the last axis but one: [..., in, P] -> [..., out, P] float32."""
  return jnp.einsum("km,...kp->...mp", layer.kernel[...], x, precision=EXACT) + layer.bias[...][:, None]


def drop_channels(x: jax.Array, rate: float, key: jax.Array | None, axis: int) -> jax.Array:
  """Dropout of whole channels: with a key each slice along `axis` is zeroed with probability `rate`, or scaled up."""
  if key is None:
    return x
  shape = [1] * x.ndim
  shape[axis] = x.shape[axis]
  return x * (jax.random.bernoulli(key, 1 - rate, shape) / (1 - rate)).astype(x.dtype)


class Stage(nnx.Module):
  """One joint bilateral upsampling to twice the height and width. Its methods take one map; `jax.vmap` them.

  A pixel is (a, b, p): row a and column b of the 2 x 2 pixels of cell p. The guidance float32 [2, 2, 3, P] is the image
  averaged over each pixel. A tap is (i, j), the pixel i - 3 further down and j - 3 to the right.
  """

  def __init__(self, *, rngs: nnx.Rngs):
    taps = TAPS * TAPS
    self.range_proj = nnx.List([conv1x1(COLOURS, KEY_WIDTH, rngs), conv1x1(KEY_WIDTH, KEY_WIDTH, rngs)])
    self.fixup = nnx.List([conv1x1(taps + COLOURS, taps, rngs), conv1x1(taps, taps, rngs)])
    self.range_temp = nnx.Param(jnp.zeros(()))
    self.sigma_spatial = nnx.Param(jnp.ones(()))

  def range_kernel(self, guidance: jax.Array, grid: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """How alike each tap's key is to the pixel's own, a softmax over the taps: [2, 2, 7, 7, P] (eq. 8)."""
    first, second = self.range_proj
    hidden = jax.nn.gelu(apply_to_channels(first, guidance), approximate=False)
    keys = apply_to_channels(second, drop_channels(hidden, KEY_DROPOUT, key, axis=-2))
    scores = at_border(neighbour_scores(keys, grid), grid) * jnp.clip(jnp.exp(self.range_temp[...]), *TEMPERATURES)
    return jax.nn.softmax(scores, axis=(2, 3))

  def spatial_kernel(self) -> jax.Array:
    """A Gaussian of the distance in units of the radius, not normalised: [7, 7]."""
    square = jnp.square(jnp.linspace(-1, 1, TAPS))
    return jnp.exp(-(square[:, None] + square) / (2 * jnp.square(self.sigma_spatial[...])))

  def bilateral_kernel(self, guidance: jax.Array, grid: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """The product of both, with sum 1: [2, 2, 7, 7, P]."""
    kernel = self.range_kernel(guidance, grid, key) * self.spatial_kernel()[..., None]
    return kernel / jnp.maximum(kernel.sum((2, 3), keepdims=True), LEAST_SUM)

  def kernel(self, guidance: jax.Array, grid: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """The bilateral kernel with its correction, from which on weights may be negative: [2, 2, 7, 7, P]."""
    key, fixup_key = (None, None) if key is None else jax.random.split(key)
    bilateral = self.bilateral_kernel(guidance, grid, key)
    first, second = self.fixup
    weights = bilateral.reshape(2, 2, TAPS * TAPS, -1)
    hidden = apply_to_channels(first, jnp.concatenate([weights, guidance], axis=2))
    hidden = drop_channels(jax.nn.gelu(hidden, approximate=False), KERNEL_DROPOUT, fixup_key, axis=-2)
    return bilateral + FIXUP_SCALE * apply_to_channels(second, hidden).reshape(bilateral.shape)

  def __call__(
    self, source: jax.Array, guidance: jax.Array, grid: jax.Array, key: jax.Array | None = None
  ) -> jax.Array:
    """source [P, C] of (h, w) -> [4 P, C] of (2 h, 2 w), in the type of source. With a key, with dropout."""
    return adaptive_conv(source, cell_weights(self.kernel(guidance, grid, key), grid), grid)


# A pixel's taps by their rows and columns counted from the first of its cell: 3 both ways from row 0 and from row 1.
OFFSETS = range(-RADIUS, RADIUS + 2)


def neighbour_scores(keys: jax.Array, grid: jax.Array) -> jax.Array:
  """Products of each pixel's key with those of its taps: [2, 2, N, P] -> [2, 2, 7, 7, P].

  What stands at taps beyond the map is of some other pixel.
  """
  products = jnp.moveaxis(key_products(keys, grid[1]), 0, 2)
  pixels = [[products[a, b, a : a + TAPS, b : b + TAPS] for b in range(2)] for a in range(2)]
  return jnp.stack([jnp.stack(row) for row in pixels])


@jax.custom_vjp
def key_products(keys: jax.Array, width: jax.Array) -> jax.Array:
  """Products of the keys [2, 2, N, P] of all four pixels of a cell with those at all offsets: [8, 2, 2, 8, P]."""
  row = lambda offset: (keys[:, :, None] * keys_at(keys, width, offset)).sum(-2)
  return jax.lax.map(row, jnp.asarray(OFFSETS, jnp.int32))


def keys_at(keys: jax.Array, width: jax.Array, offset: jax.Array) -> jax.Array:
  """The keys of one row of offsets, [8, N, P]: those of the pixel's row, moved to the place they are seen from."""
  row = jnp.roll(keys[offset & 1], -(offset >> 1) * width, axis=-1)
  return jnp.stack([jnp.roll(row[other & 1], -(other >> 1), axis=-1) for other in OFFSETS])


def _key_products_forward(keys: jax.Array, width: jax.Array):
  return key_products(keys, width), (keys, width)


def _key_products_backward(residuals, cotangent: jax.Array):
  """Each key's part as a pixel and as a tap. By hand, so that moving back is a move too and not a scatter."""
  keys, width = residuals

  def row(gradient, operands):
    offset, products = operands
    line = keys_at(keys, width, offset)
    gradient = gradient + sum(products[:, :, x, None] * line[x] for x in range(len(OFFSETS)))
    of_line = sum(products[a, b, :, None] * keys[a, b] for a in range(2) for b in range(2))
    moved = [jnp.roll(of_line[x], other >> 1, axis=-1) for x, other in enumerate(OFFSETS)]
    columns = [sum(x for x, other in zip(moved, OFFSETS) if other & 1 == b) for b in range(2)]
    back = jnp.roll(jnp.stack(columns), (offset >> 1) * width, axis=-1)
    own_row = (jnp.arange(2) == offset & 1)[:, None, None, None]
    return gradient + jnp.where(own_row, back, 0), None

  operands = (jnp.asarray(OFFSETS, jnp.int32), cotangent)
  return jax.lax.scan(row, jnp.zeros_like(keys), operands)[0], None


key_products.defvjp(_key_products_forward, _key_products_backward)


def tap_places(place: jax.Array, length: jax.Array) -> jax.Array:
  """Which pixels the taps of pixels a of cells `place` [P] meet along an axis of 2 * length: int32 [2, 7, P].

  The axis is reflected at its ends, without repeating the last pixel; one of 2 pixels is prolonged by its last pixel.
  """
  first, tap = jnp.arange(2, dtype=jnp.int32)[:, None, None], jnp.arange(-RADIUS, RADIUS + 1, dtype=jnp.int32)[:, None]
  pixel, last = 2 * place + first + tap, 2 * length - 1
  reflected = last - jnp.abs(last - jnp.abs(pixel))
  return jnp.where(last >= RADIUS, reflected, jnp.clip(pixel, 0, jnp.maximum(last, 0)))


def at_border(scores: jax.Array, grid: jax.Array) -> jax.Array:
  """Scores [2, 2, 7, 7, P] with those of taps beyond the border taken from the pixels that stand in for them."""
  row, column, _ = flat.coordinates(grid, scores.shape[-1])

  def matrix(place, length):
    own = 2 * place + jnp.arange(2, dtype=jnp.int32)[:, None, None]
    taken = tap_places(place, length) - own + RADIUS
    return (taken[:, None] == jnp.arange(TAPS, dtype=jnp.int32)[:, None, None]).astype(jnp.float32)

  return on_both_axes(scores, matrix(row, grid[0]), matrix(column, grid[1]))


def cell_weights(kernel: jax.Array, grid: jax.Array) -> jax.Array:
  """What a kernel of pixels weighs the cells of the small map, [2, 2, 7, 7, P] both; 0 beyond the map.

  The pixels under its taps are bicubic sums of cells, none of which is further than 3 cells from the kernel's own.
  """
  row, column, valid = flat.coordinates(grid, kernel.shape[-1])

  def matrix(place, length):
    cells = place + jnp.arange(-RADIUS, RADIUS + 1, dtype=jnp.int32)[:, None]
    return flat.bicubic_weight(cells, tap_places(place, length)[:, :, None], 2 * length, length)

  return on_both_axes(jnp.where(valid, kernel, 0), matrix(row, grid[0]), matrix(column, grid[1]))


@jax.custom_vjp
def on_both_axes(x: jax.Array, down: jax.Array, right: jax.Array) -> jax.Array:
  """sum over i, j of down[a, i, r, p] right[b, j, s, p] x[a, b, i, j, p]: [2, 2, 7, 7, P], from matrices [2, 7, 7, P].

  Terms are added one by one: these are thousands of matrices of 7 x 7, too small for a `dot`, and of one reduction over
  the products XLA for CPU (jaxlib 0.10.2) makes wrong code at 2240 places. Every number is used 7 times, forward and
  backward; what goes into a loop has been computed by then, and is not computed anew for each use.
  """

  def row(operands):
    x, down = operands
    x = sum(x[:, tap, None] * down[tap, :, None] for tap in range(TAPS))
    return sum(x[:, :, tap, None] * right[:, tap][:, None] for tap in range(TAPS))

  return jax.lax.map(row, (x, down))


def _on_both_axes_backward(matrices, cotangent: jax.Array):
  """The transpose, which is the same sum with transposed matrices; these have no gradient: they come from grids."""
  down, right = matrices
  return on_both_axes(cotangent, down.swapaxes(1, 2), right.swapaxes(1, 2)), None, None


on_both_axes.defvjp(lambda x, down, right: (on_both_axes(x, down, right), (down, right)), _on_both_axes_backward)


def guidance(patches: jax.Array, grid: jax.Array, level: int) -> jax.Array:
  """The image averaged over the pixels of a level, 1 or more, by cell of the level below: [2, 2, 3, 4^(level - 1) P].

  patches: float32 [P, side * side * 3], the patches of one image of grid (h, w), colours last. The average is adaptive
  pooling of the whole image to (2^level h, 2^level w): no pixel of that reaches over the border of a patch, so it is
  one small matrix on both axes of each patch. Raises ConfigError where patches are no squares of three colours.
  """
  count, numbers = patches.shape
  side = math.isqrt(numbers // COLOURS)
  if side * side * COLOURS != numbers:
    raise ConfigError(f"patches of {numbers} numbers are no squares of {COLOURS} colours")
  n = 2**level
  matrix = jnp.asarray(pooling_matrix(side, n))
  patches = patches.reshape(count, side, side, COLOURS).astype(jnp.float32)
  pooled = jnp.einsum("iy,jx,pyxc->pijc", matrix, matrix, patches, precision=EXACT)
  cells = pooled.reshape(count, n // 2, 2, n // 2, 2, COLOURS).swapaxes(2, 3)
  cells = flat.from_cells(cells.reshape(count, n * n // 4, 4 * COLOURS), grid, n // 2)
  return cells.reshape(-1, 2, 2, COLOURS).transpose(1, 2, 3, 0)


class Vdim(nnx.Module):
  """A stack of stages, each with parameters of its own and fed with the result of the one before.

  What the last one gives is corrected once more, F + 0.1 * (F W + b); with three stages what each gives is (the paper's
  level 3, which the released code has in its pre-training only). Maps are flat: features [..., P, C] of grids int32
  [..., 2] = (h, w), level l [..., 4^l P, C] of (2^l h, 2^l w), padding 0. A grid of (0, 0) is no map.

  levels: how many stages, 1 to 3. width: C. keep: the levels that come out, all of them unless given.
  """

  def __init__(self, levels: int, width: int, *, rngs: nnx.Rngs, keep: tuple[int, ...] | None = None):
    if not 1 <= levels <= LEVELS:
      raise ConfigError(f"VDIM has 1 to {LEVELS} levels above the features, not {levels}")
    self.keep = tuple(range(levels + 1)) if keep is None else tuple(keep)
    if not set(self.keep) <= set(range(levels + 1)):
      raise ConfigError(f"VDIM of {levels} levels has no levels {self.keep}; it has 0 to {levels}")
    self.stages = nnx.List([Stage(rngs=rngs) for _ in range(levels)])
    corrected = range(levels) if levels == LEVELS else [levels - 1]
    self.fixup_proj = nnx.List([conv1x1(width, width, rngs) if i in corrected else None for i in range(levels)])

  @jax.named_scope("vdim")
  def __call__(
    self, features: jax.Array, patches: jax.Array, grids: jax.Array, dropout_key: jax.Array | None = None
  ) -> dict[int, jax.Array]:
    """The levels as a projector takes them, {level: map} in the type of features.

    patches: float32 [..., P, side * side * 3], the normalised image that the features are of, as `guidance` takes it.
    """
    return self._maps(features, patches, grids, dropout_key, detach=False)

  @jax.named_scope("vdim")
  def separate(
    self, features: jax.Array, patches: jax.Array, grids: jax.Array, dropout_key: jax.Array | None = None
  ) -> dict[int, jax.Array]:
    """The levels as VDIM's own training takes them: with two stages a loss on level 2 does not reach the first.

    The values are those of a call. With one or three stages the gradients are too, as released.
    """
    return self._maps(features, patches, grids, dropout_key, detach=len(self.stages) == 2)

  def _maps(self, features, patches, grids, dropout_key, detach):
    leading = features.shape[:-2]
    features, patches, grids = (x.reshape(-1, *x.shape[len(leading) :]) for x in (features, patches, grids))
    keys = None if dropout_key is None else jax.random.split(dropout_key, (grids.shape[0], len(self.stages), 2))
    # Nothing that stands beyond the maps may come in: a weight of 0 does not stop NaN.
    source, patches = flat.masked(features, grids), flat.masked(patches.astype(features.dtype), grids)
    maps = {0: source}
    for i, stage in enumerate(self.stages):
      level, stage_keys = i + 1, None if keys is None else keys[:, i, 0]
      if detach and i:
        source = jax.lax.stop_gradient(source)
      colours = jax.vmap(functools.partial(guidance, level=level))(patches, grids)
      source = jax.vmap(stage)(source, colours, grids * 2**i, stage_keys)
      if self.fixup_proj[i] is not None:
        dropped = source
        if keys is not None:
          dropped = jax.vmap(lambda x, key: drop_channels(x, FIXUP_DROPOUT, key, axis=-1))(source, keys[:, i, 1])
        source = flat.masked(source + FIXUP_SCALE * self.fixup_proj[i](dropped), grids * 2**level)
      maps[level] = source
    return {level: maps[level].reshape(*leading, *maps[level].shape[1:]) for level in self.keep}
