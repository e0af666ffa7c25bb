"""Likelihoods of given answers, by which tasks rank options: an answer is read behind its question in one pass."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from PIL import Image

from mllm_jax import parameters, sharding
from mllm_jax.data import chat
from mllm_jax.data.processor import Processor, Row, pad_row
from mllm_jax.data.records import DataError, Turn

ANSWER_PLACES = tuple(8 * 4**i for i in range(13))  # that an answer's tokens are counted in


class Likelihood(NamedTuple):
  """log_probability: of the whole answer with the token that ends it, natural logarithm. tokens: how many these are.
  greedy: whether each is the likeliest, so that a greedy answer would be this one."""

  log_probability: float
  tokens: int
  greedy: bool


def answer_row(
  processor: Processor, turns: Sequence[Turn], pictures: Sequence[Image.Image], system: str | None = None
) -> Row:
  """A row as in training, of which the last answer alone is weighted, up to the token that ends it.

  Args:
    turns: ending with the model's, which is the answer; `<image>` once in the human turns for each picture.
    pictures, system: as `Processor.prompt` takes them.

  Raises:
    DataError: as `Processor.prompt`, or the answer is empty.
  """
  prompt = processor.prompt(turns[:-1], pictures, system=system)
  encoded = chat.encode(turns, processor.template, processor.tokenizer, len(pictures), system)
  places = processor.places(encoded, [picture.size for picture in pictures])
  shared = min(len(prompt.tokens), len(places.tokens))
  differing = np.flatnonzero(prompt.tokens[:shared] != places.tokens[:shared])
  first = differing[0] if len(differing) else shared  # of the answer's tokens
  weights = places.loss_weights * (np.arange(1, len(places.tokens) + 1) >= first)
  counted = np.flatnonzero(weights)
  ends = np.flatnonzero(places.targets[counted] == processor.end_id)
  if len(ends):  # a template may train on what stands behind it
    weights[counted[ends[0]] + 1 :] = 0
  if not turns[-1].text or not len(counted):
    raise DataError("the answer is empty, and has no likelihood; leave it out")
  return Row(*places._replace(loss_weights=weights.astype(np.float32)), prompt.patches, prompt.grids)


def arrays(rows: Sequence[Row], count: int, places: int) -> tuple[np.ndarray, np.ndarray]:
  """(int32 [3, count, places], int32 [2, count, A]) of rows, the last one again where there are fewer than `count`:
  tokens, visual_index and segment_ids; the places whose next token counts, and those tokens, -1 for none."""
  found = [np.flatnonzero(row.loss_weights) for row in rows]
  longest = max(map(len, found))
  answers = np.full((2, count, next(size for size in ANSWER_PLACES if size >= longest)), -1, np.int32)
  for i, (row, own) in enumerate(zip(rows, found)):
    answers[:, i, : len(own)] = own, row.targets[own]
  padded = [pad_row(row, places) for row in [*rows, *rows[-1:] * (count - len(rows))]]
  fields = np.stack([[row.tokens, row.visual_index, row.segment_ids] for row in padded], axis=1)
  return fields.astype(np.int32), answers


@functools.lru_cache(maxsize=16)
def program_for(graphdef: nnx.GraphDef, mesh: Mesh | None):
  """The compiled (flat parameters, *`arrays`, features) -> (log probabilities float32 [n], greedy bool [n]).

  features: visual tokens [T, D] of n K crops, row by row, K the same for all. Logits are made for one token of each
  answer at a time.
  """

  def run(flat, rows, answers, features):
    model = parameters.unflatten(graphdef, flat)
    tokens, visual_index, segment_ids = rows
    count, width = len(tokens), model.decoder.config.width
    visual = jnp.stack(features).reshape(count, -1, width) if features else jnp.zeros((count, 1, width))
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden = model.decoder(model.embed(tokens, visual_index, visual), positions, segment_ids)
    places, wanted = answers
    hidden = jnp.take_along_axis(hidden, jnp.maximum(places, 0)[..., None], axis=1)

    def token(found, xs):
      (total, greedy), (hidden, wanted) = found, xs
      logits = model.decoder.logits(hidden)
      picked = jnp.take_along_axis(logits, jnp.maximum(wanted, 0)[:, None], axis=-1)[:, 0]
      counted = wanted >= 0
      total += jnp.where(counted, picked - jax.nn.logsumexp(logits, axis=-1), 0)
      return (total, greedy & (~counted | (jnp.argmax(logits, axis=-1) == wanted))), None

    start = jnp.zeros(count, jnp.float32), jnp.ones(count, bool)
    found, _ = jax.lax.scan(token, start, (hidden.swapaxes(0, 1), wanted.T))
    return found if mesh is None else jax.lax.with_sharding_constraint(found, sharding.replicated(mesh))

  return jax.jit(run)
