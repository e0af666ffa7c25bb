"""The MLP projector of LLaVA-1.5 (Liu et al. 2023), `mlp2x_gelu`: one visual token a patch."""

import math

import jax
from flax import nnx

from mllm_jax.config import ProjectorConfig, VisionConfig
from mllm_jax.models.layers import Linear, uniform


class MlpProjector(nnx.Module):
  """Linear, exact GELU, Linear; initialised as PyTorch initialises a Linear layer, +-1/sqrt(fan in)."""

  def __init__(self, in_width: int, out_width: int, *, rngs: nnx.Rngs):
    def linear(width):
      init = uniform(1 / math.sqrt(width))
      return Linear(width, out_width, bias=True, rngs=rngs, kernel_init=init, bias_init=init)

    self.fc1 = linear(in_width)
    self.fc2 = linear(out_width)

  def __call__(
    self, patch_features: jax.Array, patches: jax.Array | None = None, grids: jax.Array | None = None
  ) -> jax.Array:
    """patch_features [..., P, C] -> visual tokens [..., P, D]."""
    return self.fc2(jax.nn.gelu(self.fc1(patch_features), approximate=False))


def make(config: ProjectorConfig, vision: VisionConfig, width: int, *, rngs: nnx.Rngs) -> MlpProjector:
  """Of `projector.kind` "mlp2x_gelu"."""
  return MlpProjector(vision.width, width, rngs=rngs)


def tokens_per_crop(config: ProjectorConfig, vision: VisionConfig) -> int:
  """One a patch."""
  return vision.grid**2
