"""NAdam (Dozat 2016) as PyTorch has it, whose momentum grows over the first steps; optax's is without that."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

MOMENTUM_DECAY = 0.004  # PyTorch's default


class NadamState(NamedTuple):
  """count: int32, steps taken. momentum: float32, the product of all steps' momenta. mu, nu: the moments."""

  count: jax.Array
  momentum: jax.Array
  mu: Any
  nu: Any


def scale_by_nadam(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> optax.GradientTransformation:
  """Gradients -> NAdam's updates before the learning rate, which `torch.optim.NAdam` would subtract."""

  def init(params):
    zeros = lambda: jax.tree.map(jnp.zeros_like, params)
    return NadamState(jnp.zeros((), jnp.int32), jnp.ones((), jnp.float32), zeros(), zeros())

  def update(grads, state, params=None):
    del params
    count = state.count + 1
    step = count.astype(jnp.float32)
    momentum = lambda step: b1 * (1 - 0.5 * jnp.exp(step * (MOMENTUM_DECAY * math.log(0.96))))
    now, following = momentum(step), momentum(step + 1)
    product = state.momentum * now
    mu = jax.tree.map(lambda g, m: b1 * m + (1 - b1) * g, grads, state.mu)
    nu = jax.tree.map(lambda g, v: b2 * v + (1 - b2) * g * g, grads, state.nu)
    of_gradient, of_moment = (1 - now) / (1 - product), following / (1 - product * following)
    unbiased = -jnp.expm1(step * math.log(b2))  # 1 - b2^step loses five digits in float32 at first

    def one(g, m, v):
      return (of_gradient * g + of_moment * m) / (jnp.sqrt(v / unbiased) + eps)

    return jax.tree.map(one, grads, mu, nu), NadamState(count, product, mu, nu)

  return optax.GradientTransformation(init, update)
