"""The language model: a Llama-type decoder (Touvron et al. 2023; Qwen2, Yang et al. 2024; Mistral, Jiang et al. 2023),
for training and, with a cache, for answers."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from mllm_jax.config import ConfigError, DecoderConfig, LoraConfig
from mllm_jax.models import attention as attention_lib
from mllm_jax.models import lora as lora_lib
from mllm_jax.models.layers import Linear, RMSNorm, normal, stack
from mllm_jax.sharding import rows_only

# Of the products' results those whose recomputation would cost most for their size: left to be made again are the
# products of o_proj and up_proj, 31 % of a layer's (of Vicuna's shape).
SAVED_NAMES = ("queries", "keys", "values", attention_lib.SAVED_NAME, "gate")
REMAT_POLICIES = {
  "full": jax.checkpoint_policies.nothing_saveable,
  "named": jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES),
  "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=list(SAVED_NAMES),
    offload_src="device",
    offload_dst="pinned_host",
  ),
  "none": None,
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
  """Keys and values of layers, [L, B, G, T, N]; the token at position t of a row lies in place t.

  What one head of a row sees lies side by side: XLA's CPU code reads it ten times as fast as with G and T exchanged.
  """

  keys: Any
  values: Any

  @classmethod
  def empty(cls, config: DecoderConfig, layers: int, rows: int, places: int, dtype: Any) -> "KVCache":
    shape = (layers, rows, config.kv_heads, places, config.head_width)
    return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def rotary_angles(positions: jax.Array, config: DecoderConfig) -> tuple[jax.Array, jax.Array]:
  """Cosine and sine of the rotary angles, float32 [B, S, 1, N/2], of integer positions [B, S]."""
  exponents = jnp.arange(0, config.head_width, 2, dtype=jnp.float32) / config.head_width
  speeds = config.rope_theta**-exponents
  if config.rope_factor != 1:
    turns = config.rope_trained * speeds / (2 * math.pi)
    kept = jnp.clip((turns - config.rope_low) / (config.rope_high - config.rope_low), 0, 1)
    speeds = speeds * (kept + (1 - kept) / config.rope_factor)
  angles = positions[..., None, None].astype(jnp.float32) * speeds
  return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, rotary: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Rotary embedding of x [B, S, H, N]; dimension i is paired with i + N/2, as in Hugging Face's checkpoints."""
  cos, sin = rotary
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def attend_cached(
  queries: jax.Array, keys: jax.Array, values: jax.Array, positions: jax.Array, window: int = 0
) -> jax.Array:
  """Attention of queries [B, S, H, N] at `positions` [B, S] to places 0 .. position of a layer's cache, keys and values
  [B, G, T, N], with a `window` to the last so many of them; the softmax in float32. Returns [B, S, H, N]."""
  batch, length, heads, width = queries.shape
  grouped = queries.reshape(batch, length, keys.shape[1], -1, width)
  logits = jnp.einsum("bsgqn,bgtn->bgsqt", grouped, keys, preferred_element_type=jnp.float32) * width**-0.5
  seen = attention_lib.causal_mask(positions, jnp.arange(keys.shape[2]), window)
  weights = jax.nn.softmax(jnp.where(seen[:, None, :, None], logits, -jnp.inf), axis=-1).astype(values.dtype)
  attended = jnp.einsum("bgsqt,bgtn->bsgqn", weights, values, preferred_element_type=jnp.float32)
  return attended.reshape(batch, length, heads, width).astype(queries.dtype)


class DecoderLayer(nnx.Module):
  """One pre-norm layer: grouped-query attention with rotary positions, then a SwiGLU MLP."""

  def __init__(self, config: DecoderConfig, lora: LoraConfig, *, int8: bool, rngs: nnx.Rngs):
    self.head_width = config.head_width
    query_width, key_width = config.heads * config.head_width, config.kv_heads * config.head_width

    def linear(name, in_width, out_width, bias=False):
      adapter = lora_lib.make(name, in_width, out_width, lora, rngs)
      return Linear(in_width, out_width, bias=bias, rngs=rngs, lora=adapter, int8=int8)

    self.input_norm = RMSNorm(config.width, config.norm_eps, rngs=rngs)
    self.q_proj = linear("q_proj", config.width, query_width, config.attention_bias)
    self.k_proj = linear("k_proj", config.width, key_width, config.attention_bias)
    self.v_proj = linear("v_proj", config.width, key_width, config.attention_bias)
    self.o_proj = linear("o_proj", query_width, config.width)
    self.post_attention_norm = RMSNorm(config.width, config.norm_eps, rngs=rngs)
    self.gate_proj = linear("gate_proj", config.width, config.mlp_width)
    self.up_proj = linear("up_proj", config.width, config.mlp_width)
    self.down_proj = linear("down_proj", config.mlp_width, config.width)

  def __call__(self, x, rotary, attend, dropout_key=None):
    """x [B, S, D]; attend: the attention (queries, keys, values) -> ([B, S, H, N], whatever is to be kept).

    Returns (x, what was to be kept).
    """
    keys = [None] * 7 if dropout_key is None else list(jax.random.split(dropout_key, 7))
    split = lambda y: y.reshape(*y.shape[:2], -1, self.head_width)
    h = self.input_norm(x)
    q = checkpoint_name(rotate(split(self.q_proj(h, keys[0])), rotary), "queries")
    k = checkpoint_name(rotate(split(self.k_proj(h, keys[1])), rotary), "keys")
    v = checkpoint_name(split(self.v_proj(h, keys[2])), "values")
    attended, kept = attend(q, k, v)
    x = x + self.o_proj(attended.reshape(*x.shape[:2], -1), keys[3])
    h = self.post_attention_norm(x)
    gate = checkpoint_name(self.gate_proj(h, keys[4]), "gate")
    return x + self.down_proj(jax.nn.silu(gate) * self.up_proj(h, keys[5]), keys[6]), kept


