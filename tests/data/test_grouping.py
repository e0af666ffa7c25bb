import itertools
import json

import numpy as np
import pytest

from mllm_jax.config import DataConfig, StageConfig
from mllm_jax.data.grouping import choose_buckets, longest_first, released_order
from mllm_jax.data.lengths import LengthTable
from mllm_jax.data.order import GroupedOrder
from mllm_jax.data_commands.stats import costs, synthetic_lengths


def test_the_released_order_given_its_permutations(goldens):
  cases = json.loads((goldens / "sampler.json").read_text())
  for case in cases:
    permutations = iter(case["randperms"])

    def permute(count):
      permutation = next(permutations)
      assert len(permutation) == count
      return np.array(permutation)

    order = released_order(case["lengths"], case["batch_size"], case["world_size"], permute)
    assert order.tolist() == case["indices"]
    assert next(permutations, None) is None
  assert len(cases) == 5


def test_a_sample_without_modality_is_refused():
  with pytest.raises(ValueError, match="a sample of length 0 belongs to no modality"):
    released_order([3, 0], 1, 1, np.random.default_rng(0).permutation)


@pytest.mark.parametrize("images, texts", [(70, 0), (0, 70), (64, 64), (61, 33), (61, 2)])
def test_an_epoch_holds_every_sample_and_full_megabatches_of_one_modality(images, texts):
  rng = np.random.default_rng(0)
  lengths = np.concatenate([rng.integers(1, 99, images), -rng.integers(1, 99, texts)])
  order = released_order(lengths, 4, 4, rng.permutation)
  assert sorted(order) == list(range(images + texts))
  last = sum(size % 16 or 16 for size in (images, texts) if size) if images and texts else 0
  for start in range(0, len(order) - last - 15, 16):
    assert len(set(np.sign(lengths[order[start : start + 16]]))) == 1


def test_the_longest_come_first_in_every_step():
  order, places = np.array([3, 0, 4, 1, 2]), np.array([5, 9, 1, 7, 5])
  assert longest_first(order, places, 2).tolist() == [[3, 0], [1, 4], [2, -1]]
  assert longest_first(order, places, 5).tolist() == [[1, 3, 0, 4, 2]]  # equal ones stay in their order


def test_buckets_are_the_best_there_are():
  rng = np.random.default_rng(0)
  needed = rng.integers(1, 321, 50)
  grid = np.arange(10, 330, 10)
  padded = lambda buckets: sum(min(b for b in buckets if b >= n) for n in needed)
  best = min(padded((*some, 320)) for some in itertools.combinations(grid[:-1], 2))
  buckets = choose_buckets(needed, 320, 320, count=3)
  assert len(buckets) == 3 and buckets[-1] == 320 and padded(buckets) == best


def test_the_last_bucket_holds_what_other_epochs_may_need():
  assert choose_buckets(np.array([30, 35]), 320, 291, count=2) == (40, 300)
  assert choose_buckets(np.array([2, 3]), 7, 3) == (1, 2, 3)  # no more than there are lengths


def test_steps_are_those_of_the_released_sampler_however_they_are_cut():
  table = synthetic_lengths(1000)
  steps = {}
  for accumulation in (1, 4, 16):
    order = GroupedOrder(table, 2048, (), 64, accumulation, 2.0, 0, seed=5)
    assert order.steps == 2 * 16
    steps[accumulation] = [
      sorted(sample for row in range(64 * step, 64 * step + 64) for sample in order.samples(row))
      for step in range(order.steps)
    ]
  assert steps[1] == steps[4] == steps[16]
  released = released_order(table.signed_words, 8, 8, np.random.default_rng([5, 0]).permutation)
  assert steps[1][:16] == [sorted(released[i : i + 64].tolist()) for i in range(0, 1000, 64)]
  assert steps[1][16:] != steps[1][:16] and sorted(sum(steps[1][16:], [])) == list(range(1000))


def test_a_micro_batch_is_as_long_as_its_bucket():
  table = synthetic_lengths(1000)
  order = GroupedOrder(table, 2048, (512, 1024, 2048), 64, 4, 1.0, 0, seed=0)
  for micro_batch in range(order.steps * 4):
    samples = [i for row in range(16 * micro_batch, 16 * micro_batch + 16) for i in order.samples(row)]
    longest = min(2048, max([0, *table.places[samples]]))
    assert order.length(micro_batch) == (512 if longest <= 512 else 1024 if longest <= 1024 else 2048)


def test_all_text_and_all_images_can_be_grouped():
  mixed = synthetic_lengths(300)
  for images in (0, 1):
    table = LengthTable(mixed.places, mixed.crops * images, mixed.words, np.full(300, images, np.int32))
    order = GroupedOrder(table, 2048, (), 32, 4, 1.0, 0, seed=0)
    assert sorted(i for row in range(order.steps * 32) for i in order.samples(row)) == list(range(300))


def test_padding_on_lengths_like_those_of_the_released_data():
  """Steps of 128 in micro-batches of 16, as the released runs have on each device."""
  stage = StageConfig(data=DataConfig(batching="group"), batch_size=128, accumulation=8)
  found = {cost.name: cost for cost in costs(synthetic_lengths(50_000), stage)}
  assert found["group"].padding <= 0.15
  assert found["group"].places <= 0.82 * found["released"].places
  assert found["released"].used == found["group"].used == found["fixed"].used
