"""Inverse semantic pyramids (LLaVA-UHD v2, section 3.2): a tower's features at higher resolutions, coarse to fine.

VDIM is the paper's own; the others are what its table 3 compares it with. There is no released code of those: bilinear
upsampling is of the features to each level at once, and a deconvolution is a transposed convolution of 2 x 2 pixels
with stride 2, one for each level, each fed with the level below. A ConvNeXt's stages are in `convnext`.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from mllm_jax.config import ConfigError
from mllm_jax.models import flat
from mllm_jax.models.adaptive_conv import adaptive_conv
from mllm_jax.models.layers import Linear, uniform
from mllm_jax.models.projectors.convnext import ConvNextPyramid
from mllm_jax.models.projectors.vdim import LEVELS, Vdim

KINDS = ("vdim", "bilinear", "deconv", "convnext", "none")


def make(
  kind: str,
  levels: tuple[int, ...],
  width: int,
  rngs: nnx.Rngs,
  convnext_widths: tuple[int, ...] = (),
  convnext_depths: tuple[int, ...] = (),
) -> nnx.Module:
  """The pyramid of this kind, one of KINDS, with C = `width` channels. Level l is 2^l times as high and wide.

  All have the same call: (features [..., P, C], patches float32 [..., P, side * side * 3], grids int32 [..., 2],
  dropout_key=None) -> {level: flat map [..., 4^l P, C] of (2^l h, 2^l w), padding 0} with the levels asked for. Only
  VDIM and ConvNeXt look at the patches, VDIM alone uses the key, and ConvNeXt does not look at the features.

  Raises ConfigError for an unknown kind, and for levels that there are not.
  """
  levels = tuple(levels)
  if kind not in KINDS:
    raise ConfigError(f"projector.pyramid={kind!r} is unknown; known: {', '.join(KINDS)}")
  if not levels or list(levels) != sorted(set(levels)) or not set(levels) <= set(range(LEVELS + 1)):
    raise ConfigError(
      f"projector.levels={levels} must name some of 0 to {LEVELS}, in order: level l has 2^l times the height and width"
    )
  if kind == "none":
    if levels != (0,):
      raise ConfigError(
        f"projector.levels={levels} needs a pyramid; with projector.pyramid='none' there is level 0 only"
      )
    return Features()
  if kind == "bilinear":
    return Bilinear(levels)
  if kind == "convnext":
    return ConvNextPyramid(levels, width, convnext_widths, convnext_depths, rngs=rngs)
  if levels == (0,):
    raise ConfigError(f"projector.pyramid={kind!r} has nothing to do with projector.levels=(0,); use 'none'")
  if kind == "deconv":
    return Deconvolution(levels, width, rngs=rngs)
  return Vdim(levels[-1], width, rngs=rngs, keep=levels)


class Features(nnx.Module):
  """The features themselves."""

  def __call__(self, features, patches, grids, dropout_key=None) -> dict[int, jax.Array]:
    del patches, dropout_key
    return {0: flat.masked(features, grids)}


class Bilinear(nnx.Module):
  """Bilinear upsampling, as PyTorch's with align_corners False."""

  def __init__(self, levels: tuple[int, ...]):
    self.levels = levels

  @jax.named_scope("bilinear")
  def __call__(self, features, patches, grids, dropout_key=None) -> dict[int, jax.Array]:
    del patches, dropout_key
    leading = features.shape[:-2]
    source = flat.masked(features, grids)
    rows, grids = source.reshape(-1, *source.shape[-2:]), grids.reshape(-1, 2)
    maps = {0: source}
    for level in set(self.levels) - {0}:
      upsampled = jax.vmap(lambda x, grid: adaptive_conv(x, bilinear_weights(grid, x.shape[0], 2**level), grid))
      maps[level] = upsampled(rows, grids).reshape(*leading, -1, rows.shape[-1])
    return {level: maps[level] for level in self.levels}


def bilinear_weights(grid: jax.Array, count: int, n: int) -> jax.Array:
  """What the cells around weigh in the n x n pixels of each cell: float32 [n, n, 3, 3, P]."""
  row, column, valid = flat.coordinates(grid, count)

  def along(place, length):  # [n, 3, P]
    position = place + (jnp.arange(n)[:, None, None] + 0.5) / n - 0.5
    position = jnp.clip(position, 0, jnp.maximum(length - 1, 0))
    return jnp.maximum(1 - jnp.abs(position - (place + jnp.arange(-1, 2)[:, None])), 0)

  weights = along(row, grid[0])[:, None, :, None] * along(column, grid[1])[None, :, None]
  return jnp.where(valid, weights, 0).astype(jnp.float32)


class Deconvolution(nnx.Module):
  """Transposed convolutions of 2 x 2 pixels with stride 2: every pixel of a cell is a linear map of the cell's own.

  A kernel is [C, 4 C], the four pixels row by row, and has a bias for each of them.
  """

  def __init__(self, levels: tuple[int, ...], width: int, *, rngs: nnx.Rngs):
    self.levels = levels
    init = uniform(1 / math.sqrt(width))
    self.stages = nnx.List(
      [Linear(width, 4 * width, bias=True, rngs=rngs, kernel_init=init) for _ in range(max(levels))]
    )

  @jax.named_scope("deconvolution")
  def __call__(self, features, patches, grids, dropout_key=None) -> dict[int, jax.Array]:
    del patches, dropout_key
    *leading, _, width = features.shape
    source = flat.masked(features, grids)
    maps, grids = {0: source}, grids.reshape(-1, 2)
    source = source.reshape(-1, *source.shape[-2:])
    for i, stage in enumerate(self.stages):
      cells = stage(source).reshape(*source.shape[:2], 4, width)
      source = jax.vmap(lambda x, grid: flat.from_cells(x, grid, 2))(cells, grids * 2**i)
      maps[i + 1] = source.reshape(*leading, -1, width)
    return {level: maps[level] for level in self.levels}
