"""The loss's chunks: which are computed, and on several devices. That its value is right: test_step.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mllm_jax import sharding
from mllm_jax.config import DecoderConfig, LoraConfig, MeshConfig
from mllm_jax.models.decoder import Decoder
from mllm_jax.training import loss as loss_lib

ROWS, PLACES, VOCABULARY, WIDTH = 4, 24, 40, 16
CHUNK = 8  # places


@pytest.fixture(scope="module")
def gradient():
  """(hidden, targets, weights) -> (loss, gradient by hidden)."""
  config = DecoderConfig(vocab_size=VOCABULARY, width=WIDTH, layers=1, heads=2, kv_heads=2, head_width=8, mlp_width=16)
  decoder = Decoder(config, LoraConfig(), dtype="float32", remat="none", rngs=nnx.Rngs(0))
  graphdef, weights = nnx.split(decoder)
  call = lambda *xs: loss_lib.summed_cross_entropy(nnx.merge(graphdef, weights), *xs)
  return jax.jit(jax.value_and_grad(call))


def draw(share=0.25):
  rng = np.random.default_rng(0)
  hidden = rng.normal(size=(ROWS, PLACES, WIDTH)).astype(np.float32)
  trained = np.zeros(ROWS * PLACES, np.float32)
  trained[rng.permutation(trained.size)[: round(share * trained.size)]] = 1
  return hidden, rng.integers(0, VOCABULARY, (ROWS, PLACES)), trained.reshape(ROWS, PLACES)


def test_chunks_without_a_trained_place_are_not_computed(gradient, monkeypatch):
  """Twenty-four trained places fill three of twelve chunks: a NaN at any other place would show if it were read."""
  monkeypatch.setattr(loss_lib, "CHUNK_BYTES", CHUNK * VOCABULARY * 4)
  hidden, targets, weights = draw()
  assert weights.sum() == 3 * CHUNK
  expected = gradient(hidden, targets, weights)
  poisoned = np.where(weights[..., None] > 0, hidden, np.nan)
  for found, wanted in zip(gradient(poisoned, targets, weights), expected):
    np.testing.assert_array_equal(found, wanted)
  assert not np.asarray(expected[1])[weights == 0].any()
  nothing = gradient(np.full_like(hidden, np.nan), targets, np.zeros_like(weights))
  assert nothing[0] == 0 and not np.asarray(nothing[1]).any()


def test_on_several_devices_each_sorts_its_own_rows(gradient, monkeypatch):
  monkeypatch.setattr(loss_lib, "CHUNK_BYTES", CHUNK * VOCABULARY * 4)
  arrays = draw(share=0.4)
  expected = gradient(*arrays)
  mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2), jax.devices()[:4])
  rows = jax.NamedSharding(mesh, jax.P(sharding.BATCH_AXES))
  with jax.set_mesh(mesh):
    compiled = gradient.lower(*(jax.device_put(jnp.asarray(x), rows) for x in arrays)).compile()
    found = compiled(*(jax.device_put(jnp.asarray(x), rows) for x in arrays))
  for one, other in zip(found, expected):
    np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)
  # Nothing but scalars crosses between devices.
  program = compiled.as_text()
  assert "all-reduce" in program and not any(kind in program for kind in ("all-gather", "all-to-all", "permute("))
