"""Sampling: from logits to the next token, each row by settings of its own."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax.inference.settings import Sampling


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Draws:
  """How each row's next token is drawn. numbers: uint32 [B, 3] of seed, step and top_k. shares: float32 [B, 2] of
  temperature and top_p. Two arrays, since each one costs time to hand over."""

  numbers: Any
  shares: Any

  @classmethod
  def of(cls, rows: Sequence[tuple[Sampling, int, int]]) -> "Draws":
    """From each row's (settings, seed, step); the step is how many tokens were drawn before."""
    numbers = [(seed, step, sampling.top_k) for sampling, seed, step in rows]
    shares = [(sampling.temperature, sampling.top_p) for sampling, _, _ in rows]
    return cls(np.array(numbers, np.uint32).reshape(-1, 3), np.array(shares, np.float32).reshape(-1, 2))

  def later(self, steps: Any) -> "Draws":
    """These rows' draws so many steps later."""
    return Draws(self.numbers + jnp.array([0, 1, 0], jnp.uint32) * jnp.uint32(steps), self.shares)


def sample(logits: jax.Array, draws: Draws) -> jax.Array:
  """The next token of each row, int32 [B], from float32 logits [B, V].

  A row's token depends on its own logits, settings, seed and step alone, and on no other row. Noise belongs to token
  ids (the Gumbel-max trick), so that the tokens kept by top_k and top_p are drawn as they would be without. Of equal
  logits the lower id counts as the more likely one; top_k and top_p therefore keep exactly as many tokens as they say.
  """
  likeliest = _argmax(logits)
  temperature, top_p = draws.shares[:, 0], draws.shares[:, 1]
  top_k = jnp.where(draws.numbers[:, 2] == 0, logits.shape[-1], draws.numbers[:, 2].astype(jnp.int32))
  drawn = temperature > 0
  narrowed = drawn & ((top_p < 1) | (top_k < logits.shape[-1]))

  def draw():
    scaled = logits / jnp.where(drawn, temperature, 1)[:, None]
    kept = jax.lax.cond(narrowed.any(), _kept, lambda scaled, *_: jnp.ones(scaled.shape, bool), scaled, top_p, top_k)
    key = lambda seed, step: jax.random.fold_in(jax.random.key(seed), step)
    keys = jax.vmap(key)(draws.numbers[:, 0], draws.numbers[:, 1])
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:], jnp.float32))(keys)
    tokens = _argmax(jnp.where(kept, scaled + noise, -jnp.inf))
    return jnp.where(drawn, tokens, likeliest)

  # Sorting a vocabulary takes longer than some models do: only where a row asks for it.
  return jax.lax.cond(drawn.any(), draw, lambda: likeliest)


def _argmax(x: jax.Array) -> jax.Array:
  """Where the first of the largest stands, int32 [B], of [B, V]. Two maxima of floats (exact up to 2**24 places), which
  XLA's CPU code takes several at a time, unlike its argmax."""
  largest = x >= x.max(axis=-1, keepdims=True)
  before = jnp.where(largest, jnp.arange(x.shape[-1], 0, -1, dtype=jnp.float32), 0).max(axis=-1)
  return x.shape[-1] - jnp.maximum(before, 1).astype(jnp.int32)


def _kept(logits: jax.Array, top_p: jax.Array, top_k: jax.Array) -> jax.Array:
  """bool [B, V]: the tokens that top_k, and of these top_p, leave."""
  order = jnp.argsort(-logits, axis=-1, stable=True)
  ranked = jnp.take_along_axis(logits, order, axis=-1)
  ranked = jnp.where(jnp.arange(logits.shape[-1]) < top_k[:, None], ranked, -jnp.inf)
  probabilities = jax.nn.softmax(ranked, axis=-1)
  # A token is kept if those before it do not reach top_p: the one that crosses the line is in, and so is the first.
  before = jnp.cumsum(probabilities, axis=-1) - probabilities
  # Of 1, rounding in the sum must not cut anything off.
  left = (ranked > -jnp.inf) & ((before < top_p[:, None]) | (top_p[:, None] >= 1))
  return jnp.put_along_axis(jnp.zeros(logits.shape, bool), order, left, axis=-1, inplace=False)
