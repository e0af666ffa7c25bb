"""A pyramid out of a ConvNeXt (Liu et al. 2022): its stages are the levels (LLaVA-UHD v2, table 3).

There the encoder is a CLIP-ConvNeXt instead of the ViT, and its stages' maps are the pyramid; no code was released and
the paper does not say how the two sizes meet. Here every patch of the tower's grid is enlarged to 32 x 32 pixels, the
stride of the last stage, so that stage 4 has the cells of level 0 and each stage before it those of the next level:
for slices of 336 x 336 pixels ConvNeXt sees 768 x 768, as ConvLLaVA has it (Ge et al. 2024). So the tower's features
are not looked at. A norm and a linear layer of its own bring each stage to the tower's width.

All strides are kernels of 2 x 2 or 4 x 4 pixels and stay within a patch; only the depthwise convolutions reach beyond.
So images of any shape are flat maps here too (see `models.flat`).
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mllm_jax.config import ConfigError
from mllm_jax.models import flat
from mllm_jax.models.layers import LayerNorm, Linear, normal, stack, zeros

STAGES = 4
STRIDE = 32  # pixels of a cell of the last stage
STEM = 4  # pixels along a side of a cell of the first
TAPS, RADIUS = 7, 3
NORM_EPS = 1e-6
LAYER_SCALE = 1e-6  # that the residual branches begin with
EXPANSION = 4


class PatchConv(nnx.Module):
  """A convolution whose stride is its kernel: a linear map of each cell's pixels. kernel [side, side, in, out]."""

  def __init__(self, side: int, in_width: int, out_width: int, *, rngs: nnx.Rngs):
    self.kernel = nnx.Param(normal(0.02)(rngs.params(), (side, side, in_width, out_width)))
    self.bias = nnx.Param(zeros(rngs.params(), (out_width,)))

  def __call__(self, cells: jax.Array) -> jax.Array:
    """[..., s * s * in] -> [..., out]."""
    kernel = self.kernel[...].astype(cells.dtype)
    return cells @ kernel.reshape(-1, kernel.shape[-1]) + self.bias[...].astype(cells.dtype)


class Depthwise(nnx.Module):
  """A convolution of 7 x 7 cells in each channel by itself. kernel [7, 7, C]."""

  def __init__(self, width: int, *, rngs: nnx.Rngs):
    self.kernel = nnx.Param(normal(0.02)(rngs.params(), (TAPS, TAPS, width)))
    self.bias = nnx.Param(zeros(rngs.params(), (width,)))

  def __call__(self, x: jax.Array, grid: jax.Array) -> jax.Array:
    """A flat map [n, C] of grid int32 [2] -> the same shape; beyond the map are zeros. Summed in float32.

    The cell a row above stands a row's length before: the map is moved, and what wraps around is masked.
    """
    row, column, valid = flat.coordinates(grid, len(x))
    x = jnp.where(valid[:, None], x, 0)
    reach = jnp.arange(-RADIUS, RADIUS + 1, dtype=jnp.int32)
    beside = ((column + reach[:, None] >= 0) & (column + reach[:, None] < grid[1])).astype(jnp.float32)

    def line(total, operands):
      offset, kernel = operands
      inside = (row + offset >= 0) & (row + offset < grid[0])
      moved = jnp.where(inside[:, None], jnp.roll(x, -offset * grid[1], axis=0), 0).astype(jnp.float32)
      moved = jnp.pad(moved, ((RADIUS, RADIUS), (0, 0)))
      for tap in range(TAPS):
        total = total + moved[tap : tap + len(x)] * beside[tap][:, None] * kernel[tap]
      return total, None

    kernel = self.kernel[...].astype(jnp.float32)
    total, _ = jax.lax.scan(line, jnp.zeros(x.shape, jnp.float32), (reach, kernel))
    return (total + self.bias[...].astype(jnp.float32)).astype(x.dtype)


class Block(nnx.Module):
  """Depthwise convolution, norm, and an MLP four times as wide, scaled, beside the identity."""

  def __init__(self, width: int, *, rngs: nnx.Rngs):
    self.depthwise = Depthwise(width, rngs=rngs)
    self.norm = LayerNorm(width, NORM_EPS, rngs=rngs)
    self.fc1 = Linear(width, EXPANSION * width, bias=True, rngs=rngs)
    self.fc2 = Linear(EXPANSION * width, width, bias=True, rngs=rngs)
    self.gamma = nnx.Param(jnp.full((width,), LAYER_SCALE, jnp.float32))

  def __call__(self, x: jax.Array, grids: jax.Array) -> jax.Array:
    """Flat maps [N, n, C] -> the same shape; padding holds any finite numbers."""
    h = self.norm(jax.vmap(self.depthwise)(x, grids))
    h = self.fc2(jax.nn.gelu(self.fc1(h), approximate=False))
    return x + h * self.gamma[...].astype(x.dtype)


class ConvNextStage(nnx.Module):
  """Blocks of one resolution; all stages but the first halve that of the one before."""

  def __init__(self, before: int, width: int, depth: int, *, rngs: nnx.Rngs):
    self.norm = LayerNorm(before, NORM_EPS, rngs=rngs) if before else None
    self.downsample = PatchConv(2, before, width, rngs=rngs) if before else None
    self.layers = stack(lambda rngs: Block(width, rngs=rngs), depth, rngs)

  def __call__(self, x: jax.Array, grids: jax.Array) -> jax.Array:
    """Flat maps [N, n, C before], n four times as long where it halves, -> [N, n, C] of grids [N, 2]."""
    if self.downsample is not None:
      x = self.downsample(jax.vmap(to_cells)(self.norm(x), grids))
    run = jax.checkpoint(lambda layer, x: layer(x, grids))
    return jax.lax.scan(lambda x, layer: (run(layer, x), None), x, self.layers)[0]


