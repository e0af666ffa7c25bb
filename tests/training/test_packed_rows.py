"""Rows of several samples: none sees another, and a step gives what the same samples in rows of their own give. And
micro-batches of several lengths: each length is compiled once, and padding changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from steps import CONFIG, TOKENS, Training, initial_parameters, make_batch

from mllm_jax import parameters
from mllm_jax.batch import Batch
from mllm_jax.data.aspects import Square
from mllm_jax.data.processor import Row, collate, join_rows
from mllm_jax.models.mllm import Mllm

PLACES = (96, 20, 90, 83)  # of the samples below; the second has no image
ASPECT = Square(CONFIG.vision, TOKENS)
CROPS, LENGTH = 4, 300


def sample(number: int, seed: int = 0) -> Row:
  """One sample as a row without padding."""
  batch = make_batch(2, seed=10 * seed + number, places=96)
  row = Row(*(getattr(batch, field)[1 if number == 1 else 0] for field in Row._fields))
  length = PLACES[number]
  places = [values[:length] for values in row[:6]]
  places[3] = np.ones(length, np.int32)
  return Row(*places, row.patches, row.grids)


def packed(samples: list[Row], length: int = LENGTH, crops: int = CROPS) -> Batch:
  return collate([join_rows(samples, length, crops, ASPECT)])


@pytest.fixture(scope="module")
def logits():
  """Logits [S, V] of a batch of one row, with weights that make every part matter."""
  graphdef, _ = parameters.flatten(Mllm(CONFIG, rngs=nnx.Rngs(0)))
  model = parameters.unflatten(graphdef, jax.tree.map(jnp.asarray, initial_parameters()))
  return jax.jit(lambda batch: model.logits(batch)[0])


def test_changing_one_sample_changes_no_others_logits(logits):
  samples = [sample(n) for n in range(4)]
  before = np.asarray(logits(packed(samples)))
  starts = np.cumsum([0, *PLACES])
  for changed in range(4):
    other = [sample(n, seed=n == changed) for n in range(4)]
    after = np.asarray(logits(packed(other)))
    for n in range(4):
      difference = np.abs(after - before)[starts[n] : starts[n + 1]].max()
      assert difference > 1e-2 if n == changed else difference == 0.0


def test_packed_logits_are_those_of_the_samples_alone(logits):
  samples = [sample(n) for n in range(4)]
  found = np.asarray(logits(packed(samples)))
  start = 0
  for row in samples:
    alone = np.asarray(logits(packed([row])))
    length = len(row.tokens)
    # Sums over another number of places may be added up in another order.
    np.testing.assert_allclose(found[start : start + length], alone[:length], rtol=1e-5, atol=1e-5)
    start += length


def test_a_step_on_packed_rows_is_that_on_the_samples_rows():
  samples = [sample(n % 4, seed=n // 4) for n in range(8)]
  alone = collate([join_rows([row], 96, 1, ASPECT) for row in samples])
  together = collate([join_rows(part, LENGTH, CROPS, ASPECT) for part in (samples[:4], samples[4:5], samples[5:], [])])
  expected, found, cut = Training(dropout=0.0), Training(dropout=0.0), Training(dropout=0.0, accumulation=2)
  for _ in range(3):
    numbers = expected.step(alone)
    for other in (found.step(together), cut.step(together)):
      assert other["tokens"] == numbers["tokens"] > 0
      np.testing.assert_allclose(
        [other["loss"], other["grad_norm"]], [numbers["loss"], numbers["grad_norm"]], rtol=2e-5
      )


def test_micro_batches_of_their_own_lengths_give_the_same_and_each_length_is_compiled_once():
  whole, bucketed = Training(dropout=0.0, accumulation=2), Training(dropout=0.0, accumulation=2, bucketed=True)
  for epoch in range(2):
    for step in range(2):
      rows = [[sample(0, seed=4 * epoch + step), sample(1)], [sample(1, seed=3), sample(3, seed=step)]]
      if step:
        rows.reverse()
      expected = whole.step(collate([join_rows([row], 128, 1, ASPECT) for part in rows for row in part]))
      length = {96: 128, 83: 90}
      cut = [
        collate([join_rows([row], length[max(len(r.tokens) for r in part)], 1, ASPECT) for row in part])
        for part in rows
      ]
      found = bucketed.take(tuple(jax.tree.map(lambda x: x[None], batch) for batch in cut))
      assert found["tokens"] == expected["tokens"]
      np.testing.assert_allclose(
        [found["loss"], found["grad_norm"]], [expected["loss"], expected["grad_norm"]], rtol=2e-5
      )
  assert bucketed.compiled.add._cache_size() == 2
  for path, value in whole.state.trainable.items():
    np.testing.assert_allclose(bucketed.state.trainable[path], value, atol=2e-5)
