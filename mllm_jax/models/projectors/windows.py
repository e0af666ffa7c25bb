"""Hierarchical windows: which part of a flat feature map each query sees, and the tokens that part is pooled to.

A map of H x W cells is cut into g x g equal windows of H/g x W/g cells (LLaVA-UHD v2, section 3.2), whatever its
shape. RoI-align, the legacy kind (no half-cell shift, ceil(bin) samples a bin and axis), pools each window to a few
bins. On such windows it is linear and separable: the weight of a cell is the product of one number for its row and one
for its column, and both have a closed form. Nothing here depends on values, so geometry is always float32.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax.config import ConfigError
from mllm_jax.models import flat

POOLINGS = ("selective", "fixed", "pyramid")
SIDE = 3  # bins a side on maps that are about square, and of every window with fixed pooling
# Candidates of selective pooling (rows, columns) from the narrowest to the widest map, and the squares of the aspect
# ratios between them. A candidate is best where |ln(W/H) - ln(columns/rows)| is least (eq. 3), so it ends at the
# geometric mean with its neighbour. No grid lies on such a border: the squares are not those of fractions.
CANDIDATES = ((4, 2), (3, 2), (4, 3), (3, 3), (3, 4), (2, 3), (2, 4))
BORDERS = ((1, 3), (1, 2), (3, 4), (4, 3), (2, 1), (3, 1))
# Samples lie on multiples of 1/48 where windows are smaller than a cell: one that is this near the end is on it.
ON_THE_END = 0.01


def pooling_grid(height, width) -> tuple[jax.Array, jax.Array]:
  """Selective pooling's (rows, columns) for maps of these sizes, arrays of any one shape (LLaVA-UHD v2, eq. 3)."""
  wider = sum((below * width * width > above * height * height) * 1 for above, below in BORDERS)
  candidates = jnp.asarray(CANDIDATES)[wider]
  return candidates[..., 0], candidates[..., 1]