class ConvNext(nnx.Module):
  """The four stages, without what classifies behind them. widths, depths: of the stages."""

  def __init__(self, widths: tuple[int, ...], depths: tuple[int, ...], *, rngs: nnx.Rngs):
    if len(widths) != STAGES or len(depths) != STAGES or min(*widths, *depths) < 1:
      raise ConfigError(
        f"projector.convnext_widths={widths} and convnext_depths={depths} must be {STAGES} positive numbers each"
      )
    self.stem = PatchConv(STEM, 3, widths[0], rngs=rngs)
    self.stem_norm = LayerNorm(widths[0], NORM_EPS, rngs=rngs)
    self.stages = nnx.List(
      [ConvNextStage(before, *sizes, rngs=rngs) for before, *sizes in zip((0, *widths), widths, depths)]
    )

  def __call__(self, patches: jax.Array, grids: jax.Array) -> list[jax.Array]:
    """Normalised patches [N, P, s s 3] of images of grids [N, 2] -> what each stage gives, the coarsest first: stage
    4 - l as flat maps [N, 4^l P, C_l] of (2^l h, 2^l w)."""
    cells = STRIDE // STEM
    pixels = jax.vmap(enlarged)(patches, grids)  # [N, P, 32, 32, 3]
    n, places = pixels.shape[:2]
    pixels = pixels.reshape(n, places, cells, STEM, cells, STEM, 3).swapaxes(3, 4)
    x = self.stem_norm(self.stem(pixels.reshape(n, places, cells * cells, -1)))
    x = jax.vmap(lambda x, grid: flat.from_cells(x, grid, cells))(x, grids)
    maps = []
    for level, stage in zip(reversed(range(STAGES)), self.stages):
      x = stage(x, grids * 2**level)
      maps.insert(0, x)
    return maps


class ConvNextPyramid(nnx.Module):
  """The stages that are the levels, each normed and brought to the tower's width. Called like every pyramid."""

  def __init__(
    self, levels: tuple[int, ...], width: int, widths: tuple[int, ...], depths: tuple[int, ...], *, rngs: nnx.Rngs
  ):
    self.levels = levels
    self.convnext = ConvNext(widths, depths, rngs=rngs)
    used = [width_of if level in levels else None for level, width_of in enumerate(reversed(widths))]
    self.norms = nnx.List([LayerNorm(c, NORM_EPS, rngs=rngs) if c else None for c in used])
    self.laterals = nnx.List([Linear(c, width, bias=True, rngs=rngs) if c else None for c in used])

  @jax.named_scope("convnext")
  def __call__(self, features, patches, grids, dropout_key=None) -> dict[int, jax.Array]:
    del dropout_key
    leading, dtype = patches.shape[:-2], features.dtype
    patches, grids = patches.reshape(-1, *patches.shape[-2:]), grids.reshape(-1, 2)
    stages = self.convnext(flat.masked(patches.astype(dtype), grids), grids)
    maps = {level: self.laterals[level](self.norms[level](stages[level])) for level in self.levels}
    masked = {level: flat.masked(x, grids * 2**level) for level, x in maps.items()}
    return {level: x.reshape(*leading, *x.shape[1:]) for level, x in masked.items()}


def enlarged(patches: jax.Array, grid: jax.Array) -> jax.Array:
  """The image bilinearly enlarged (align_corners False) to 32 x 32 pixels a patch: [P, s s 3] -> [P, 32, 32, 3].

  Of the patches around, a pixel beside the border is looked at; at the image's own border its last one is repeated.
  """
  side = round((patches.shape[-1] // 3) ** 0.5)
  position = (np.arange(STRIDE) + 0.5) * side / STRIDE + 0.5  # with one pixel before the patch
  matrix = np.maximum(1 - np.abs(position[:, None] - np.arange(side + 2)), 0).astype(patches.dtype)
  row, column, _ = flat.coordinates(grid, len(patches))
  x = patches.reshape(-1, side, side, 3)
  for axis, (place, length, step) in ((2, (column, grid[1], 1)), (1, (row, grid[0], grid[1]))):
    first, last = (jax.lax.slice_in_dim(x, start, start + 1, axis=axis) for start in (0, side - 1))
    wide = lambda mask: mask[:, None, None, None]
    before = jnp.where(wide(place > 0), jnp.roll(last, step, axis=0), first)
    after = jnp.where(wide(place < length - 1), jnp.roll(first, -step, axis=0), last)
    padded = jnp.concatenate([before, x, after], axis=axis)
    x = jnp.moveaxis(jnp.tensordot(padded, matrix, (axis, 1), precision=jax.lax.Precision.HIGHEST), -1, axis)
  return x


def to_cells(x: jax.Array, grid: jax.Array) -> jax.Array:
  """The way back of `flat.from_cells` with 2 x 2: a flat map [4 P, C] -> [P, 4 C], for the grid (h, w) of P cells."""
  lines, _ = flat.lines_of_cells(grid, len(x) // 4, 2)
  taken = x.reshape(-1, 2 * x.shape[-1])[lines]
  return taken.reshape(len(taken), -1)
