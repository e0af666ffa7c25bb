"""Cross-entropy that never holds the logits of a whole batch."""

import jax
import jax.numpy as jnp

from mllm_jax.models.decoder import Decoder

CHUNK_BYTES = 2**27  # float32 logits held at a time, over all devices' rows


def summed_cross_entropy(decoder: Decoder, hidden: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
  """Sum over places of weight * -log softmax(logits)[target], a float32 scalar.

  hidden [B, S, D], targets int [B, S], weights float [B, S]. The sequence is cut into chunks whose logits are made,
  used and, in the backward pass, made again, so that memory is that of one chunk.
  """
  batch, length, _ = hidden.shape
  chunks = min(length, max(1, -(-batch * length * decoder.config.vocab_size * 4 // CHUNK_BYTES)))
  while length % chunks:
    chunks += 1

  @jax.checkpoint
  def chunk_loss(hidden, targets, weights):
    logits = decoder.logits(hidden)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.sum(weights * (jax.nn.logsumexp(logits, axis=-1) - picked))

  if chunks == 1:
    return chunk_loss(hidden, targets, weights)
  cut = lambda x: jnp.moveaxis(x.reshape(batch, chunks, length // chunks, *x.shape[2:]), 1, 0)
  total, _ = jax.lax.scan(
    lambda total, xs: (total + chunk_loss(*xs), None),
    jnp.zeros((), jnp.float32),
    (cut(hidden), cut(targets), cut(weights)),
  )
  return total
