"""Sliding windows: every implementation against float64, packed rows, the cache; and Llama 3.1's rotary angles."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import both, causal_mask, draw, expected, segments_of

from mllm_jax import flops
from mllm_jax.batch import Batch
from mllm_jax.config import DecoderConfig, LoraConfig, VisionConfig
from mllm_jax.models import attention
from mllm_jax.models.decoder import Decoder, KVCache, rotary_angles

CONFIG = DecoderConfig(
  vocab_size=40, width=16, layers=2, heads=2, kv_heads=1, head_width=8, mlp_width=32, sliding_window=5
)
WINDOW = 7
JITTED = jax.jit(lambda *arrays: attention.causal(*arrays, window=WINDOW, implementation="xla"))


def window_mask(segments, window):
  places = np.arange(segments.shape[1])
  return causal_mask(segments) & (places[:, None] - places < window)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.integers(1, 20), max_size=3), min_size=2, max_size=2), st.integers(0, 99))
def test_xla_equals_float64_for_any_segments(rows, seed):
  segments = segments_of(*rows, [60])[:2, :24]
  queries, keys, values, _ = draw(2, 24, seed)
  found = JITTED(queries, keys, values, segments)
  np.testing.assert_allclose(found, expected(queries, keys, values, window_mask(segments, WINDOW)), atol=2e-6)


@pytest.mark.parametrize("block", [4, 8])  # narrower and wider than the window
def test_blocks_that_leave_early_keys_out(block, monkeypatch):
  segments = segments_of([5, 9, 2], [20], [])
  *arrays, weights = draw(3, 20)
  call = lambda *y: attention.causal(*y, segments, window=WINDOW, implementation="xla")
  run = lambda: jax.jit(lambda *x: both(call, x[:3], x[3]))(*arrays, weights)
  whole = run()
  monkeypatch.setattr(attention, "XLA_BLOCK", block)
  for one, other in zip(run(), whole):
    np.testing.assert_allclose(one, other, atol=2e-6)


def test_splash_equals_xla(monkeypatch):
  """Blocks of 128 places, of which a window of 50 leaves some out."""
  monkeypatch.setattr(attention, "SPLASH_BLOCKS", (128,))
  monkeypatch.setattr(attention, "SPLASH_WHOLE", 0)
  segments = segments_of([170, 120])
  *arrays, weights = draw(1, 290)
  call = lambda kind: lambda *y: attention.causal(*y, segments, window=50, implementation=kind)
  run = lambda kind: jax.jit(lambda *x: both(call(kind), x[:3], x[3]))(*arrays, weights)
  for found, other in zip(run("splash"), run("xla")):
    np.testing.assert_allclose(found, other, atol=5e-6)


def test_what_cudnn_is_asked_for():
  """The same arguments, answered by XLA."""
  lengths = np.array([24, 9], np.int32)
  real = (np.arange(24) < lengths[:, None])[..., None, None]
  queries, keys, values, _ = draw(2, 24)
  call = lambda *x: attention.cudnn(*x, lengths, is_causal=True, window=WINDOW, implementation="xla")
  wanted = expected(queries, keys, values, window_mask(np.ones((2, 24), np.int32), WINDOW))
  np.testing.assert_allclose(jax.jit(call)(queries, keys, values), np.where(real, wanted, 0), atol=2e-6)


@pytest.fixture(scope="module")
def decoder():
  return Decoder(CONFIG, LoraConfig(), dtype="float32", remat="none", rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def ids():
  return np.random.default_rng(0).integers(0, 40, (1, 14))


@pytest.fixture(scope="module")
def run():
  return jax.jit(lambda decoder, *x: decoder(decoder.embed(x[0]), *x[1:]))


@pytest.fixture(scope="module")
def alone(decoder, ids, run):
  return run(decoder, ids, np.arange(14)[None], np.ones((1, 14), np.int32))[0]


def test_a_packed_sample_sees_what_it_sees_alone(decoder, ids, run, alone):
  before = np.random.default_rng(1).integers(0, 40, (1, 9))
  positions = np.concatenate([np.arange(9), np.arange(14)])[None]
  packed = run(decoder, np.concatenate([before, ids], axis=1), positions, segments_of([9, 14]))[0, 9:]
  np.testing.assert_allclose(packed, alone, atol=2e-6)
  config = dataclasses.replace(CONFIG, sliding_window=0)
  full = Decoder(config, LoraConfig(), dtype="float32", remat="none", rngs=nnx.Rngs(0))
  seen_all = run(full, ids, positions[:, 9:], np.ones((1, 14), np.int32))[0]
  assert np.array_equal(alone[:5], seen_all[:5]) and np.abs(alone[5:] - seen_all[5:]).max() > 0.01


def test_a_token_after_the_other_is_the_whole_row(decoder, ids, alone):
  """The cache has places beyond the row, as a batch of prompts has."""
  extend = jax.jit(lambda decoder, ids, positions, cache: decoder.extend(decoder.embed(ids), positions, cache))
  cache, steps = KVCache.empty(CONFIG, CONFIG.layers, 1, 18, jnp.float32), []
  for start, stop in ((0, 8), *((place, place + 1) for place in range(8, 14))):
    hidden, cache = extend(decoder, ids[:, start:stop], np.arange(start, stop)[None], cache)
    steps.append(hidden[0])
  np.testing.assert_allclose(np.concatenate(steps), alone, atol=2e-6)


def test_flops_count_the_pairs_of_the_window():
  zeros = np.zeros((1, 1, 12), np.int32)
  positions = np.array([[[*range(4), *range(7), 0]]])
  segments = np.array([[[1] * 4 + [2] * 7 + [0]]])
  batch = Batch(
    zeros, zeros, zeros, segments, positions, zeros, np.zeros((1, 1, 1, 16, 588)), zeros[..., :2][..., None, :]
  )
  vision = VisionConfig(image_size=56)
  assert flops.work_of(batch, vision, 3).pairs == (1 + 2 + 3 + 3) + (1 + 2 + 5 * 3)
  assert flops.work_of(batch, vision).pairs == 10 + 28
  assert flops.full_work(batch, vision, 3).pairs == 1 + 2 + 10 * 3
  assert flops.full_work(batch, vision, 99).pairs == flops.full_work(batch, vision).pairs == 78


def test_angles_of_llama_3_1():
  """Of each kind of frequency, in float64: fast ones stay, slow ones are divided, between them a straight line."""
  config = DecoderConfig(head_width=16, rope_theta=5e5, rope_factor=8.0)
  cos, sin = rotary_angles(np.array([[0, 5]]), config)
  speeds = 5e5 ** -(np.arange(0, 16, 2) / 16)
  wavelengths = 2 * np.pi / speeds
  share = (8192 / wavelengths - 1) / 3
  slowed = np.where(
    wavelengths < 8192 / 4, speeds, np.where(wavelengths > 8192, speeds / 8, (1 - share) * speeds / 8 + share * speeds)
  )
  kinds = (wavelengths < 2048).sum(), (wavelengths > 8192).sum()
  assert kinds == (4, 3)  # and one between
  np.testing.assert_allclose(np.arctan2(sin, cos)[0, 1, 0], np.angle(np.exp(5j * slowed)), rtol=2e-6)
  assert not np.asarray(sin)[0, 0].any()
