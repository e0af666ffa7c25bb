"""Sampling: exactly the right tokens can come, and they come as often as they should."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm_jax.inference.sampling import Draws, sample
from mllm_jax.inference.settings import Sampling

PROBABILITIES = np.array([0.05, 0.4, 0.0, 0.25, 0.2, 0.1])
DRAWS = 20_000


def draws(samplings, seed=0):
  """A step for each."""
  return Draws.of([(sampling, seed, step) for step, sampling in enumerate(samplings)])


def drawn(sampling, probabilities=PROBABILITIES, seed=0):
  """How often each token comes, [V]."""
  with np.errstate(divide="ignore"):
    logits = np.log(probabilities).astype(np.float32)
  tokens = jax.jit(sample)(jnp.tile(logits, (DRAWS, 1)), draws([sampling] * DRAWS, seed))
  assert tokens.dtype == jnp.int32
  return np.bincount(tokens, minlength=len(probabilities)) / DRAWS


def test_temperature_0_takes_the_likeliest_and_of_equals_the_first():
  logits = jnp.array([[0.0, 3, 1], [2, 0, 2]])
  assert sample(logits, draws([Sampling(0, top_p=0.1)] * 2)).tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_temperature(temperature):
  expected = PROBABILITIES ** (1 / temperature)
  # A frequency of 20,000 draws has a standard deviation of at most 0.0036; four of them.
  np.testing.assert_allclose(drawn(Sampling(temperature)), expected / expected.sum(), atol=0.0145)


@pytest.mark.parametrize(
  "sampling, kept",
  [
    (Sampling(1, top_k=1), [1]),
    (Sampling(1, top_k=3), [1, 3, 4]),
    (Sampling(1, top_k=99), [0, 1, 3, 4, 5]),
    (Sampling(1, top_p=0.3), [1]),
    (Sampling(1, top_p=0.41), [1, 3]),
    (Sampling(1, top_p=0.84), [1, 3, 4]),
    (Sampling(1, top_p=0.86), [1, 3, 4, 5]),
    (Sampling(1, top_p=0.001), [1]),
    (Sampling(1, top_k=2, top_p=0.61), [1]),  # after top_k the first has 0.4 / 0.65 = 0.615
    (Sampling(1, top_k=2, top_p=0.62), [1, 3]),
  ],
)
def test_only_the_kept_tokens_come_in_their_proportions(sampling, kept):
  expected = np.where(np.isin(np.arange(6), kept), PROBABILITIES, 0)
  frequencies = drawn(sampling)
  assert np.flatnonzero(frequencies).tolist() == kept
  np.testing.assert_allclose(frequencies, expected / expected.sum(), atol=0.0145)


def test_equal_tokens_are_counted_one_by_one():
  assert np.flatnonzero(drawn(Sampling(1, top_k=2), np.full(5, 0.2))).tolist() == [0, 1]
  assert np.flatnonzero(drawn(Sampling(1, top_p=0.5), np.full(5, 0.2))).tolist() == [0, 1, 2]


def test_coldest_temperature_stays_finite():
  logits = jnp.array([[1e4, -1e4, 1e4 - 1]])
  assert sample(logits, draws([Sampling(1e-6, top_p=0.9)])).tolist() == [0]


def test_a_row_draws_the_same_among_any_others():
  logits = jax.random.normal(jax.random.key(5), (8, 50))
  settings = [(Sampling(1), 1, 0), (Sampling(), 0, 0), (Sampling(1, 0.9), 1, 2), (Sampling(1, top_k=3), 2**32 - 1, 2)]
  together = sample(logits, Draws.of(settings * 2))
  for row, setting in enumerate(settings * 2):
    assert sample(logits[row : row + 1], Draws.of([setting])).tolist() == [together[row]]
  same = jnp.tile(logits[:1], (8, 1))
  steps, seeds = [(Sampling(1), 0, i) for i in range(8)], [(Sampling(1), i, 0) for i in range(8)]
  assert min(len(set(sample(same, Draws.of(rows)).tolist())) for rows in (steps, seeds)) > 1


@pytest.mark.parametrize(
  "name, value",
  [
    ("temperature", -0.1),
    ("temperature", float("nan")),
    ("temperature", float("inf")),
    ("temperature", 1e-40),
    ("top_p", 0.0),
    ("top_p", 1.1),
    ("top_p", float("nan")),
    ("top_k", -1),
  ],
)
def test_settings_out_of_range(name, value):
  with pytest.raises(ValueError, match=f"^{name} is"):
    Sampling(**{name: value})
