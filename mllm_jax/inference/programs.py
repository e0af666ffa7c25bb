"""The compiled functions of an engine: looking at crops, reading prompts, and one more token of each row.

They take the parameters as arguments, never closed over: captured arrays would be compiled in as constants.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mllm_jax import parameters, sharding
from mllm_jax.inference.decoding import Stacked, decoding_of
from mllm_jax.inference.one_cpu import OneCpu
from mllm_jax.inference.sampling import Draws, sample
from mllm_jax.models.decoder import KVCache
from mllm_jax.models.mllm import Mllm


class Programs:
  """What an engine runs on a model's parameters `flat` and on those of `decoding` (see `decoding`).

  Caches are donated: the one that a function returns lies where the given one lay.
  """

  def __init__(self, graphdef: nnx.GraphDef, decoding: Stacked | OneCpu, mesh: Mesh | None):
    self._graphdef, self._decoding, self.mesh = graphdef, decoding, mesh
    self.encode = jax.jit(self._encode)
    self.prefill = jax.jit(self._prefill, static_argnames="candidates")
    self.write = jax.jit(self._write, donate_argnames="cache")
    self.decode = jax.jit(self._decode, static_argnames=("candidates", "count"), donate_argnames="cache")
    self.resize = jax.jit(self._resize, static_argnames=("rows", "places"))
    self.permute = jax.jit(self._permute, donate_argnames="cache")

  def _encode(self, flat, patches, grids) -> tuple[jax.Array, ...]:
    """uint8 patches [N, P, 3 p p] of crops and grids [N, 2] -> the visual tokens [T, D] of each."""
    model = parameters.unflatten(self._graphdef, flat)
    tokens = self._whole(model.visual_tokens(patches[:, None], grids[:, None]))
    return tuple(tokens[i] for i in range(len(tokens)))

  def _prefill(self, flat, prompts, features, draws: Draws, candidates: int):
    """Reads prompts. (next tokens [1, n], candidates of beams, what `write` puts into the cache.)

    prompts: int32 [3, n, S], tokens, visual_index and segment_ids of rows padded on the right. features: [T, D] of n K
    crops, row by row, K the same for all.
    """
    model = parameters.unflatten(self._graphdef, flat)
    tokens, visual_index, segment_ids = prompts
    count = len(tokens)
    width = model.decoder.config.width
    visual = jnp.stack(features).reshape(count, -1, width) if features else jnp.zeros((count, 1, width))
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, read = model.decoder.read(model.embed(tokens, visual_index, visual), positions, segment_ids)
    last = (segment_ids > 0).sum(axis=1) - 1
    logits = model.decoder.logits(jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0])
    tokens, likeliest = self._chosen(logits, draws, candidates)
    return tokens[None], likeliest, read

  def _write(self, cache, read, slots):
    """Puts what prompts left into rows `slots` [n] of the cache; a number beyond its rows leaves one out."""

    def write(stored, new):
      return stored.at[:, slots, :, : new.shape[3]].set(new, mode="drop")

    if isinstance(cache, KVCache):
      return self._by_row(jax.tree.map(write, cache, read))
    layer = lambda l: jax.tree.map(lambda new: new[l : l + 1], read)
    return [jax.tree.map(write, own, layer(l)) for l, own in enumerate(cache)]

  def _decode(self, decoding, last, draws: Draws, known, cache, candidates: int, count: int):
    """`count` more tokens of each row, which is 1 where there are candidates.

    last: int32 [B, 2] of each row's last token and its position; where the token is negative it stands in `known` [B].
    Returns (tokens [count, B], the last of them for the next call, candidates of beams, cache).
    """

    def one(carry, done):
      tokens, cache = carry
      logits, cache = self._decoding.step(decoding, tokens, last[:, 1] + done, cache)
      tokens, likeliest = self._chosen(logits, draws.later(done), candidates)
      return (tokens, self._by_row(cache)), (tokens, likeliest)

    start = jnp.where(last[:, 0] < 0, known, last[:, 0]), cache
    if count == 1:
      (tokens, cache), (_, likeliest) = one(start, 0)
      return tokens[None], tokens, likeliest, cache
    (tokens, cache), (each, likeliest) = jax.lax.scan(one, start, jnp.arange(count))
    return each, tokens, likeliest, cache

  def _chosen(self, logits, draws, candidates):
    """(next tokens [B], (log probabilities, tokens) of the likeliest [B, candidates] or None where that is 0)."""
    logits = self._whole(logits)
    tokens = self._whole(sample(logits, draws))
    if not candidates:
      return tokens, None
    likeliest = jax.lax.top_k(jax.nn.log_softmax(logits), min(candidates, logits.shape[-1]))
    return tokens, tuple(map(self._whole, likeliest))

  def _resize(self, cache, rows: int, places: int):
    """A cache of so many rows and places, with what fits of the given one."""

    def resize(x):
      kept = x[:, :rows, :, :places]
      more = [(0, 0), (0, rows - kept.shape[1]), (0, 0), (0, places - kept.shape[3]), (0, 0)]
      return jnp.pad(kept, more)

    return self._by_row(jax.tree.map(resize, cache))

  def _permute(self, cache, sources):
    """Row b becomes what row sources[b] was; int32 [B]."""
    return self._by_row(jax.tree.map(lambda x: x[:, sources], cache))

  def _by_row(self, cache):
    """The cache with its rows where a batch's are; left to itself, the compiler may replicate it."""
    if self.mesh is None:
      return cache
    rows = NamedSharding(self.mesh, P(None, sharding.BATCH_AXES))
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, rows), cache)

  def _whole(self, x: jax.Array) -> jax.Array:
    """x on every device, so that every process can read it."""
    return x if self.mesh is None else jax.lax.with_sharding_constraint(x, sharding.replicated(self.mesh))

  def on_devices(self, tree: Any) -> Any:
    """Host arrays, the same in every process, where the functions want them."""
    if self.mesh is None:
      return tree
    whole = sharding.replicated(self.mesh)
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, whole, lambda index: x[index]), tree)

  @property
  def at_once(self) -> int:
    """How many tokens a call of `decode` best gives."""
    return self._decoding.at_once

  def unknown(self, rows: int) -> jax.Array:
    """`decode`'s `known` where all tokens are given."""
    return jnp.asarray(self.on_devices(np.zeros(rows, np.int32)))

  def empty(self) -> Any:
    """A cache of no places, for `resize`."""
    shards = 1 if self.mesh is None else sharding.batch_shards(self.mesh)
    return self.on_devices(jax.tree.map(np.asarray, self._decoding.empty(shards)))


@functools.lru_cache(maxsize=16)
def programs_for(*structure) -> Programs:
  """The same functions for models of the same structure, so that none is compiled twice."""
  return Programs(*structure)


def parameters_of(model: Mllm, mesh: Mesh | None) -> tuple[Programs, parameters.Flat, Any]:
  """(programs, the whole model's parameters, those that decode)."""
  model = jax.tree.map(jnp.asarray, model)  # a model of NumPy arrays is put on a device once, not at every call
  graphdef, flat = parameters.flatten(model)
  decoding = decoding_of(model, mesh)
  return programs_for(graphdef, decoding, mesh), flat, decoding.weights(model)
