"""How a decoder gives one more token of each row: by itself, or, on one CPU, arranged for it."""

import dataclasses

import jax
from flax import nnx
from jax.sharding import Mesh

from mllm_jax import parameters
from mllm_jax.config import DecoderConfig
from mllm_jax.inference.one_cpu import AT_ONCE, SMALL, OneCpu
from mllm_jax.models.decoder import KVCache
from mllm_jax.models.mllm import Mllm


@dataclasses.dataclass(frozen=True)
class Stacked:
  """Decoding by the decoder itself, wherever it lies; hidden states are of type `dtype`."""

  decoder: nnx.GraphDef
  config: DecoderConfig
  dtype: str
  at_once: int = 1

  def weights(self, model: Mllm) -> parameters.Flat:
    """The decoder's parameters."""
    return parameters.flatten(model.decoder)[1]

  def empty(self, rows: int) -> KVCache:
    """A cache of no places."""
    return KVCache.empty(self.config, self.config.layers, rows, 0, self.dtype)

  def step(self, flat: parameters.Flat, tokens: jax.Array, positions: jax.Array, cache: KVCache):
    """(float32 logits [B, V] after `tokens` [B] at `positions` [B], the cache with them in it)."""
    decoder = parameters.unflatten(self.decoder, flat)
    hidden, cache = decoder.extend(decoder.embed(tokens[:, None]), positions[:, None], cache)
    return decoder.logits(hidden[:, 0]), cache


def decoding_of(model: Mllm, mesh: Mesh | None) -> Stacked | OneCpu:
  """The faster way for where the model lies."""
  config, dtype = model.config.decoder, str(model.decoder.dtype)
  graphdef, flat = parameters.flatten(model.decoder)
  devices = flat["norm/scale"].devices()
  one_cpu = mesh is None and len(devices) == 1 and next(iter(devices)).platform == "cpu"
  if one_cpu and not any("/lora/" in path for path in flat):
    return OneCpu(config, dtype, AT_ONCE if sum(x.size for x in flat.values()) < SMALL else 1)
  return Stacked(graphdef, config, dtype)
