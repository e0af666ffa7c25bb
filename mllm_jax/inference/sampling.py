"""Sampling: from logits to the next token."""

import jax
import jax.numpy as jnp

from mllm_jax.inference.settings import Sampling


def sample(logits: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
  """The next token of each row, int32 [B], from float32 logits [B, V].

  Row b draws with its own key, so that it does not depend on how many rows there are. Of equal logits the lower id
  counts as the more likely one; top_k and top_p therefore keep exactly as many tokens as they say.
  """
  if sampling.temperature == 0:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(logits.shape[0]))
  logits = logits / sampling.temperature
  vocab_size = logits.shape[-1]
  if sampling.top_k == 0 and sampling.top_p == 1:
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)

  ranked, ids = jax.lax.top_k(logits, min(sampling.top_k or vocab_size, vocab_size))
  probabilities = jax.nn.softmax(ranked, axis=-1)
  # A token is kept if those before it do not reach top_p: the one that crosses the line is in, and so is the first.
  before = jnp.cumsum(probabilities, axis=-1) - probabilities
  ranked = jnp.where(before < sampling.top_p, ranked, -jnp.inf)
  ranks = jax.vmap(jax.random.categorical)(keys, ranked)
  return jnp.take_along_axis(ids, ranks[:, None], axis=-1)[:, 0].astype(jnp.int32)
