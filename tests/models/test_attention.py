"""Attention: every implementation against float64, the kernels in the interpreter or with their arguments elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm_jax import sharding
from mllm_jax.config import ConfigError, DecoderConfig, LoraConfig, MeshConfig
from mllm_jax.models import attention
from mllm_jax.models.decoder import Decoder

HEADS, KV_HEADS, WIDTH = 4, 2, 8
JITTED = jax.jit(lambda *arrays: attention.causal(*arrays, implementation="xla"))


def draw(rows, length, seed=0, kv_heads=KV_HEADS):
  """Queries, keys and values, and the weights of a scalar of the result."""
  rng = np.random.default_rng(seed)
  make = lambda heads: rng.normal(size=(rows, length, heads, WIDTH)).astype(np.float32)
  return make(HEADS), make(kv_heads), make(kv_heads), make(HEADS)


def expected(queries, keys, values, mask):
  """softmax(Q K^T / sqrt(N)) V in float64; mask [B, S, T]."""
  queries, keys, values = (np.asarray(x, np.float64) for x in (queries, keys, values))
  group = queries.shape[2] // keys.shape[2]
  keys, values = np.repeat(keys, group, axis=2), np.repeat(values, group, axis=2)
  logits = np.einsum("bshn,bthn->bhst", queries, keys) / np.sqrt(queries.shape[-1])
  logits = np.where(mask[:, None], logits, -np.inf)
  weights = np.exp(logits - logits.max(-1, keepdims=True))
  return np.einsum("bhst,bthn->bshn", weights / weights.sum(-1, keepdims=True), values)


def causal_mask(segments):
  places = np.arange(segments.shape[1])
  return (segments[:, :, None] == segments[:, None, :]) & (places[:, None] >= places)


def segments_of(*rows):
  """Segment ids from each row's (length of a segment, ...); the rest of the longest is padding."""
  length = max(map(sum, rows))
  ids = np.zeros((len(rows), length), np.int32)
  for row, parts in zip(ids, rows):
    for number, end in enumerate(np.cumsum(parts), start=1):
      row[end - parts[number - 1] : end] = number
  return ids


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(1, 9), max_size=4), min_size=3, max_size=3), st.integers(0, 99))
def test_xla_equals_float64_for_any_segments(rows, seed):
  segments = segments_of(*rows, [36])[:3, :24]
  queries, keys, values, _ = draw(3, 24, seed)
  found = JITTED(queries, keys, values, segments)
  np.testing.assert_allclose(found, expected(queries, keys, values, causal_mask(segments)), atol=2e-6)


def both(function, arrays, weights):
  """The result and the gradients of its weighted sum."""
  value, pull = jax.vjp(function, *arrays)
  return (value, *pull(weights))


def test_xla_in_blocks_is_xla_whole(monkeypatch):
  segments = segments_of([5, 9, 2], [20], [])
  *arrays, weights = draw(3, 20)
  run = lambda: jax.jit(lambda *x: both(lambda *y: attention.causal(*y, segments), x[:3], x[3]))(*arrays, weights)
  whole = run()
  monkeypatch.setattr(attention, "XLA_BLOCK", 8)
  for one, other in zip(run(), whole):
    np.testing.assert_allclose(one, other, atol=2e-6)


# The length fills no block; the second asks for several blocks.
@pytest.mark.parametrize(
  "blocks, length, mesh", [((), 140, MeshConfig(data=1, fsdp=2, tensor=2)), ((256,), 300, MeshConfig())]
)
def test_splash_equals_xla(blocks, length, mesh, monkeypatch):
  if blocks:
    monkeypatch.setattr(attention, "SPLASH_BLOCKS", blocks)
    monkeypatch.setattr(attention, "SPLASH_WHOLE", 0)
  segments = segments_of([60, 70], [length])
  *arrays, weights = draw(2, length)
  real = (segments > 0)[..., None, None]

  def run(implementation):
    call = lambda *y: attention.causal(*y, segments, implementation=implementation) * real
    return jax.jit(lambda *x: both(call, x[:3], x[3]))(*arrays, weights)

  with jax.set_mesh(sharding.make_mesh(mesh, jax.devices()[: 4 if mesh.tensor > 1 else 1])):
    for found, other in zip(run("splash"), run("xla")):
      np.testing.assert_allclose(found, other, atol=5e-6)


def test_gradients_of_splash_in_16_bits(monkeypatch):
  """The queries' gradient is a sum over blocks of keys, here four, each rounded to bfloat16: its last place is 2^-8."""
  monkeypatch.setattr(attention, "SPLASH_BLOCKS", (128,))
  monkeypatch.setattr(attention, "SPLASH_WHOLE", 0)
  segments = segments_of([512])
  arrays = [x.astype(jnp.bfloat16) for x in draw(1, 512)]

  def run(implementation, dtype):
    call = lambda *y: attention.causal(*y, segments, implementation=implementation)
    return jax.jit(lambda *x: both(call, x[:3], x[3]))(*(x.astype(dtype) for x in arrays))

  for found, wanted in zip(run("splash", jnp.bfloat16), run("xla", jnp.float32)):
    error = np.asarray(found, np.float32) - wanted
    assert np.sqrt(np.square(error).mean() / np.square(wanted).mean()) < 2**-8


