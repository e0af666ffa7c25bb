"""One more token of each row on one CPU: what `Decoder.extend` computes, arranged as XLA's CPU code is fastest with.

The layers are taken apart, since it would copy each out of the stack for every token. Kernels are [out, in] and hidden
states [D, B], each product kernel times states: twice as fast for 16 rows as the other way round. Kernels that meet the
same states are joined. It is a second copy of the decoder, in the host's memory.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from mllm_jax import parameters
from mllm_jax.config import DecoderConfig
from mllm_jax.models import attention
from mllm_jax.models.decoder import KVCache, rotary_angles, rotate
from mllm_jax.models.mllm import Mllm

AT_ONCE = 4  # tokens in one call
SMALL = 2**24  # parameters: a decoder of fewer needs less time for a token than a call takes
JOINED = {"queries_keys_values": ("q_proj", "k_proj", "v_proj"), "gate_up": ("gate_proj", "up_proj")}
Weights = tuple[parameters.Flat, list[parameters.Flat]]  # the decoder's without its layers, and each layer's


@dataclasses.dataclass(frozen=True)
class OneCpu:
  """How a decoder of this configuration, without adapters, decodes on one CPU; hidden states are of type `dtype`."""

  config: DecoderConfig
  dtype: str
  at_once: int

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
    count, config = len(positions), self.config
    turn = functools.partial(rotate, rotary=rotary_angles(positions[:, None], config))
    h = self._norm(weights["input_norm/scale"], x)
    joined = _by_row(_linear(weights, "queries_keys_values", h)).reshape(count, 1, -1, config.head_width)
    q, k, v = jnp.split(joined, (config.heads, config.heads + config.kv_heads), axis=2)
    rows = jnp.arange(count)
    keys = cache.keys.at[0, rows, :, positions].set(turn(k)[:, 0])
    values = cache.values.at[0, rows, :, positions].set(v[:, 0])
    attended = self._attend(turn(q)[:, 0], keys[0], values[0], positions)
    x = x + _linear(weights, "o_proj", attended.reshape(count, -1).T)
    gate, up = jnp.split(_linear(weights, "gate_up", self._norm(weights["post_attention_norm/scale"], x)), 2)
    return x + _linear(weights, "down_proj", jax.nn.silu(gate) * up), KVCache(keys, values)

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


def _linear(weights: parameters.Flat, name: str, x: jax.Array) -> jax.Array:
  """`Linear` on x [in, B]."""
  y = weights[f"{name}/kernel"].astype(x.dtype) @ x
  if f"{name}/scale" in weights:
    y = (y * weights[f"{name}/scale"][:, None]).astype(x.dtype)
  if f"{name}/bias" in weights:
    y = y + weights[f"{name}/bias"][:, None].astype(x.dtype)
  return y


def _by_row(y: jax.Array) -> jax.Array:
  """[N, B] -> [B, N]. Without the barrier XLA would exchange the product's factors instead."""
  return jax.lax.optimization_barrier(y).T


def _take_apart(rest: parameters.Flat, stacked: parameters.Flat) -> Weights:
  turned = lambda flat: {path: x.T if path.endswith(("kernel", "head")) else x for path, x in flat.items()}
  count = len(next(iter(stacked.values())))
  return turned(rest), [_joined(turned({path: x[l] for path, x in stacked.items()})) for l in range(count)]


def _joined(layer: parameters.Flat) -> parameters.Flat:
  """A layer with the kernels [out, in] of JOINED one upon the other, and likewise what belongs to them."""
  parts = {name for names in JOINED.values() for name in names}
  joined = {path: x for path, x in layer.items() if path.partition("/")[0] not in parts}
  for title, names in JOINED.items():
    for kind in ("kernel", "scale", "bias"):
      if f"{names[0]}/{kind}" in layer:
        joined[f"{title}/{kind}"] = jnp.concatenate([layer[f"{name}/{kind}"] for name in names])
  return joined
