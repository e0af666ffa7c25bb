"""The training step: one compilation, exact accumulation, steps that are not finite, clipping, the loss in chunks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from steps import Training, make_batch

from mllm_jax.config import DecoderConfig, LoraConfig
from mllm_jax.models.decoder import Decoder
from mllm_jax.training import loss as loss_lib


def test_compiles_once_over_batches_with_and_without_pictures():
  training = Training()
  for seed in range(3):
    training.step(make_batch(4, seed))
  text = make_batch(4, 3)
  training.step(
    dataclasses.replace(
      text,
      visual_index=np.full_like(text.visual_index, -1),
      patches=np.zeros_like(text.patches),
      grids=np.zeros_like(text.grids),
    )
  )
  assert training.compiled._cache_size() == 1


def test_accumulation_is_exact_though_micro_batches_differ_in_trained_tokens():
  batch = make_batch(8)
  counts = batch.loss_weights.reshape(4, -1).sum(1)
  assert counts.max() > 2 * counts.min()  # else a mean of means would pass as well
  whole, cut = Training(dropout=0.0), Training(dropout=0.0, accumulation=4)
  for _ in range(3):
    expected, found = whole.step(batch), cut.step(batch)
    assert found["tokens"] == expected["tokens"] == batch.loss_weights.sum()
    np.testing.assert_allclose(
      [found["loss"], found["grad_norm"]], [expected["loss"], expected["grad_norm"]], rtol=1e-5
    )


def test_bfloat16_computes_what_float32_does_but_for_its_rounding():
  exact, rounded = Training(dropout=0.0, warmup_ratio=0.0), Training(dropout=0.0, warmup_ratio=0.0, dtype="bfloat16")
  expected, found = ([training.step(make_batch(4, seed))["loss"] for seed in range(3)] for training in (exact, rounded))
  np.testing.assert_allclose(found, expected, rtol=2e-3)  # bfloat16 has 8 bits; the loss averages over many tokens
  assert found != expected
  assert all(x.dtype == np.float32 for x in jax.tree.leaves((rounded.state.trainable, rounded.state.optimizer[0].mu)))
  assert all(x.dtype == jnp.bfloat16 for x in rounded.frozen.values())


def test_text_only_rows_give_the_pictures_no_gradient():
  training = Training()
  text = make_batch(2)
  text = dataclasses.replace(text, visual_index=np.full_like(text.visual_index, -1))
  before = {path: np.asarray(value) for path, value in training.state.trainable.items()}
  training.step(text)
  training.step(text)  # the first step has learning rate 0
  after = training.state.trainable
  assert all((before[path] == np.asarray(after[path])).all() for path in before if path.startswith("projector/"))
  assert any((before[path] != np.asarray(after[path])).any() for path in before if "/lora/" in path)


def test_a_step_that_is_not_finite_is_counted_and_changes_nothing():
  training = Training(warmup_ratio=0.0)
  training.step(make_batch(4))
  good = jax.tree.map(np.asarray, (training.state.trainable, training.state.optimizer))
  batch = make_batch(4, 1)
  bad = dataclasses.replace(batch, loss_weights=np.where(batch.loss_weights > 0, np.inf, 0).astype(np.float32))
  metrics = [training.step(bad), training.step(bad)]
  assert [m["skipped_in_row"] for m in metrics] == [1, 2] and not np.isfinite(metrics[0]["loss"])
  kept = jax.tree.map(np.asarray, (training.state.trainable, training.state.optimizer))
  assert all((a == b).all() for a, b in zip(jax.tree.leaves(good), jax.tree.leaves(kept)))
  metrics = training.step(batch)
  assert metrics["skipped_in_row"] == 0 and metrics["skipped"] == 2 and int(training.state.step) == 4
  assert any(
    (a != np.asarray(b)).any() for a, b in zip(jax.tree.leaves(good), jax.tree.leaves(training.state.trainable))
  )


def test_clipping_bounds_the_gradient_that_adam_sees():
  free, clipped = Training(warmup_ratio=0.0), Training(warmup_ratio=0.0, clip_norm=1e-3)
  batch = make_batch(4)
  norm = free.step(batch)["grad_norm"]
  assert clipped.step(batch)["grad_norm"] == norm > 1e-3  # what is logged is the norm before
  first_moment = lambda training: [np.asarray(x, np.float64) for x in jax.tree.leaves(training.state.optimizer[0].mu)]
  seen = np.sqrt(sum((x**2).sum() for x in first_moment(clipped))) / 0.1  # mu = (1 - beta1) g after one step
  np.testing.assert_allclose(seen, 1e-3, rtol=1e-3)


@pytest.mark.parametrize("chunk_bytes", [2**27, 64 * 40 * 4 * 2, 1])
def test_loss_in_chunks_equals_float64(chunk_bytes, monkeypatch):
  monkeypatch.setattr(loss_lib, "CHUNK_BYTES", chunk_bytes)
  config = DecoderConfig(vocab_size=40, width=16, layers=1, heads=2, kv_heads=2, head_width=8, mlp_width=16)
  decoder = Decoder(config, LoraConfig(), dtype="float32", remat="none", rngs=nnx.Rngs(0))
  rng = np.random.default_rng(0)
  hidden, targets = rng.normal(size=(2, 12, 16)).astype(np.float32), rng.integers(0, 40, (2, 12))
  weights = (rng.random((2, 12)) < 0.5).astype(np.float32)
  value, gradient = jax.jit(jax.value_and_grad(loss_lib.summed_cross_entropy, argnums=1))(
    decoder, jnp.asarray(hidden), jnp.asarray(targets), jnp.asarray(weights)
  )

  head = np.asarray(decoder.head[...], np.float64)
  logits = hidden.astype(np.float64) @ head
  probabilities = np.exp(logits - logits.max(-1, keepdims=True))
  probabilities /= probabilities.sum(-1, keepdims=True)
  one_hot = np.eye(40)[targets]
  expected = -(weights * np.log((probabilities * one_hot).sum(-1))).sum()
  np.testing.assert_allclose(value, expected, rtol=1e-6)
  np.testing.assert_allclose(gradient, ((probabilities - one_hot) * weights[..., None]) @ head.T, atol=1e-6)
