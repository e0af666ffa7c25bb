"""What hierarchical window attention is compared with: LLaVA-UHD v1's resampler, and an MLP on resized maps.

Both are called like `HiwinAttention` and give as many tokens.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from mllm_jax.config import ConfigError
from mllm_jax.models.layers import LayerNorm, Linear, normal
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

  Raises ConfigError for a width that heads do not divide, or an unknown pooling.
  """

  def __init__(
    self,
    vision_width: int,
    width: int,
    *,
    query_grid: int = 12,
    pooling: str = "selective",
    head_width: int = 128,
    rngs: nnx.Rngs,
  ):
    self.attention = WindowAttention(
      (0,),
      vision_width,
      width,
      query_sets=1,
      query_grid=query_grid,
      pooling=pooling,
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
  """Every level resized to g x g bilinearly, the channels side by side, then exact GELU and Linear, twice: as released,
  a GELU comes first (LLaVA-UHD v2, figure 5a). Raises ConfigError for levels that do not grow.
  """

  def __init__(self, levels: tuple[int, ...], vision_width: int, width: int, *, query_grid: int = 12, rngs: nnx.Rngs):
    check_levels(levels)
    if query_grid < 1:
      raise ConfigError(f"projector.query_grid={query_grid} must be at least 1")
    self.levels, self.query_grid = tuple(levels), query_grid
    self.fc1 = Linear(len(levels) * vision_width, width, bias=True, rngs=rngs)
    self.fc2 = Linear(width, width, bias=True, rngs=rngs)

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
    return self.fc2(gelu(self.fc1(gelu(jnp.concatenate(resized, -1)))))


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
