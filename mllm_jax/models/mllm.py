"""The whole model: vision tower -> projector -> splice -> decoder."""

import jax
import jax.numpy as jnp
from flax import nnx

from mllm_jax.batch import NEWLINE, Batch
from mllm_jax.config import ModelConfig
from mllm_jax.models import projectors
from mllm_jax.models.decoder import Decoder
from mllm_jax.models.vision import VisionTower
from mllm_jax.sharding import rows_only


class Mllm(nnx.Module):
  """A LLaVA-type multimodal language model."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    self.config = config
    any_aspect = config.projector.any_aspect
    common = dict(dtype=config.dtype, attention=config.attention, rngs=rngs)
    self.vision = VisionTower(config.vision, any_aspect=any_aspect, remat=config.remat != "none", **common)
    self.projector = projectors.make(config, rngs)
    own = dict(remat=config.remat, packed=config.packed, int8=config.int8_decoder)
    self.decoder = Decoder(config.decoder, config.lora, **own, **common)

  def visual_tokens(self, patches: jax.Array, grids: jax.Array) -> jax.Array:
    """uint8 patches of crops [B, K, P, 3 p p], their grids [B, K, 2] -> visual tokens [B, K*T, D]; all crops in one
    pass of the tower."""
    images = self.vision.normalise(patches)
    tokens = self.projector(self.vision(images, grids), images, grids)
    return tokens.reshape(len(tokens), -1, tokens.shape[-1])

  def embed(self, tokens: jax.Array, visual_index: jax.Array, visual_tokens: jax.Array) -> jax.Array:
    """The decoder's input [B, S, D]: token embeddings, row `visual_index` of the visual tokens where it is one, and the
    projector's newline where `visual_index` is NEWLINE (which a projector without one never sees)."""
    text, visual_tokens = rows_only(self.decoder.embed(tokens)), rows_only(visual_tokens)
    visual = jnp.take_along_axis(visual_tokens, jnp.maximum(visual_index, 0)[..., None], axis=1)
    embeddings = rows_only(jnp.where((visual_index >= 0)[..., None], visual.astype(text.dtype), text))
    if not self.config.projector.image_newline:
      return embeddings
    newline = self.projector.image_newline[...].astype(text.dtype)
    return jnp.where((visual_index == NEWLINE)[..., None], newline, embeddings)

  def hidden(self, batch: Batch, dropout_key: jax.Array | None = None) -> jax.Array:
    """Normed hidden states [B, S, D] of a batch. With a key the adapters' dropout is active."""
    embeddings = self.embed(batch.tokens, batch.visual_index, self.visual_tokens(batch.patches, batch.grids))
    return self.decoder(embeddings, batch.positions, batch.segment_ids, dropout_key)

  def logits(self, batch: Batch) -> jax.Array:
    """float32 [B, S, V]. Training never calls this: it takes the loss from hidden states, chunk by chunk."""
    return self.decoder.logits(self.hidden(batch))


def abstract(config: ModelConfig) -> Mllm:
  """The model with shapes and types instead of arrays: nothing is allocated."""
  return nnx.eval_shape(lambda: Mllm(config, rngs=nnx.Rngs(0)))
