"""What the decoder's backward pass computes again, and where it keeps the rest."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from mllm_jax import parameters
from mllm_jax.config import ConfigError, DecoderConfig, LoraConfig
from mllm_jax.models.decoder import Decoder

# One layer of Vicuna-7B and a row of the recipes' length. Nothing is computed: the lowered program is counted, where
# the scan's body stands once.
CONFIG, LORA, PLACES = DecoderConfig(layers=1, vocab_size=8), LoraConfig(rank=128, dropout=0.0), 2048


def gradient(remat):
  """The function that LoRA's training differentiates, and the shapes that it is called with."""
  make = lambda: Decoder(CONFIG, LORA, dtype="bfloat16", remat=remat, rngs=nnx.Rngs(0))
  graphdef, flat = parameters.flatten(nnx.eval_shape(make))
  adapters = {path: x for path, x in flat.items() if "/lora/" in path}
  frozen = {path: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for path, x in flat.items() if path not in adapters}

  def total(adapters, embeddings, frozen, segments):
    decoder = parameters.unflatten(graphdef, frozen | adapters)
    return decoder(embeddings, jnp.arange(PLACES)[None], segments).astype(jnp.float32).sum()

  embeddings = jax.ShapeDtypeStruct((1, PLACES, CONFIG.width), jnp.bfloat16)
  return jax.grad(total, argnums=(0, 1)), (adapters, embeddings, frozen, jax.ShapeDtypeStruct((1, PLACES), jnp.int32))


@functools.cache
def executed(remat):
  function, shapes = gradient(remat)
  return jax.jit(function).lower(*shapes).cost_analysis()["flops"]


@pytest.mark.parametrize("remat, most", [("none", 1.05), ("named", 1.20), ("full", 1.55)])
def test_work_beside_that_of_the_model(remat, most):
  width, mlp = CONFIG.width, CONFIG.mlp_width
  kernels = 4 * width**2 + 3 * width * mlp
  adapters = LORA.rank * (4 * 2 * width + 3 * (width + mlp))
  attention = 3 * 4 * PLACES * width / 2  # causal: half of all pairs
  model = PLACES * (4 * kernels + 6 * adapters + attention)
  assert 1.0 < executed(remat) / model < most - 0.01  # the head's logits, made again too, add less than 0.01
  assert executed("none") <= executed(remat) <= executed("full")


def test_offloading_keeps_in_the_hosts_memory_what_named_keeps_on_the_device():
  kept = {}
  for remat in ("named", "offload"):
    function, shapes = gradient(remat)
    kept[remat] = str(jax.make_jaxpr(function)(*shapes)).count("<host>[")
  assert kept["named"] == 0 < kept["offload"]


def test_an_unknown_policy_is_refused_before_anything_is_computed():
  with pytest.raises(ConfigError, match="model.remat='some' is unknown; known: full, named, offload, none"):
    jax.eval_shape(lambda: Decoder(CONFIG, LORA, dtype="bfloat16", remat="some", rngs=nnx.Rngs(0)))
