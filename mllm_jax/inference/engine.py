"""Engine: answers to prompts, a whole batch in one compiled function or one row token by token."""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mllm_jax import sharding
from mllm_jax.batch import Batch
from mllm_jax.inference.sampling import sample
from mllm_jax.inference.settings import GREEDY, Sampling
from mllm_jax.models.decoder import KVCache
from mllm_jax.models.mllm import Mllm


class Engine:
  """A model that answers.

  Batches are prompts as `data.processor.Processor.prompt` makes them: one conversation a row, padded on the right. An
  answer depends neither on the padding nor on the other rows; in low precision only up to rounding, since other
  shapes may add in another order.

  Args:
    model: its arrays may be spread over devices.
    eos_id: the token that ends an answer.
    mesh: where rows are split over the batch axes of `mllm_jax.sharding`; None leaves the batch on the default device.
  """

  def __init__(self, model: Mllm, eos_id: int, *, mesh: Mesh | None = None):
    self.model = model
    self.eos_id = eos_id
    self.mesh = mesh

  def generate(self, batch: Batch, max_new_tokens: int, sampling: Sampling = GREEDY, seed: int = 0) -> list[list[int]]:
    """The answer to every row: token ids without the end-of-sequence token, at most `max_new_tokens` of them.

    An answer shorter than that was ended by the model. Compiled once for each (rows, prompt places, max_new_tokens,
    sampling). With several processes each passes the same whole batch and gets every answer.

    Raises:
      ValueError: max_new_tokens below 1, a row without a prompt, or rows that the mesh cannot split evenly.
    """
    batch = self._checked(batch, max_new_tokens)
    if self.mesh is not None:
      batch = _split_rows(batch, self.mesh)
    ids = _generate(
      self.model,
      batch,
      jax.random.key(seed),
      np.int32(self.eos_id),
      max_new_tokens=max_new_tokens,
      sampling=sampling,
      mesh=self.mesh,
    )
    return [_until(row, self.eos_id) for row in np.asarray(ids).tolist()]

  def stream(self, batch: Batch, max_new_tokens: int, sampling: Sampling = GREEDY, seed: int = 0) -> Iterator[int]:
    """The token ids of the answer to a batch of one row, each as soon as it is known; the same ids as `generate` gives.

    Raises:
      ValueError: as `generate`, and more than one row; raised at the call, before the first token is asked for.
    """
    batch = self._checked(batch, max_new_tokens)
    if len(batch.tokens) != 1:
      raise ValueError(f"a stream answers one row, and the batch has {len(batch.tokens)}; use generate")
    return self._stream(batch, max_new_tokens, sampling, jax.random.key(seed))

  def _stream(self, batch: Batch, max_new_tokens: int, sampling: Sampling, key: jax.Array) -> Iterator[int]:
    state = _start(self.model, batch, key, max_new_tokens=max_new_tokens, sampling=sampling)
    for step in range(max_new_tokens):
      if step:
        state = _advance(self.model, state, key, sampling=sampling)
      token = int(state.tokens[0])
      if token == self.eos_id:
        return
      yield token

  def _checked(self, batch: Batch, max_new_tokens: int) -> Batch:
    if max_new_tokens < 1:
      raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    if not np.asarray(batch.segment_ids).any(axis=1).all():
      raise ValueError("a row of the batch is all padding; every row needs a prompt")
    return batch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
  """step: int32, tokens chosen before this one. tokens [B]: the last chosen ones. positions [B]: where they belong."""

  step: jax.Array
  tokens: jax.Array
  positions: jax.Array
  cache: KVCache


def prefill(model: Mllm, batch: Batch, slots: int, mesh: Mesh | None = None) -> tuple[jax.Array, KVCache]:
  """Reads prompts [B, S] into a new cache of `slots` places; float32 logits [B, V] after each row's last token."""
  rows, places = batch.tokens.shape
  decoder = model.decoder
  cache = _split_cache(KVCache.empty(decoder.config, rows, slots, decoder.dtype), mesh)
  # The batch says position 0 for padding, which would overwrite the first token's slot. Counted on instead, padding
  # lies in the slots after the prompt: no prompt token sees them, and a new token overwrites its own.
  positions = jnp.broadcast_to(jnp.arange(places), (rows, places))
  embeddings = model.embed(batch.tokens, batch.visual_index, model.visual_tokens(batch.patches, batch.grids))
  hidden, cache = decoder.extend(embeddings, positions, cache)
  last = jnp.take_along_axis(hidden, (_lengths(batch) - 1)[:, None, None], axis=1)[:, 0]
  return decoder.logits(last), cache


