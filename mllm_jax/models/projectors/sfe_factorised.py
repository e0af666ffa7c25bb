"""A lighter spatial feature extractor for LLaVA-SP, whose paper names the size of its kernels as a limitation.

A kernel over a whole map has k * k * C * E numbers. Here it is a depthwise one, which sums each channel over the map by
a few patterns of its own, and a pointwise one, which mixes the sums: k * k * C * M + C * M * E numbers, M patterns a
channel. Such are the kernels that have, for each channel, at most rank M between places and outputs.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from mllm_jax.config import ConfigError, ProjectorConfig
from mllm_jax.models.layers import Linear, uniform
from mllm_jax.models.projectors import maps


class FactorisedExtractor(nnx.Module):
  """Patch map [B, G, G, C] -> spatial tokens [B, n, E], from the smallest map to the largest.

  Raises ConfigError for a depth_multiplier below 1.
  """

  def __init__(self, config: ProjectorConfig, grid: int, width: int, *, rngs: nnx.Rngs):
    patterns = config.depth_multiplier
    if patterns < 1:
      raise ConfigError(f"projector.depth_multiplier={patterns} must be 1 or more")
    self.config, self.width = config, config.conv_width
    sizes = maps.map_sizes(config, grid)
    self.depthwise = nnx.List([nnx.Param(uniform(1 / k)(rngs.params(), (k, k, width, patterns))) for k in sizes])
    init = maps.kernel_init(config, width * patterns)
    linear = lambda: Linear(width * patterns, config.conv_width, bias=False, rngs=rngs, kernel_init=init)
    self.pointwise = nnx.List([linear() for _ in sizes])

  def __call__(self, patch_map: jax.Array) -> jax.Array:
    tokens = []
    for one_map, kernel, mix in zip(maps.make(self.config, patch_map), self.depthwise, self.pointwise):
      kernel = kernel[...].astype(one_map.dtype)
      sums = jnp.einsum("bhwc,hwcm->bcm", one_map, kernel, preferred_element_type=jnp.float32)
      tokens.append(mix(sums.reshape(len(sums), -1).astype(one_map.dtype)))
    return jnp.stack(tokens, axis=1)
