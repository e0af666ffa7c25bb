"""What of the image a word of the answer hangs on, over the pyramid's levels (LLaVA-UHD v2, figure 7).

The paper shows activations of a text token on each level and does not say how they are computed. Here a cell's is the
first-order estimate of what the word's log-probability owes to it: the sum over channels of its features times their
gradient, where that is above 0 (as in Grad-CAM, Selvaraju et al. 2017, without averaging gradients over the map, as a
cell is seen by the queries of its own window alone).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from mllm_jax.batch import Batch
from mllm_jax.data.processor import Processor, collate
from mllm_jax.data.records import IMAGE_PLACEHOLDER, Turn
from mllm_jax.models.mllm import Mllm
from mllm_jax.visualization import pictures
from mllm_jax.visualization.crops import Crop
from mllm_jax.visualization.page import Figure, Section

FULL = 99.5  # percentile of a level's activations that has the warmest colour


class Asked(NamedTuple):
  """A prompt with the word behind it, and where that is predicted.

  batch: one row [1, S]. places: int32 [n], each followed by one of the word's tokens. tokens: int32 [n]; -1 for
  whatever the model finds likeliest.
  """

  batch: Batch
  places: np.ndarray
  tokens: np.ndarray


def ask(processor: Processor, picture: Image.Image, question: str, word: str) -> Asked:
  """The question about a picture with a word for an answer, "" for the first token of the model's own.

  Raises DataError where the question has the placeholder of another image.
  """
  human = Turn("human", f"{IMAGE_PLACEHOLDER}\n{question}")
  row = processor.with_room(1).prompt([human], [picture])
  crops = processor.aspect.crops_of(*picture.size)
  start = len(row.tokens)
  batch = collate([row._replace(patches=row.patches[:crops], grids=row.grids[:crops])])
  if not word:
    return Asked(batch, np.array([start - 1], np.int32), np.array([-1], np.int32))
  answered = processor([[human, Turn("gpt", word)]], [[picture]])
  ids = answered.tokens[0, start:]
  ids = ids[: list(ids).index(processor.end_id)] if processor.end_id in ids else ids
  whole = Batch(**vars(answered) | {name: getattr(batch, name) for name in ("patches", "grids")})
  return Asked(whole, np.arange(start - 1, start - 1 + len(ids), dtype=np.int32), np.asarray(ids, np.int32))


@jax.jit
def _activations(model: Mllm, batch: Batch, crop: jax.Array, places: jax.Array, tokens: jax.Array):
  """({level: float32 [4^level P]}, the word's log-probability, its tokens)."""
  projector = model.projector
  images = model.vision.normalise(batch.patches)
  features = model.vision(images, batch.grids)
  every = projector(features, images, batch.grids)
  grids = batch.grids[:, crop]
  maps = projector.pyramid(features[:, crop], images[:, crop], grids)

  def score(maps):
    visual = every.at[:, crop].set(projector.resampler(maps, grids))
    embeddings = model.embed(batch.tokens, batch.visual_index, visual.reshape(1, -1, visual.shape[-1]))
    hidden = model.decoder(embeddings, batch.positions, batch.segment_ids)
    chances = jax.nn.log_softmax(model.decoder.logits(hidden[:, places])[0])
    chosen = jnp.where(tokens < 0, chances.argmax(-1), tokens)
    return jnp.take_along_axis(chances, chosen[:, None], axis=-1).sum(), chosen

  (chance, chosen), gradients = jax.value_and_grad(score, has_aux=True)(maps)
  owed = jax.tree.map(lambda x, g: (x.astype(jnp.float32) * g.astype(jnp.float32)).sum(-1)[0], maps, gradients)
  return jax.tree.map(lambda x: jnp.maximum(x, 0), owed), chance, chosen


def activations(model: Mllm, asked: Asked, crop: Crop) -> tuple[dict[int, np.ndarray], float, list[int]]:
  """({level: float32 [2^level h, 2^level w], 0 or above}, the word's log-probability, its tokens)."""
  maps, chance, tokens = _activations(model, asked.batch, crop.number, asked.places, asked.tokens)
  height, width = crop.grid
  cut = lambda level, x: np.asarray(x)[: 4**level * height * width].reshape(height << level, width << level)
  return {level: cut(level, x) for level, x in maps.items()}, float(chance), np.asarray(tokens).tolist()


def section(model: Mllm, processor: Processor, picture: Image.Image, crop: Crop, question: str, word: str) -> Section:
  """The crop, and beside it what of it the word hangs on at each level."""
  found, chance, tokens = activations(model, ask(processor, picture, question, word), crop)
  word = word or processor.tokenizer.decode(tokens).strip() or "the end of the answer"
  step = crop.step
  plain = crop.enlarged(step)
  height, width = plain.shape[:2]
  total = sum(x.sum() for x in found.values()) or 1.0
  row = [Figure("asked", plain, f"Crop {crop.number}", question)]
  for level, x in found.items():
    warmth = pictures.heat(x / (np.percentile(x, FULL) or 1.0), width, height)
    caption = f"{x.shape[1]} x {x.shape[0]} cells, {x.sum() / total:.0%} of all activation in this crop."
    row.append(Figure(f"activation-{level}", pictures.overlay(plain, warmth), f"Level {level}", caption))
  text = (
    f"To “{question}” the model answers “{word}” with probability {np.exp(chance):.2g}. The warmer a cell, the more of "
    "that answer's log-probability is owed to its features (features times gradient, where positive); each level has "
    "colours of its own."
  )
  return Section(f"Activation of “{word}” in crop {crop.number}", text, [row])
