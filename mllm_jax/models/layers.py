"""The small parts that the towers and projectors share: linear layers, norms, and stacks of equal layers."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from mllm_jax.models.lora import Lora


def normal(stddev: float) -> Callable:
  """An initialiser (key, shape) -> float32 array ~ N(0, stddev^2)."""
  return lambda key, shape: stddev * jax.random.normal(key, shape, jnp.float32)


def uniform(bound: float) -> Callable:
  """An initialiser (key, shape) -> float32 array ~ U(-bound, bound)."""
  return lambda key, shape: jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def zeros(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  del key
  return jnp.zeros(shape, jnp.float32)


def ones(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  del key
  return jnp.ones(shape, jnp.float32)


class Linear(nnx.Module):
  """y = x W + b, with an optional low-rank adapter beside W.

  Weights may be stored in any float type; the product is taken in the type of x. `kernel` is [in, out], the transpose
  of what PyTorch stores.

  int8: W is `kernel` in whole numbers times `scale` [out] in float32; it cannot be trained.
  """

  def __init__(
    self,
    in_width: int,
    out_width: int,
    *,
    bias: bool,
    rngs: nnx.Rngs,
    kernel_init: Callable = normal(0.02),
    bias_init: Callable = zeros,
    lora: Lora | None = None,
    int8: bool = False,
  ):
    shape = (in_width, out_width)
    self.kernel = nnx.Param(jnp.zeros(shape, jnp.int8) if int8 else kernel_init(rngs.params(), shape))
    self.scale = nnx.Param(jnp.ones(out_width, jnp.float32)) if int8 else None
    self.bias = nnx.Param(bias_init(rngs.params(), (out_width,))) if bias else None
    self.lora = lora

  def __call__(self, x: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
    """x [..., in] -> [..., out]. With a key, the adapter's input is dropped out."""
    y = x @ self.kernel[...].astype(x.dtype)
    if self.scale is not None:
      y = (y * self.scale[...]).astype(x.dtype)
    if self.bias is not None:
      y = y + self.bias[...].astype(x.dtype)
    if self.lora is not None:
      y = y + self.lora(x, dropout_key)
    return y


class LayerNorm(nnx.Module):
  """Layer normalisation over the last axis, computed in float32, returned in the type of x."""

  def __init__(self, width: int, eps: float, *, bias: bool = True, rngs: nnx.Rngs):
    self.eps = eps
    self.scale = nnx.Param(ones(rngs.params(), (width,)))
    self.bias = nnx.Param(zeros(rngs.params(), (width,))) if bias else None

  def __call__(self, x: jax.Array) -> jax.Array:
    h = x.astype(jnp.float32)
    h = h - h.mean(-1, keepdims=True)
    h = h * jax.lax.rsqrt(jnp.square(h).mean(-1, keepdims=True) + self.eps)
    h = h * self.scale[...].astype(jnp.float32)
    return (h if self.bias is None else h + self.bias[...].astype(jnp.float32)).astype(x.dtype)


class RMSNorm(nnx.Module):
  """Root mean square normalisation over the last axis, computed in float32, returned in the type of x."""

  def __init__(self, width: int, eps: float, *, rngs: nnx.Rngs):
    self.eps = eps
    self.scale = nnx.Param(ones(rngs.params(), (width,)))

  def __call__(self, x: jax.Array) -> jax.Array:
    h = x.astype(jnp.float32)
    h = h * jax.lax.rsqrt(jnp.square(h).mean(-1, keepdims=True) + self.eps)
    return (h * self.scale[...].astype(jnp.float32)).astype(x.dtype)


def stack(make: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs) -> nnx.Module:
  """`count` modules made by `make` as one module whose arrays have a leading axis [count, ...].

  `jax.lax.scan` over the result runs them one after another: one compiled body, and a few dozen arrays to hand over at
  each step instead of thousands.
  """
  split = nnx.split_rngs(splits=count)
  return split(nnx.vmap(make, transform_metadata={nnx.PARTITION_NAME: None}))(rngs)