class Decoder(nnx.Module):
  """Embedding table, stacked layers, final norm, and the head that gives logits.

  remat, attention, packed: as in `ModelConfig`; int8: its int8_decoder.
  """

  def __init__(
    self,
    config: DecoderConfig,
    lora: LoraConfig,
    *,
    dtype: str,
    remat: str,
    attention: str = "auto",
    packed: bool = True,
    int8: bool = False,
    rngs: nnx.Rngs,
  ):
    attention_lib.check(attention)
    if remat not in REMAT_POLICIES:
      raise ConfigError(f"model.remat={remat!r} is unknown; known: {', '.join(REMAT_POLICIES)}")
    if config.heads % config.kv_heads:
      raise ConfigError(f"decoder.heads={config.heads} is no multiple of decoder.kv_heads={config.kv_heads}")
    self.config = config
    self.dtype = jnp.dtype(dtype)
    self.remat = remat
    self.attention = attention
    self.packed = packed
    self.embedding = nnx.Param(normal(0.02)(rngs.params(), (config.vocab_size, config.width)))
    self.layers = stack(lambda rngs: DecoderLayer(config, lora, int8=int8, rngs=rngs), config.layers, rngs)
    self.norm = RMSNorm(config.width, config.norm_eps, rngs=rngs)
    self.head = (
      None if config.tied_embeddings else nnx.Param(normal(0.02)(rngs.params(), (config.width, config.vocab_size)))
    )

  def embed(self, tokens: jax.Array) -> jax.Array:
    """Token ids [B, S] -> embeddings [B, S, D] in the decoder's type."""
    return self.embedding[...][tokens].astype(self.dtype)

  @jax.named_scope("decoder")
  def __call__(
    self, embeddings: jax.Array, positions: jax.Array, segment_ids: jax.Array, dropout_key: jax.Array | None = None
  ) -> jax.Array:
    """Normed hidden states [B, S, D] of whole rows; a token sees the earlier ones of its own segment.

    embeddings [B, S, D], positions and segment_ids int [B, S]. With a key the adapters' dropout is active.
    """
    rotary = rotary_angles(positions, self.config)
    attend = lambda q, k, v: (self._causal(q, k, v, segment_ids), None)

    def layer(carry, module):
      x, index = carry
      key = None if dropout_key is None else jax.random.fold_in(dropout_key, index)
      x, _ = module(x, rotary, attend, dropout_key=key)
      return (rows_only(x), index + 1), None

    if self.remat != "none":
      layer = jax.checkpoint(layer, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
    (x, _), _ = jax.lax.scan(layer, (rows_only(embeddings.astype(self.dtype)), 0), self.layers)
    return self.norm(x)

  def _causal(self, q, k, v, segment_ids):
    return attention_lib.causal(
      q, k, v, segment_ids, window=self.config.sliding_window, implementation=self.attention, packed=self.packed
    )

  @jax.named_scope("decoder_read")
  def read(self, embeddings: jax.Array, positions: jax.Array, segment_ids: jax.Array) -> tuple[jax.Array, KVCache]:
    """As `__call__`, and what stands in a cache of S places after these rows."""
    rotary = rotary_angles(positions, self.config)
    attend = lambda q, k, v: (self._causal(q, k, v, segment_ids), (k.swapaxes(1, 2), v.swapaxes(1, 2)))

    def layer(x, module):
      x, kept = module(x, rotary, attend)
      return rows_only(x), kept

    x, (keys, values) = jax.lax.scan(layer, rows_only(embeddings.astype(self.dtype)), self.layers)
    return self.norm(x), KVCache(keys, values)

  @jax.named_scope("decoder_cached")
  def extend(self, embeddings: jax.Array, positions: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
    """Normed hidden states [B, S, D] of new tokens at `positions` [B, S], and the cache with them in it.

    A token sees every place up to its own position, or the last ones of a sliding window, so what stands in later ones,
    such as padding, is not seen. The cache is carried through the layers and written in place; of it only the layer at
    hand is read.
    """
    rotary = rotary_angles(positions, self.config)
    rows = jnp.arange(positions.shape[0])[:, None]

    def layer(carry, xs):
      x, cache = carry
      module, index = xs

      def attend(q, k, v):
        keys = cache.keys.at[index, rows, :, positions].set(k)
        values = cache.values.at[index, rows, :, positions].set(v)
        attended = attend_cached(q, keys[index], values[index], positions, self.config.sliding_window)
        return attended, KVCache(keys, values)

      return module(x, rotary, attend), None

    start = rows_only(embeddings.astype(self.dtype)), cache
    (x, cache), _ = jax.lax.scan(layer, start, (self.layers, jnp.arange(self.config.layers)))
    return self.norm(x), cache

  def head_kernel(self) -> jax.Array:
    """The matrix [D, V] from hidden states to logits, as stored."""
    return self.embedding[...].T if self.head is None else self.head[...]

  def logits(self, hidden: jax.Array, kernel: jax.Array | None = None) -> jax.Array:
    """Hidden states [..., D] -> float32 logits [..., V]; the product is accumulated in float32.

    kernel: `head_kernel()`, where the caller has put it somewhere else.
    """
    kernel = self.head_kernel() if kernel is None else kernel
    return jnp.matmul(hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)