@pytest.mark.parametrize("implementation", ["xla", "splash"])
def test_no_sample_sees_another_and_padding_stays_finite(implementation):
  segments = segments_of([50, 40], [0, 130], [])
  queries, keys, values, weights = draw(3, 130)
  run = jax.jit(lambda *x: both(lambda *y: attention.causal(*y, segments, implementation=implementation), x[:3], x[3]))
  before = run(queries, keys, values, weights)
  assert all(np.isfinite(x).all() for x in before)
  changed = np.arange(130)[:, None, None] < 50
  other = lambda x, seed: np.where(changed, np.random.default_rng(seed).normal(size=x.shape), x).astype(np.float32)
  after = run(other(queries, 7), other(keys, 8), other(values, 9), weights)
  for one, two in zip(before, after):
    assert np.array_equal(one[0, 50:90], two[0, 50:90]) and not np.array_equal(one[0, :50], two[0, :50])
  # Nor does what it is asked for reach another's gradient.
  _, *gradients = run(queries, keys, values, np.where(changed, weights, 0))
  assert all(not np.asarray(gradient)[0, 50:].any() for gradient in gradients)


@pytest.mark.parametrize("implementation", ["xla", "splash"])
@pytest.mark.parametrize("lengths", [None, [130, 7, 1]])
def test_vision_attention_equals_float64(implementation, lengths):
  queries, keys, values, _ = draw(3, 130, kv_heads=HEADS)
  seen = np.ones((3, 130, 130), bool) if lengths is None else np.arange(130) < np.array(lengths)[:, None, None]
  given = None if lengths is None else jnp.array(lengths)
  run = jax.jit(lambda *x: attention.bidirectional(*x, given, implementation=implementation))
  np.testing.assert_allclose(run(queries, keys, values), expected(queries, keys, values, seen), atol=2e-6)


@pytest.mark.parametrize("causal", [True, False])
def test_what_cudnn_is_asked_for(causal):
  """The same arguments, answered by XLA. Padding there is poisoned: neither it nor its gradient may come through."""
  lengths = np.array([24, 9, 0], np.int32)
  real = np.arange(24) < np.maximum(lengths, 1)[:, None]
  mask = np.broadcast_to(real[:, None], (3, 24, 24))
  if causal:
    mask = mask & causal_mask(np.ones((3, 24), np.int32))
  queries, keys, values, weights = draw(3, 24)
  poisoned = [np.where(real[..., None, None], x, np.nan).astype(np.float32) for x in (queries, keys, values)]
  arrays = poisoned if causal else (queries, *poisoned[1:])
  call = lambda *y: attention.cudnn(*y, jnp.array(lengths), is_causal=causal, implementation="xla")
  value, *gradients = jax.jit(lambda *x: both(call, x[:3], x[3]))(*arrays, weights)
  wanted = expected(queries, keys, values, mask)
  np.testing.assert_allclose(value, np.where(real[..., None, None], wanted, 0) if causal else wanted, atol=2e-6)
  for gradient in gradients[0 if causal else 1 :]:
    assert np.isfinite(gradient).all() and not np.asarray(gradient)[~real].any()


def test_the_device_is_that_of_the_mesh(monkeypatch):
  """Compiling for other devices than those at hand is decided by the mesh, as `jax.set_mesh` announces it."""
  kind = dict(packed=False, dtype=jnp.bfloat16, head_width=128)

  def on(platform, implementation="auto", **change):
    device = type("Device", (), {"platform": platform, "device_kind": platform, "num_cores": 1})()
    mesh = type("Mesh", (), {"empty": False, "abstract_device": device})()
    with monkeypatch.context() as patch:
      patch.setattr(jax.sharding, "get_abstract_mesh", lambda: mesh)
      return attention.choose(implementation, **kind | change)

  assert (on("tpu"), on("tpu", packed=True), on("cpu"), on("gpu")) == ("splash", "splash", "xla", "cudnn")
  for change in (dict(packed=True), dict(dtype=jnp.float32), dict(head_width=256), dict(head_width=36)):
    assert on("gpu", **change) == "xla"
  assert attention.choose("auto", **kind) == "xla"  # without a mesh: this process' device
  for platform, implementation, change, message in (
    ("gpu", "splash", {}, "for TPUs"),
    ("tpu", "cudnn", {}, "for NVIDIA GPUs, and this is a TPU"),
    ("gpu", "cudnn", dict(packed=True), "packed"),
    ("gpu", "cudnn", dict(dtype=jnp.float32), "float32"),
    ("cpu", "flash", {}, "unknown; known: auto, splash, cudnn, xla"),
  ):
    with pytest.raises(ConfigError, match=message):
      on(platform, implementation, **change)
  with jax.set_mesh(sharding.make_mesh(MeshConfig(), jax.devices()[:1])):
    assert jax.sharding.get_abstract_mesh().abstract_device.platform == "cpu"


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 5000))
def test_blocks_of_splash_hold_the_sequence(length):
  block, padded = attention.splash_blocks(length)
  assert padded % block == 0 and block % 128 == 0 and length <= padded < length + max(256, block)
  assert padded - length < 256


def test_an_unknown_attention_is_refused_before_anything_is_computed():
  config = DecoderConfig(vocab_size=8, width=8, layers=1, heads=1, kv_heads=1, head_width=8, mlp_width=8)
  with pytest.raises(ConfigError, match="model.attention='flash' is unknown"):
    jax.eval_shape(lambda: Decoder(config, LoraConfig(), dtype="float32", remat="none", attention="flash", rngs=None))
