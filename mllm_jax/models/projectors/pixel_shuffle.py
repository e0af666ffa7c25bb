"""InternVL's projector (Chen et al. 2024, section 3.1), which makes one token of 2 x 2 patches, and LLaVA-SP's spatial
tokens in front of that.

LLaVA-SP's paper (table 7) does not say how its spatial tokens meet InternVL's tiles. Here they are made of a tile's own
patch map before the shuffle, as they are of the whole image's in LLaVA, by the paper's own stride, and stand before
that tile's tokens. A map of 32 x 32 patches gives eight of them where LLaVA's 24 x 24 gives six.
"""

import math

import jax
from flax import nnx

from mllm_jax.config import ConfigError, ProjectorConfig, VisionConfig
from mllm_jax.models.layers import LayerNorm, Linear, uniform
from mllm_jax.models.projectors.maps import spatial_tokens
from mllm_jax.models.projectors.spatial import SpatialProjector

SIDE = 2  # patches along each side of a token
NORM_EPS = 1e-5


def shuffle(patch_features: jax.Array, grid: int) -> jax.Array:
  """[..., G * G, C] -> [..., (G / 2)^2, 4 C]: row by row the squares of 2 x 2 patches, the features of each row by row
  one after another."""
  axes, width, half = patch_features.shape[:-2], patch_features.shape[-1], grid // SIDE
  squares = patch_features.reshape(*axes, half, SIDE, half, SIDE, width).swapaxes(-4, -3)
  return squares.reshape(*axes, half * half, SIDE * SIDE * width)


class PixelShuffleProjector(nnx.Module):
  """Patch features [..., G * G, C] -> visual tokens [..., (G / 2)^2, D]: layer norm, linear, exact GELU, linear."""

  def __init__(self, grid: int, in_width: int, out_width: int, *, rngs: nnx.Rngs):
    if grid % SIDE:
      raise ConfigError(f"projector.kind: a pixel shuffle needs an even grid of patches, and the tower's is {grid}")

    def linear(width):
      init = uniform(1 / math.sqrt(width))
      return Linear(width, out_width, bias=True, rngs=rngs, kernel_init=init, bias_init=init)

    self.grid = grid
    self.norm = LayerNorm(SIDE * SIDE * in_width, NORM_EPS, rngs=rngs)
    self.in_proj = linear(SIDE * SIDE * in_width)
    self.out_proj = linear(out_width)

  def __call__(
    self, patch_features: jax.Array, patches: jax.Array | None = None, grids: jax.Array | None = None
  ) -> jax.Array:
    hidden = self.in_proj(self.norm(shuffle(patch_features, self.grid)))
    return self.out_proj(jax.nn.gelu(hidden, approximate=False))


class SpatialShuffleProjector(SpatialProjector):
  """Patch features [..., G * G, C] -> visual tokens [..., n + (G / 2)^2, D]: LLaVA-SP's projector, but for its patch
  tokens, which are those of the pixel shuffle."""

  def __init__(self, config: ProjectorConfig, grid: int, in_width: int, out_width: int, *, rngs: nnx.Rngs):
    super().__init__(config, grid, in_width, out_width, rngs=rngs)
    self.patch_mlp = PixelShuffleProjector(grid, in_width, out_width, rngs=rngs)


def make(config: ProjectorConfig, vision: VisionConfig, width: int, *, rngs: nnx.Rngs) -> nnx.Module:
  """Of `projector.kind` "pixel_shuffle" or "spatial_shuffle"."""
  if config.kind == "pixel_shuffle":
    return PixelShuffleProjector(vision.grid, vision.width, width, rngs=rngs)
  return SpatialShuffleProjector(config, vision.grid, vision.width, width, rngs=rngs)


def tokens_per_crop(config: ProjectorConfig, vision: VisionConfig) -> int:
  """The spatial tokens where there are any, and one for 2 x 2 patches."""
  spatial = 0 if config.kind == "pixel_shuffle" else spatial_tokens(config, vision.grid)
  return spatial + (vision.grid // SIDE) ** 2