def decode(model: Mllm, tokens: jax.Array, positions: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
  """float32 logits [B, V] after one more token [B] of each row, at that row's own position [B]."""
  hidden, cache = model.decoder.extend(model.decoder.embed(tokens[:, None]), positions[:, None], cache)
  return model.decoder.logits(hidden[:, 0]), cache


def _first(model, batch, key, max_new_tokens, sampling, mesh=None) -> _State:
  logits, cache = prefill(model, batch, batch.tokens.shape[1] + max_new_tokens, mesh)
  tokens = sample(logits, jax.random.fold_in(key, 0), sampling)
  return _State(jnp.zeros((), jnp.int32), tokens, _lengths(batch), cache)


def _next(model, state: _State, key, sampling) -> _State:
  logits, cache = decode(model, state.tokens, state.positions, state.cache)
  step = state.step + 1
  return _State(step, sample(logits, jax.random.fold_in(key, step), sampling), state.positions + 1, cache)


# The model is an argument and never closed over: captured arrays would be compiled into the program as constants.
_start = functools.partial(jax.jit, static_argnames=("max_new_tokens", "sampling"))(_first)
_advance = functools.partial(jax.jit, static_argnames=("sampling",), donate_argnames=("state",))(_next)


@functools.partial(jax.jit, static_argnames=("max_new_tokens", "sampling", "mesh"))
def _generate(model, batch, key, eos_id, *, max_new_tokens, sampling, mesh) -> jax.Array:
  """int32 [B, max_new_tokens]; what follows an end-of-sequence token is end-of-sequence tokens."""
  state = _first(model, batch, key, max_new_tokens, sampling, mesh)
  ids = jnp.full((batch.tokens.shape[0], max_new_tokens), eos_id, jnp.int32).at[:, 0].set(state.tokens)

  def unfinished(carry):
    state, ids, ended = carry
    return (state.step < max_new_tokens - 1) & ~ended.all()

  def extend(carry):
    state, ids, ended = carry
    state = _next(model, state, key, sampling)
    tokens = jnp.where(ended, eos_id, state.tokens)
    return state, ids.at[:, state.step].set(tokens), ended | (tokens == eos_id)

  _, ids, _ = jax.lax.while_loop(unfinished, extend, (state, ids, state.tokens == eos_id))
  return ids if mesh is None else jax.lax.with_sharding_constraint(ids, sharding.replicated(mesh))


def _lengths(batch: Batch) -> jax.Array:
  return (batch.segment_ids > 0).sum(axis=1, dtype=jnp.int32)


def _split_cache(cache: KVCache, mesh: Mesh | None) -> KVCache:
  """The cache with its rows where the batch's are; left to itself, the compiler may replicate what a loop carries."""
  if mesh is None:
    return cache
  free = P.UNCONSTRAINED
  rows = NamedSharding(mesh, P(free, sharding.BATCH_AXES, free, free, free))
  return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, rows), cache)


def _split_rows(batch: Batch, mesh: Mesh) -> Batch:
  """A host batch, the same in every process, as global arrays with their rows split over the mesh."""
  shards, rows = sharding.batch_shards(mesh), len(batch.tokens)
  if rows % shards:
    raise ValueError(
      f"a batch of {rows} rows cannot be split over {shards} groups of devices; use a multiple of {shards}"
    )
  split = NamedSharding(mesh, P(sharding.BATCH_AXES))
  place = lambda x: jax.make_array_from_callback(x.shape, split, lambda index: x[index])
  return jax.tree.map(lambda x: place(np.asarray(x)), batch)


def _until(ids: list[int], eos_id: int) -> list[int]:
  return ids[: ids.index(eos_id)] if eos_id in ids else ids
