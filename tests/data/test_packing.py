import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm_jax.config import DataConfig, StageConfig
from mllm_jax.data.lengths import LengthTable
from mllm_jax.data.order import PackedOrder
from mllm_jax.data.packing import pack
from mllm_jax.data.pipeline import make_order
from mllm_jax.data_commands.stats import costs, synthetic_lengths


@settings(deadline=None, max_examples=200)
@given(
  st.lists(st.tuples(st.integers(1, 60), st.integers(0, 4)), min_size=1, max_size=60),
  st.integers(1, 70),
  st.integers(0, 2**31),
)
def test_every_sample_is_in_one_row_and_no_row_is_over_its_budgets(samples, window, seed):
  places, crops = np.array(samples).T
  order = np.random.default_rng(seed).permutation(len(samples))
  rows = pack(places, crops, order, 60, 5, window)
  assert sorted(i for row in rows for i in row) == list(range(len(samples)))
  assert all(row and places[list(row)].sum() <= 60 and crops[list(row)].sum() <= 5 for row in rows)
  assert rows == pack(places, crops, order, 60, 5, window)


def test_the_longest_waiting_opens_a_row_and_the_best_fit_closes_it():
  places, crops = np.array([50, 10, 30, 45, 20, 25]), np.ones(6, int)
  # 50 goes on with 20 + 30, which fill the row, and not with 45; 10 with 45 + 25.
  rows = pack(places, crops, np.arange(6), 100, 3)
  assert [sorted(row) for row in rows] == [[0, 2, 4], [1, 3, 5]]
  # With room for two crops only one other sample can follow, and 45 fits best.
  assert [sorted(row) for row in pack(places, crops, np.arange(6), 100, 2)] == [[0, 3], [1, 2], [4, 5]]


def test_one_sample_is_not_taken_twice():
  assert [len(row) for row in pack(np.array([40, 30]), np.array([1, 0]), np.arange(2), 100, 9)] == [2]
  assert [len(row) for row in pack(np.array([30, 30, 30]), np.zeros(3, int), np.arange(3), 90, 1)] == [3]


@pytest.mark.parametrize("places, crops", [(101, 1), (100, 3)])
def test_what_fits_no_row_is_refused(places, crops):
  with pytest.raises(ValueError, match=f"sample 1 takes {places} places and {crops} crops; a row has 100 and 2"):
    pack(np.array([5, places]), np.array([1, crops]), np.arange(2), 100, 2)


def rows_of(order: PackedOrder, batch_size: int) -> list[tuple[int, ...]]:
  return [order.samples(row) for row in range(order.steps * batch_size)]


def test_the_number_of_steps_follows_from_the_packing():
  table = synthetic_lengths(2000)
  order = lambda **options: PackedOrder(
    table, 2048, 4096, 6, **{"batch_size": 8, "epochs": 1, "steps": 0} | options, seed=1
  )
  one, three = order(), order(epochs=3)
  assert one.steps * 8 > 2000 / 6 and rows_of(three, 8)[: one.steps * 8] == rows_of(one, 8)
  seen = np.bincount([i for row in rows_of(order(epochs=3, batch_size=1), 1) for i in row])
  assert set(seen) == {3} and len(seen) == 2000
  assert abs(order(epochs=0.5, batch_size=1).steps - order(batch_size=1).steps / 2) <= 1
  assert rows_of(order(steps=2), 8) == rows_of(one, 8)[:16]
  assert len(rows_of(order(steps=3 * one.steps), 8)) == 3 * one.steps * 8  # as many epochs as it takes


def test_the_seed_decides():
  table = synthetic_lengths(500)
  first, again, other = (PackedOrder(table, 2048, 4096, 6, 4, 1, 0, seed) for seed in (0, 0, 1))
  assert rows_of(first, 4) == rows_of(again, 4) != rows_of(other, 4)


def test_long_samples_count_as_what_is_left_of_them():
  table = LengthTable(*(np.array(values, np.int32) for values in ([5000, 40, 60], [1, 1, 1], [9, 9, 9], [1, 1, 1])))
  assert sorted(map(sorted, rows_of(PackedOrder(table, 100, 100, 2, 1, 1, 0, 0), 1))) == [[0], [1, 2]]


def test_padding_on_lengths_like_those_of_the_released_data():
  stage = StageConfig(data=DataConfig(batching="pack", row_length=4096, max_images=5), batch_size=128, accumulation=8)
  found = {cost.name: cost for cost in costs(synthetic_lengths(50_000), stage)}
  assert found["pack"].padding <= 0.03
  assert found["pack"].places <= 0.73 * found["released"].places


def test_rows_are_twice_as_long_as_a_sample_where_nothing_else_is_said():
  """Because rows of one max_length leave gaps that nothing fits: they cannot reach 3 % with these lengths."""
  table = synthetic_lengths(3000)
  order = make_order(DataConfig(batching="pack", max_images=5), 3000, table, 1, 1, 1, 0, 0)
  assert order.length(0) == 2 * DataConfig().max_length and order.padding < 0.04
  filled = [min(2048, int(table.places[i])) for row in rows_of(order, 1) for i in row]
  assert order.padding == pytest.approx(1 - sum(filled) / (order.steps * 4096))