@dataclasses.dataclass(frozen=True)
class Pooling:
  """How the windows of one level's maps are pooled.

  windows: g, windows a side. scale: cells of the map a side of one cell of the ViT's grid, 2^level. side: bins a side
  of each window, or 0 for selective pooling.
  """

  windows: int
  scale: int
  side: int

  @property
  def tokens(self) -> int:
    """The most tokens that a window is pooled to."""
    return self.side**2 if self.side else max(rows * columns for rows, columns in CANDIDATES)

  def sizes(self, grids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(H, W) [N] of the level's maps."""
    return grids[:, 0] * self.scale, grids[:, 1] * self.scale

  def bins(self, grids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(rows, columns) [N] of bins in a window."""
    if self.side:
      return (jnp.full(grids.shape[0], self.side),) * 2
    return pooling_grid(grids[:, 0], grids[:, 1])

  def valid(self, grids: jax.Array) -> jax.Array:
    """Which of the `tokens` places in a window hold a token, bool [N, t]; the same for all windows of a map."""
    rows, columns = self.bins(grids)
    return jnp.arange(self.tokens) < (rows * columns)[:, None]

  def axes(self, grids: jax.Array) -> tuple["Axis", "Axis"]:
    """The row and the column axis of the windows' bins. Token k of a window is bin (k // columns, k % columns)."""
    (height, width), (rows, columns) = self.sizes(grids), self.bins(grids)
    token = jnp.arange(self.tokens)
    return (
      Axis(self.windows, height, rows, token // columns[:, None]),
      Axis(self.windows, width, columns, token % columns[:, None]),
    )


@dataclasses.dataclass(frozen=True)
class Axis:
  """One axis of N maps: g windows on `length` [N] cells, `bins` [N] bins a window, and t tokens at `bin` [N, t].

  Window j starts at j length / g and is length / g cells long, but at least one: where there are fewer cells than
  windows they overlap, and the last ones reach past the map. Samples out there count as zero and still divide the mean,
  as released.
  """

  windows: int
  length: jax.Array
  bins: jax.Array
  bin: jax.Array

  def _samples(self) -> tuple[jax.Array, ...]:
    """(base, start, step, samples) [N, g, t]: sample s of a token is at cell base + start + (s + 1/2) step.

    Integers as long as possible: ceil(bin) must not hang on rounding, and coordinates of long maps keep their digits.
    """
    length, bins = self.length[:, None, None], self.bins[:, None, None]
    scaled = jnp.arange(self.windows)[:, None] * length
    extent = jnp.maximum(length, self.windows)
    samples = -(-extent // (self.windows * bins))
    start = (scaled % self.windows + self.bin[:, None] * extent / bins) / self.windows
    step = extent / (self.windows * bins * samples)
    return scaled // self.windows, start, step, samples

  def weights(self, cells: jax.Array) -> jax.Array:
    """float32 [N, ..., g, t, r]: what cells weigh in tokens. cells: int32, broadcastable to that shape and of its rank.
    What cells beyond the map get is meaningless.

    The mean over the samples of the hat function max(0, 1 - |cell - sample|): an arithmetic series on each side. Beyond
    the centre of the last cell a sample is all of that cell's.
    """
    between = tuple(range(1, cells.ndim - 3))
    base, start, step, samples, length = (
      jnp.expand_dims(value, (*between, cells.ndim - 1)) for value in (*self._samples(), self.length[:, None, None])
    )
    offset = (cells - base).astype(jnp.float32)
    before, here, after = (_count(offset + shift, start, step, samples) for shift in (-1, 0, 1))
    nearest = start - offset
    left = (here - before) * (1 + nearest + step * (before + here) / 2)
    right = (after - here) * (1 - nearest - step * (here + after) / 2)
    end = length - base
    inside = _count(end + ON_THE_END, start, step, samples)
    return (left + jnp.where(offset == end - 1, inside - here, right)) / samples

  def coverage(self) -> jax.Array:
    """float32 [N, g, t]: which share of a token's samples lies on the map."""
    base, start, step, samples = self._samples()
    return _count(self.length[:, None, None] - base + ON_THE_END, start, step, samples) / samples

  def table_weights(self, side: int, longest: int) -> jax.Array:
    """float32 [N, g, t, side]: what the places of a table weigh that is first resized to the map bicubically, then
    pooled. longest: at least every length."""
    cells = jnp.arange(longest)
    resize = flat.bicubic_matrix(cells, self.length, side, side)
    resize = jnp.where((cells < self.length[:, None])[..., None], resize, 0)
    weights = self.weights(cells[None, None, None])
    return jnp.einsum("ngtr,nrk->ngtk", weights, resize, precision=jax.lax.Precision.HIGHEST)


def _count(upto: jax.Array, start: jax.Array, step: jax.Array, samples: jax.Array) -> jax.Array:
  """How many of the samples at start + (s + 1/2) step, 0 <= s < samples, are at `upto` or before."""
  return jnp.clip(jnp.floor((upto - start) / step + 0.5), 0, samples)


def make_pooling(kind: str, windows: int, level: int) -> Pooling:
  """The pooling of a level's windows (LLaVA-UHD v2, table 6).

  selective: one of seven bin grids by the map's shape (eq. 3). fixed: 3 x 3. pyramid: 3 * 2^level bins a side, so that
  a bin is as many cells of its own level everywhere. The authors published no code for the last; the rule is ours.
  Raises ConfigError for any other kind.
  """
  sides = {"selective": 0, "fixed": SIDE, "pyramid": SIDE * 2**level}
  if kind not in sides:
    raise ConfigError(f"projector.pooling={kind!r} is unknown; known: {', '.join(POOLINGS)}")
  return Pooling(windows, 2**level, sides[kind])


def coverage(pooling: Pooling, grids: jax.Array) -> jax.Array:
  """float32 [N, g, g, t]: the sum of the pooling weights of each token, below 1 only where windows leave the map."""
  rows, columns = (axis.coverage() for axis in pooling.axes(grids))
  return rows[:, :, None] * columns[:, None] * pooling.valid(grids)[:, None, None]


def table_weights(pooling: Pooling, grids: jax.Array, side: int, patches: int) -> jax.Array:
  """float32 [N, g, g, t, side * side]: what the places of a side x side table weigh in each token, if the table is
  resized to the map bicubically and pooled like it. The resized table itself is never made.

  patches: P, the most cells of a ViT grid.
  """
  rows, columns = (axis.table_weights(side, pooling.scale * patches) for axis in pooling.axes(grids))
  weights = rows[:, :, None, :, :, None] * columns[:, None, :, :, None, :]
  weights = weights * pooling.valid(grids)[:, None, None, :, None, None]
  return weights.reshape(*weights.shape[:4], side * side)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def pool(pooling: Pooling, features: jax.Array, scale: jax.Array, grids: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Pools flat maps, each cell scaled by a number of its own: (tokens [N, g, g, t, C], pooled scale [N, g, g, t]).

  features: [N, length, C], flat maps of any float type, whose padding may hold any finite numbers; scale: float32
  [N, length]; grids: int32 [N, 2], the ViT's grids. Tokens come in the type of the features, summed in float32; those
  that are not `valid` are zero.

  All windows of a row of windows lie in one band, a contiguous stretch of the flat map: their tokens are one product of
  a matrix with it. A band has the cells of H/g + 2 rows at most, which has no useful bound for every shape, so it
  is gone through in chunks, in a loop of as many turns as the longest band of the batch needs: one, up to an aspect
  ratio of about 4. Differentiated by hand, because loops of such length cannot be otherwise.
  """
  g, t, width = pooling.windows, pooling.tokens, features.shape[-1]
  chunks = _Chunks(pooling, grids, features.shape[1])

  def turn(k, sums):
    start, weights = chunks(k)
    weights = weights * _slices(scale[..., None], start, chunks.size)[:, :, None, None, :, 0]
    bands = _slices(features, start, chunks.size)
    matrix = weights.reshape(*weights.shape[:2], g * t, chunks.size).astype(features.dtype)
    tokens = jnp.einsum("nimr,nirc->nimc", matrix, bands, preferred_element_type=jnp.float32)
    return sums[0] + tokens.reshape(sums[0].shape), sums[1] + weights.sum(-1)

  shape = (features.shape[0], g, g, t)
  zeros = jnp.zeros((*shape, width), jnp.float32), jnp.zeros(shape, jnp.float32)
  tokens, scales = jax.lax.fori_loop(0, chunks.turns, turn, zeros)
  return tokens.astype(features.dtype), scales


def _pool_forward(pooling, features, scale, grids):
  return pool(pooling, features, scale, grids), (features, scale, grids)


def _pool_backward(pooling, residuals, gradients):
  features, scale, grids = residuals
  d_tokens, d_scales = gradients
  g, t = pooling.windows, pooling.tokens
  d_tokens = d_tokens.reshape(*d_tokens.shape[:2], g * t, -1)
  chunks = _Chunks(pooling, grids, features.shape[1])

  def turn(k, sums):
    start, weights = chunks(k)
    d_band_scale = jnp.einsum("nijtr,nijt->nir", weights, d_scales, precision=jax.lax.Precision.HIGHEST)
    matrix = weights.reshape(*weights.shape[:2], g * t, chunks.size).astype(d_tokens.dtype)
    d_bands = jnp.einsum("nimr,nimc->nirc", matrix, d_tokens, preferred_element_type=jnp.float32)
    parts = d_bands, d_band_scale[..., None]
    # Bands overlap, so they are added one after another.
    add = lambda i, sums: tuple(_add(total, part[:, i], start[:, i]) for total, part in zip(sums, parts))
    return jax.lax.fori_loop(0, g, add, sums)

  zeros = jnp.zeros(features.shape, jnp.float32), jnp.zeros((*scale.shape, 1), jnp.float32)
  d_scaled, d_scale = jax.lax.fori_loop(0, chunks.turns, turn, zeros)
  d_features = (d_scaled * scale[..., None]).astype(features.dtype)
  d_scale = d_scale[..., 0] + (d_scaled * features.astype(jnp.float32)).sum(-1)
  return d_features, d_scale, np.zeros(grids.shape, jax.dtypes.float0)


pool.defvjp(_pool_forward, _pool_backward)


class _Chunks:
  """The bands of all rows of windows in chunks of `size` cells; called with a turn's number it gives where the chunks
  start [N, g] and what their cells weigh [N, g, g, t, size]."""

  def __init__(self, pooling: Pooling, grids: jax.Array, length: int):
    g = pooling.windows
    self.pooling, self.grids, self.length = pooling, grids, length
    # A band of a map with W = 2 sqrt(length), four times as wide as high, just fits.
    self.size = min(length, -(-(length // g + 4 * math.isqrt(length)) // 16) * 16)
    height, width = (size[:, None] for size in pooling.sizes(grids))
    window = jnp.arange(g)
    first_row = window * height // g
    last_row = jnp.minimum(-(-(window * height + jnp.maximum(height, g)) // g), height - 1)
    self.first = first_row * width
    self.turns = -(-jnp.max((last_row - first_row + 1) * width) // self.size)

  def __call__(self, turn: jax.Array) -> tuple[jax.Array, jax.Array]:
    height, width = (size[:, None, None] for size in self.pooling.sizes(self.grids))
    rows, columns = self.pooling.axes(self.grids)
    lower = self.first + turn * self.size
    start = jnp.clip(lower, 0, self.length - self.size)
    place = start[..., None] + jnp.arange(self.size)
    # A chunk that would end beyond the map starts earlier, at cells that the turn before has seen.
    used = (place >= lower[..., None]) & (place < height * width)
    place_row, place_column = place // jnp.maximum(width, 1), place % jnp.maximum(width, 1)
    by_row = rows.weights(place_row[:, :, None]) * used[:, :, None]
    by_row = by_row * self.pooling.valid(self.grids)[:, None, :, None]
    return start, by_row[:, :, None] * columns.weights(place_column[:, :, None, None])


def _slices(maps: jax.Array, start: jax.Array, size: int) -> jax.Array:
  """maps [N, length, C], start [N, g] -> [N, g, size, C]."""
  cut = lambda m, s: jax.lax.dynamic_slice_in_dim(m, s, size)
  return jax.vmap(jax.vmap(cut, (None, 0)))(maps, start)


def _add(total: jax.Array, part: jax.Array, start: jax.Array) -> jax.Array:
  """total [N, length, C] with part [N, size, C] added from row start [N] on."""

  def add(total, part, start):
    present = jax.lax.dynamic_slice_in_dim(total, start, part.shape[0])
    return jax.lax.dynamic_update_slice_in_dim(total, present + part, start, 0)

  return jax.vmap(add)(total, part, start)
