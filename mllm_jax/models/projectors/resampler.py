"""What hierarchical window attention is compared with: LLaVA-UHD v1's resampler, an MLP on resized maps, and a
perceiver whose queries see everything.

All are called like `HiwinAttention` and give as many tokens.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from mllm_jax.config import ConfigError
from mllm_jax.models.layers import LayerNorm, Linear, normal, uniform
from mllm_jax.models.projectors.hiwin import (
  NORM_EPS,
  Folded,
  WindowAttention,
  check_levels,
  check_maps,
)


class UhdV1Resampler(nnx.Module):
  """The resampler of LLaVA-UHD v1 as the v2 authors released it for comparison: window attention on the ViT's own map
  with one set of queries, then a norm and a matrix.

  Raises ConfigError for a width that heads do not divide.
  """

  def __init__(self, vision_width: int, width: int, *, query_grid: int = 12, head_width: int = 128, rngs: nnx.Rngs):
    self.attention = WindowAttention(
      (0,),
      vision_width,
      width,
      query_sets=1,
      query_grid=query_grid,
      pooling="selective",
      head_width=head_width,
      marked=False,
      rngs=rngs,
    )
    self.out_norm = LayerNorm(width, NORM_EPS, rngs=rngs)
    self.proj = Linear(width, width, bias=False, rngs=rngs, kernel_init=normal(width**-0.5))

  def fold(self, dtype: jnp.dtype) -> Folded:
    """See `WindowAttention.fold`."""
    return self.attention.fold(dtype)

  @jax.named_scope("resampler")
  def __call__(self, levels: dict[int, jax.Array], grids: jax.Array, folded: Folded | None = None) -> jax.Array:
    """levels: {0: flat maps [N, P, C]}, others are not looked at; grids: int32 [N, 2]. -> [N, g*g, D], as for
    `HiwinAttention`."""
    check_maps((0,), levels)
    folded = self.fold(levels[0].dtype) if folded is None else folded
    return self.proj(self.out_norm(self.attention(levels, grids, folded)[:, :, 0]))


class Mlp144(nnx.Module):
  """Every level resized to g x g bilinearly, the channels side by side, then exact GELU and Linear (LLaVA-UHD v2,
  figure 5a): once with three levels, as in the released code's `mlp144`, else twice, as in its `mlp-v2` of two. Raises
  ConfigError for levels that do not grow.
  """

  def __init__(self, levels: tuple[int, ...], vision_width: int, width: int, *, query_grid: int = 12, rngs: nnx.Rngs):
    check_levels(levels)
    if query_grid < 1:
      raise ConfigError(f"projector.query_grid={query_grid} must be at least 1")
    self.levels, self.query_grid = tuple(levels), query_grid
    self.fc1 = Linear(len(levels) * vision_width, width, bias=True, rngs=rngs)
    self.fc2 = None if len(levels) == 3 else Linear(width, width, bias=True, rngs=rngs)

  def fold(self, dtype: jnp.dtype) -> None:
    """Nothing is worth making once for many crops."""
    del dtype

  @jax.named_scope("mlp144")
  def __call__(self, levels: dict[int, jax.Array], grids: jax.Array, folded: None = None) -> jax.Array:
    """levels: {level: flat maps [N, 4^level P, C]}; grids: int32 [N, 2]. -> [N, g*g, D]. Raises ConfigError for a level
    that is not among the maps."""
    del folded
    check_maps(self.levels, levels)
    resized = [resize(levels[level], grids * 2**level, self.query_grid) for level in self.levels]
    gelu = lambda x: jax.nn.gelu(x, approximate=False)
    tokens = self.fc1(gelu(jnp.concatenate(resized, -1)))
    return tokens if self.fc2 is None else self.fc2(gelu(tokens))


class Perceiver(nnx.Module):
  """g x g queries that attend to every cell of every level (LLaVA-UHD v2, figure 5a, as the released code's
  `percive_sampler` computes): without windows and without positions beyond those in the features.

  As released a level is resized to the tower's own square, 2^l times as fine, whatever the shape of the crop, and all
  levels share one projection. Raises ConfigError for levels that do not grow, or a width that heads do not divide.
  """

  def __init__(
    self,
    levels: tuple[int, ...],
    grid: int,
    vision_width: int,
    width: int,
    *,
    query_grid: int = 12,
    head_width: int = 128,
    rngs: nnx.Rngs,
  ):
    check_levels(levels)
    if head_width < 1 or width % head_width or query_grid < 1:
      raise ConfigError(
        f"the projector's width {width} must be a multiple of its head width {head_width}, and "
        f"projector.query_grid={query_grid} at least 1"
      )
    self.levels, self.grid, self.heads = tuple(levels), grid, width // head_width
    self.queries = nnx.Param(normal(0.02)(rngs.params(), (query_grid**2, width)))
    self.query_norm, self.key_norm = (LayerNorm(width, NORM_EPS, rngs=rngs) for _ in range(2))
    self.kv_proj = Linear(vision_width, width, bias=False, rngs=rngs)
    packed = uniform(math.sqrt(6 / (4 * width)))  # Xavier, for the three matrices stacked
    self.q_proj, self.k_proj, self.v_proj = (
      Linear(width, width, bias=True, rngs=rngs, kernel_init=packed) for _ in range(3)
    )
    self.out_proj = Linear(width, width, bias=True, rngs=rngs)

  def fold(self, dtype: jnp.dtype) -> jax.Array:
    """The queries as the attention applies them, [g*g, heads, head width]."""
    query = self.q_proj(self.query_norm(self.queries[...].astype(dtype)))
    return query.reshape(len(query), self.heads, -1) / math.sqrt(query.shape[-1] // self.heads)

  @jax.named_scope("perceiver")
  def __call__(self, levels: dict[int, jax.Array], grids: jax.Array, folded: jax.Array | None = None) -> jax.Array:
    """levels: {level: flat maps [N, 4^level P, C]}; grids: int32 [N, 2]. -> [N, g*g, D]. Raises ConfigError for a level
    that is not among the maps."""
    check_maps(self.levels, levels)
    query = self.fold(levels[self.levels[0]].dtype) if folded is None else folded
    resized = [resize(levels[level], grids * 2**level, self.grid * 2**level) for level in self.levels]
    cells = self.key_norm(self.kv_proj(jnp.concatenate(resized, 1)))
    split = lambda x: x.reshape(*x.shape[:-1], self.heads, -1)
    keys, values = split(self.k_proj(cells)), split(self.v_proj(cells))
    scores = jnp.einsum("qhd,nkhd->nhqk", query, keys, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores, axis=-1).astype(cells.dtype)
    found = jnp.einsum("nhqk,nkhd->nqhd", weights, values, preferred_element_type=jnp.float32).astype(cells.dtype)
    return self.out_proj(found.reshape(*found.shape[:2], -1))


def resize(maps: jax.Array, sizes: jax.Array, side: int) -> jax.Array:
  """Flat maps [N, length, C] of sizes (H, W) int32 [N, 2] -> [N, side * side, C], bilinearly, without antialiasing and
  with cell centres at halves, as PyTorch does with align_corners=False."""
  last = jnp.maximum(sizes - 1, 0)[..., None]
  # Positions in parts of a cell, 2 * side of them: integers, so that long maps lose no digits.
  position = (2 * jnp.arange(side) + 1) * sizes[..., None] - side  # [N, 2, side]
  position = jnp.clip(position, 0, 2 * side * last)
  low, beyond = position // (2 * side), position % (2 * side) / (2 * side)
  near = jnp.stack([1 - beyond, beyond], -1)  # [N, 2, side, taps]
  cells = jnp.minimum(low[..., None] + jnp.arange(2), last[..., None])
  place = cells[:, 0, :, None, :, None] * sizes[:, 1, None, None, None, None] + cells[:, 1, None, :, None, :]
  weights = near[:, 0, :, None, :, None] * near[:, 1, None, :, None, :]  # [N, row, column, tap, tap]
  n = maps.shape[0]
  taken = jnp.take_along_axis(maps, place.reshape(n, -1, 1), axis=1).reshape(n, side * side, 4, -1)
  return (taken * weights.reshape(n, side * side, 4, 1)).sum(2).astype(maps.dtype)
