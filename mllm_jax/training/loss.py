"""Cross-entropy that never holds the logits of a whole batch, and makes none for places that are not trained on."""

import math

import jax
import jax.numpy as jnp

from mllm_jax.models.decoder import Decoder
from mllm_jax.sharding import BATCH_AXES

CHUNK_BYTES = 2**27  # float32 logits held at a time, on each device


def summed_cross_entropy(decoder: Decoder, hidden: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
  """Sum over places of weight * -log softmax(logits)[target], a float32 scalar.

  hidden [B, S, D], targets int [B, S], weights float [B, S]. Each device brings the trained places of its rows to the
  front and cuts them into chunks, whose logits are made, used and, in the backward pass, made again: memory is that of
  one chunk. Chunks without a trained place on any device are skipped.
  """
  shards = _batch_shards(len(hidden))
  flat = lambda x: x.reshape(shards, -1, *x.shape[2:])
  hidden, targets, weights = flat(hidden), flat(targets), flat(weights)
  places = hidden.shape[1]
  order = jnp.argsort(weights == 0, axis=1, stable=True)
  pick = jax.vmap(lambda x, order: x.at[order].get(unique_indices=True, mode="promise_in_bounds"))
  chunks = min(places, max(1, -(-places * decoder.config.vocab_size * 4 // CHUNK_BYTES)))
  size = -(-places // chunks)

  def cut(x):
    x = jnp.pad(pick(x, order), [(0, 0), (0, chunks * size - places)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(shards, chunks, size, *x.shape[2:]), 1, 0)

  def chunk_loss(hidden, targets, weights):
    logits = decoder.logits(hidden)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.sum(weights * (jax.nn.logsumexp(logits, axis=-1) - picked))

  # The checkpoint is around the branch: inside, each chunk's residuals would hold the head's kernel.
  @jax.checkpoint
  def unless_empty(hidden, targets, weights):
    return jax.lax.cond(weights.any(), chunk_loss, lambda *_: jnp.zeros((), jnp.float32), hidden, targets, weights)

  total, _ = jax.lax.scan(
    lambda total, xs: (total + unless_empty(*xs), None),
    jnp.zeros((), jnp.float32),
    (cut(hidden), cut(targets), cut(weights)),
  )
  return total


def _batch_shards(rows: int) -> int:
  """In how many parts the mesh that `jax.set_mesh` has set splits so many rows."""
  mesh = jax.sharding.get_abstract_mesh()
  shards = 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in BATCH_AXES)
  return shards if rows % shards == 0 else 1
