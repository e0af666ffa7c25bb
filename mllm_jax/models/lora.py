"""Low-rank adapters (LoRA, Hu et al. 2021) with the arithmetic and the initialisation of PEFT.

Written here because flax's own adapter has neither alpha nor dropout and the other libraries' fail on stacked layers.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from mllm_jax.config import LoraConfig


class Lora(nnx.Module):
  """x -> dropout(x) A B * alpha / rank. A is [in, R], kaiming-uniform with a = sqrt(5); B is [R, out], zero."""

  def __init__(self, in_width: int, out_width: int, config: LoraConfig, *, rngs: nnx.Rngs):
    self.scale = config.alpha / config.rank
    self.dropout = config.dropout
    bound = 1 / math.sqrt(in_width)  # kaiming-uniform with a = sqrt(5): gain sqrt(1/3), bound gain * sqrt(3 / fan_in)
    self.a = nnx.Param(jax.random.uniform(rngs.params(), (in_width, config.rank), jnp.float32, -bound, bound))
    self.b = nnx.Param(jnp.zeros((config.rank, out_width), jnp.float32))

  def __call__(self, x: jax.Array, dropout_key: jax.Array | None) -> jax.Array:
    """x [..., in] -> [..., out]; no dropout without a key."""
    if dropout_key is not None and self.dropout > 0:
      keep = jax.random.bernoulli(dropout_key, 1 - self.dropout, x.shape)
      x = jnp.where(keep, x / (1 - self.dropout), 0).astype(x.dtype)
    return (x @ self.a[...].astype(x.dtype)) @ self.b[...].astype(x.dtype) * self.scale


def make(name: str, in_width: int, out_width: int, config: LoraConfig, rngs: nnx.Rngs) -> Lora | None:
  """The adapter of the projection `name` (PEFT's target name), or None where the configuration asks for none."""
  if config.rank == 0 or name not in config.targets:
    return None
  return Lora(in_width, out_width, config, rngs=rngs)


def merge(model: nnx.Module) -> nnx.Module:
  """A copy of `model` with every adapter folded into its kernel: W + A B * alpha / rank, added in float32.

  The copy has no adapters and gives the same outputs, up to the rounding of the kernel's own type; of kernels in int8
  float32 ones are made.
  """
  merged = nnx.clone(model)
  for _, module in nnx.iter_modules(merged):
    adapter = getattr(module, "lora", None)
    if isinstance(adapter, Lora):
      kernel = module.kernel[...]
      if module.scale is not None:
        kernel, module.scale = kernel * module.scale[..., None, :], None
      update = jnp.matmul(adapter.a[...].astype(jnp.float32), adapter.b[...].astype(jnp.float32)) * adapter.scale
      module.kernel = nnx.Param((kernel.astype(jnp.float32) + update).astype(kernel.dtype))
      module.lora = None
  return merged
