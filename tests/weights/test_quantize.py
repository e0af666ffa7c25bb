"""A frozen decoder in int8: what is stored, what it computes, and how it is loaded and handed on."""

import dataclasses

import jax
import jax.numpy as jnp
import layouts
import numpy as np
import pytest
import tiny

from mllm_jax import build, parameters, sharding
from mllm_jax.config import ConfigError, LoraConfig, MeshConfig, ModelConfig, ModelRecipe
from mllm_jax.models import lora
from mllm_jax.models.mllm import abstract
from mllm_jax.weights.quantize import Int8, Rounded
from mllm_jax.weights.tensors import InMemory

KERNEL, SCALE = "decoder/layers/q_proj/kernel", "decoder/layers/q_proj/scale"


class Watched(InMemory):
  """Remembers the most values that were read at once."""

  largest = 0

  def read(self, name, index=()):
    found = super().read(name, index)
    self.largest = max(self.largest, found.size)
    return found


def test_each_channel_is_off_by_half_a_step_at_most():
  kernel = np.random.default_rng(0).normal(size=(3, 16, 8)).astype(np.float32) * np.arange(8)  # one channel of zeros
  source = Watched({KERNEL: kernel, "decoder/head": np.ones((16, 20), np.float32)})
  found = Int8(source)
  assert found.names() == [KERNEL, "decoder/head", SCALE]
  part = (slice(1, 2), slice(3, 9), slice(0, 5))
  assert found.dtype(KERNEL) == found.read(KERNEL, part).dtype == np.int8 and found.dtype(SCALE) == np.float32
  steps, scale = found.read(KERNEL), found.read(SCALE)
  np.testing.assert_array_equal(found.read(KERNEL, part), steps[part])
  assert found.shape(SCALE) == scale.shape == (3, 8)
  assert (np.abs(steps).max(axis=1) == np.where(np.arange(8), 127, 0)).all()
  wanted = kernel.astype(np.float64)
  assert (np.abs(steps * scale[:, None].astype(np.float64) - wanted) <= 0.5001 * scale[:, None]).all()
  np.testing.assert_array_equal(Rounded(source).read(KERNEL, part), (steps * scale[:, None])[part])
  np.testing.assert_array_equal(found.read("decoder/head"), 1)
  source.largest = 0
  Int8(source).read(KERNEL, part)
  assert source.largest == 16 * 8  # a layer, for its scales


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  """(recipe, configuration, parameters) of a tiny model with an int8 decoder, loaded onto eight devices; adapters that
  are not zero."""
  folder = tmp_path_factory.mktemp("towers")
  whole = layouts.model()
  clip = layouts.vision_folder(folder / "clip", whole)
  llm = layouts.decoder_folder(folder / "llm", whole, "pytorch_model.bin")
  recipe = ModelRecipe(
    vision=str(clip),
    llm=str(llm),
    projector=dataclasses.replace(tiny.PROJECTOR),
    dtype="float32",
    frozen_dtype="float32",
    int8_decoder=True,
  )
  config = build.architecture(recipe, LoraConfig(rank=2, alpha=4.0))
  flat = build.load_parameters(config, recipe, rates(config), 0, sharding.make_mesh(MeshConfig(fsdp=4, tensor=2)))
  draw = lambda value: jnp.asarray(np.random.default_rng(1).normal(size=value.shape) * 0.1, jnp.float32)
  return recipe, config, {path: draw(x) if path.endswith("lora/b") else x for path, x in flat.items()}


def rates(config: ModelConfig) -> dict[str, float]:
  shapes = parameters.flatten(abstract(config))[1]
  return {path: 1e-3 if "/lora/" in path or path.startswith("projector/") else 0.0 for path in shapes}


def test_loading_stores_half_of_bfloat16_and_is_sharded(model):
  _, _, flat = model
  assert flat[KERNEL].dtype == jnp.int8 and flat[KERNEL].sharding.spec == jax.P(None, "fsdp", "tensor")
  assert flat[SCALE].dtype == flat["decoder/head"].dtype == jnp.float32
  weights = layouts.arrays(layouts.model(), "decoder")[KERNEL]
  np.testing.assert_allclose(flat[KERNEL] * flat[SCALE][:, None], weights, atol=np.abs(weights).max() / 253)


def test_it_computes_with_the_values_it_stands_for(model):
  """Logits and gradients are those of float kernels with the rounded values, and merging gives these."""
  _, config, flat = model
  plain = dataclasses.replace(config, int8_decoder=False)
  stored = {path: np.asarray(x) for path, x in flat.items() if path.startswith("decoder/")}
  originals = layouts.arrays(layouts.model(), "decoder")
  rounded = {
    path: Rounded(InMemory(originals)).read(path) if path in originals else x
    for path, x in stored.items()
    if not path.endswith("_proj/scale")
  }
  ids = np.random.default_rng(0).integers(0, config.decoder.vocab_size, (2, 12))
  segments, places = np.ones((2, 12), np.int32), np.tile(np.arange(12), (2, 1))

  def runner(config):
    graphdef = parameters.flatten(abstract(config).decoder)[0]

    def scalar(adapters, bare):
      decoder = parameters.unflatten(graphdef, bare | adapters)
      logits = decoder.logits(decoder(decoder.embed(ids), places, segments))
      return jnp.cos(logits).sum(), logits

    run = jax.jit(jax.value_and_grad(scalar, has_aux=True))
    return graphdef, lambda bare: run({path: x for path, x in bare.items() if "/lora/" in path}, bare)

  bare = lambda flat: {path.removeprefix("decoder/"): x for path, x in flat.items()}
  graphdef, run = runner(config)
  (_, found), gradient = run(bare(stored))
  _, run = runner(plain)
  (_, expected), expected_gradient = run(bare(rounded))
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
  for path, value in expected_gradient.items():
    np.testing.assert_allclose(gradient[path], value, rtol=1e-4, atol=1e-5)
  (_, exact), _ = run(bare(rounded | originals))
  deviation = np.sqrt(np.square(found - exact).mean() / np.square(exact).mean())
  assert 1e-4 < deviation < 0.02
  merged = lora.merge(parameters.unflatten(graphdef, jax.tree.map(jnp.asarray, bare(stored))))
  assert merged.layers.q_proj.scale is None and merged.layers.q_proj.kernel[...].dtype == jnp.float32
  a, b = (np.asarray(stored[f"decoder/layers/q_proj/lora/{name}"]) for name in "ab")
  np.testing.assert_allclose(merged.layers.q_proj.kernel[...], rounded[KERNEL] + a @ b * 2.0, atol=1e-6)


def test_a_decoder_that_is_trained_is_refused(model):
  recipe, config, _ = model
  table = rates(config) | {"decoder/layers/up_proj/kernel": 1e-5}
  with pytest.raises(ConfigError, match="int8_decoder is for a frozen decoder, and decoder/layers/up_proj/kernel is"):
    build.load_parameters(config, recipe, table, 0, sharding.make_mesh(MeshConfig()))
