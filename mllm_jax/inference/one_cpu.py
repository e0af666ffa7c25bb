"""One more token of each row on one CPU: what `Decoder.extend` computes, arranged as XLA's CPU code is fastest with.

The layers are taken apart, since it would copy each out of the stack for every token. Kernels are [out, in] and hidden
states [D, B], each product kernel times states: twice as fast for 16 rows as the other way round. It is a second copy
of the decoder, in the host's memory.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from mllm_jax import parameters
from mllm_jax.config import DecoderConfig, LoraConfig
from mllm_jax.models import attention
from mllm_jax.models.decoder import KVCache, rotary_angles, rotate
from mllm_jax.models.mllm import Mllm

TURNED = ("kernel", "head", "a", "b")  # the last two are an adapter's
Weights = tuple[parameters.Flat, list[parameters.Flat]]  # the decoder's without its layers, and each layer's


@dataclasses.dataclass(frozen=True)
class OneCpu:
  """How a decoder of this configuration decodes on one CPU; hidden states are of type `dtype`."""

  config: DecoderConfig
  lora: LoraConfig
  dtype: str

  def weights(self, model: Mllm) -> Weights:
    """The decoder's parameters, each turned."""
    rest = {path: x for path, x in parameters.flatten(model.decoder)[1].items() if not path.startswith("layers/")}
    return jax.jit(_take_apart)(rest, parameters.flatten(model.decoder.layers)[1])

  def empty(self, rows: int) -> list[KVCache]:
    """A cache of no places, of one layer each."""
    return [KVCache.empty(self.config, 1, rows, 0, self.dtype) for _ in range(self.config.layers)]

  def step(self, weights: Weights, tokens: jax.Array, positions: jax.Array, cache: list[KVCache]):
    """(float32 logits [B, V] after `tokens` [B] at `positions` [B], the cache with them in it)."""
    rest, layers = weights
    x = rest["embedding"][tokens].astype(self.dtype).T
    written = []
    for layer, own in zip(layers, cache, strict=True):
      x, own = self._layer(layer, x, positions, own)
      written.append(own)
    head = rest.get("head", rest["embedding"])
    logits = jnp.matmul(head.astype(x.dtype), self._norm(rest["norm/scale"], x), preferred_element_type=jnp.float32)
    return _by_row(logits), written

  def _layer(self, weights, x, positions, cache):
    """`DecoderLayer` on x [D, B]."""
    linear = lambda name, h: self._linear(
      {path.removeprefix(f"{name}/"): w for path, w in weights.items() if path.startswith(f"{name}/")}, h
    )
    split = lambda y: _by_row(y).reshape(len(positions), 1, -1, self.config.head_width)
    turn = functools.partial(rotate, rotary=rotary_angles(positions[:, None], self.config))
    h = self._norm(weights["input_norm/scale"], x)
    q, k, v = turn(split(linear("q_proj", h))), turn(split(linear("k_proj", h))), split(linear("v_proj", h))
    rows = jnp.arange(len(positions))
    keys = cache.keys.at[0, rows, :, positions].set(k[:, 0])
    values = cache.values.at[0, rows, :, positions].set(v[:, 0])
    attended = self._attend(q[:, 0], keys[0], values[0], positions)
    x = x + linear("o_proj", attended.reshape(len(positions), -1).T)
    h = self._norm(weights["post_attention_norm/scale"], x)
    x = x + linear("down_proj", jax.nn.silu(linear("gate_proj", h)) * linear("up_proj", h))
    return x, KVCache(keys, values)

  def _attend(self, queries, keys, values, positions):
    """`attend_cached` of queries [B, H, N], the weights' sums divided by at the end: N numbers for each and not T."""
    grouped = queries.reshape(len(positions), keys.shape[1], -1, self.config.head_width)
    logits = jnp.einsum("bgqn,bgtn->bgqt", grouped, keys, preferred_element_type=jnp.float32)
    seen = attention.causal_mask(positions[:, None], jnp.arange(keys.shape[2]), self.config.sliding_window)
    logits = jnp.where(seen[:, None], logits * self.config.head_width**-0.5, -jnp.inf)
    weights = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
    attended = jnp.einsum("bgqt,bgtn->bgqn", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
    return (attended / weights.sum(axis=-1, keepdims=True)).astype(queries.dtype)

  def _norm(self, scale, x):
    """`RMSNorm` over the first axis."""
    h = x.astype(jnp.float32)
    h = h * jax.lax.rsqrt(jnp.square(h).mean(axis=0) + self.config.norm_eps)
    return (h * scale[:, None].astype(jnp.float32)).astype(x.dtype)

  def _linear(self, weights, x):
    """`Linear`."""
    y = weights["kernel"].astype(x.dtype) @ x
    if "scale" in weights:
      y = (y * weights["scale"][:, None]).astype(x.dtype)
    if "bias" in weights:
      y = y + weights["bias"][:, None].astype(x.dtype)
    if "lora/a" in weights:
      a, b = (weights[f"lora/{name}"].astype(x.dtype) for name in "ab")
      y = y + b @ (a @ x) * (self.lora.alpha / self.lora.rank)
    return y


def _by_row(y: jax.Array) -> jax.Array:
  """[N, B] -> [B, N]. Without the barrier XLA would exchange the product's factors instead."""
  return jax.lax.optimization_barrier(y).T


def _take_apart(rest: parameters.Flat, stacked: parameters.Flat) -> Any:
  count = len(next(iter(stacked.values())))
  return _turned(rest), [_turned({path: x[l] for path, x in stacked.items()}) for l in range(count)]


def _turned(flat: parameters.Flat) -> parameters.Flat:
  return {path: x.T if path.rpartition("/")[2] in TURNED else x for path, x in flat.items()}
