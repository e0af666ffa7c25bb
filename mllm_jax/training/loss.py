"""Cross-entropy that never holds the logits of a whole batch, and makes none for places that are not trained on."""

import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from mllm_jax.models.decoder import Decoder
from mllm_jax.sharding import BATCH_AXES

CHUNK_BYTES = 2**27  # float32 logits held at a time, on each device


def summed_cross_entropy(decoder: Decoder, hidden: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
  """Sum over places of weight * -log softmax(logits)[target], a float32 scalar.

  hidden [B, S, D], targets int [B, S], weights float [B, S]. Each device brings the trained places of its rows to the
  front and cuts them into chunks, whose logits are made, used and, in the backward pass, made again: memory is that of
  one chunk. Chunks without a trained place are skipped.
  """
  mesh = jax.sharding.get_abstract_mesh()
  arrays = (decoder.head_kernel(), hidden, targets, weights)
  run = lambda *arrays: _loss_of_rows(decoder, *arrays)
  if mesh.empty or len(hidden) % math.prod(mesh.shape[axis] for axis in BATCH_AXES):
    return run(*arrays).sum()
  # The head's kernel is gathered once, and its gradient added up over devices once: left to the compiler, each chunk
  # would do both.
  rows = P(BATCH_AXES)
  return jax.shard_map(
    run, in_specs=(P(), rows, rows, rows), out_specs=rows, axis_names=set(BATCH_AXES), check_vma=False
  )(*arrays).sum()


def _loss_of_rows(decoder, kernel, hidden, targets, weights):
  """The summed loss, [1], of the rows at hand."""
  flat = lambda x: x.reshape(-1, *x.shape[2:])
  hidden, targets, weights = flat(hidden), flat(targets), flat(weights)
  places = len(hidden)
  chunks = min(places, max(1, -(-places * decoder.config.vocab_size * 4 // CHUNK_BYTES)))

  def chunk_loss(hidden, targets, weights):
    logits = decoder.logits(hidden, kernel)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.sum(weights * (jax.nn.logsumexp(logits, axis=-1) - picked), keepdims=True)

  if chunks == 1:
    return jax.checkpoint(chunk_loss)(hidden, targets, weights)
  size, order = -(-places // chunks), jnp.argsort(weights == 0, stable=True)

  def cut(x):
    x = x.at[order].get(unique_indices=True, mode="promise_in_bounds")
    return jnp.pad(x, [(0, chunks * size - places)] + [(0, 0)] * (x.ndim - 1)).reshape(chunks, size, *x.shape[1:])

  # The checkpoint is around the branch: inside, each chunk's residuals would hold the head's kernel.
  @jax.checkpoint
  def unless_empty(hidden, targets, weights):
    return jax.lax.cond(weights.any(), chunk_loss, lambda *_: jnp.zeros(1, jnp.float32), hidden, targets, weights)

  total, _ = jax.lax.scan(
    lambda total, xs: (total + unless_empty(*xs), None),
    jnp.zeros(1, jnp.float32),
    (cut(hidden), cut(targets), cut(weights)),
  )
  return total
