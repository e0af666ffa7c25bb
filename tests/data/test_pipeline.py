import collections
import itertools
import os

import numpy as np
import pytest

from mllm_jax.config import ConfigError, VisionConfig
from mllm_jax.data.aspects import Square
from mllm_jax.data.pipeline import TrainingBatches
from mllm_jax.data.processor import Processor, Row
from mllm_jax.data.records import DataError, Records

N = 11


@pytest.fixture
def records(write_data):
  return Records.load(
    *write_data(
      [
        {
          "id": i,
          "image": f"{i}.png",
          "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": f"A {i}"}],
        }
        for i in range(N)
      ]
    )
  )


@pytest.fixture
def processor(tokenizers):
  return Processor(tokenizers[False], Square(VisionConfig(image_size=28), 3), "vicuna_v1", 90, 1)


def ids_of(batches, start_step=0):
  return [ids for ids, _ in batches.iterate(start_step)]


def test_each_epoch_sees_every_sample_in_a_new_order(records, processor):
  batches = TrainingBatches(records, processor, batch_size=4, epochs=4, seed=3)
  assert len(batches) == batches.steps == 11
  seen = list(itertools.chain(*ids_of(batches)))
  epochs = [seen[i : i + N] for i in range(0, len(seen), N)]
  assert all(sorted(epoch, key=int) == [str(i) for i in range(N)] for epoch in epochs)
  assert len({tuple(epoch) for epoch in epochs}) == 4
  other = list(itertools.chain(*ids_of(TrainingBatches(records, processor, batch_size=4, epochs=4, seed=4))))
  others = [other[i : i + N] for i in range(0, len(other), N)]
  assert not {tuple(epoch) for epoch in epochs} & {tuple(epoch) for epoch in others}


@pytest.mark.parametrize("epochs,steps,expected", [(1.0, 0, 2), (0.5, 0, 1), (2.0, 0, 5), (1.0, 7, 7)])
def test_steps(records, processor, epochs, steps, expected):
  batches = TrainingBatches(records, processor, batch_size=4, epochs=epochs, steps=steps)
  assert batches.steps == len(ids_of(batches)) == expected


def test_batches_hold_the_rows_of_their_samples(records, processor):
  by_id = {sample.id: processor.row(sample) for sample in records}
  batches = TrainingBatches(records, processor, batch_size=6, accumulation=3, epochs=2)
  for step, (ids, batch) in enumerate(batches):
    assert batch.tokens.shape == (3, 2, 90) and batch.patches.shape == (3, 2, 1, 4, 588)
    assert [(int(i),) for i in ids] == batches.rows(step)
    for field in Row._fields:
      for row, name in zip(getattr(batch, field).reshape(6, *getattr(batch, field).shape[2:]), ids, strict=True):
        np.testing.assert_array_equal(row, getattr(by_id[name], field))


def test_order_does_not_depend_on_threads(records, processor):
  orders = [
    ids_of(TrainingBatches(records, processor, batch_size=3, epochs=5, threads=threads)) for threads in (0, 1, 2, 7)
  ]
  assert orders.count(orders[0]) == 4


def test_a_step_is_the_same_wherever_iteration_starts(records, processor):
  batches = TrainingBatches(records, processor, batch_size=4, accumulation=2, epochs=3)
  whole = list(batches)
  for start in (1, 5, batches.steps):
    rest = list(batches.iterate(start))
    assert [ids for ids, _ in rest] == [ids for ids, _ in whole[start:]]
    for (_, before), (_, after) in zip(whole[start:], rest, strict=True):
      np.testing.assert_array_equal(before.patches, after.patches)
      np.testing.assert_array_equal(before.tokens, after.tokens)
  for start in (-1, batches.steps + 1):
    with pytest.raises(ConfigError, match="is not within the run's 8 steps"):
      batches.iterate(start)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_every_micro_batch_contiguously(records, processor, processes):
  options = {"batch_size": 8, "accumulation": 2, "epochs": 3, "seed": 5}
  alone = TrainingBatches(records, processor, **options)
  shares = [
    TrainingBatches(records, processor, process_index=p, process_count=processes, **options) for p in range(processes)
  ]
  for step in range(alone.steps):
    halves = [np.array(share.rows(step)).reshape(2, -1) for share in shares]  # micro-batches
    np.testing.assert_array_equal(np.concatenate(halves, axis=1).ravel(), np.ravel(alone.rows(step)))
  for p, share in enumerate(shares):
    ids, batch = next(iter(share))
    assert [(int(i),) for i in ids] == share.rows(0)
    assert batch.tokens.shape == (2, 4 // processes, 90)


def test_every_sample_is_seen_equally_often(records, processor):
  batches = TrainingBatches(records, processor, batch_size=5, epochs=10)
  count = collections.Counter(index for step in range(batches.steps) for (index,) in batches.rows(step))
  assert set(count.values()) == {10} and len(count) == N


@pytest.mark.parametrize(
  "options,error,message",
  [
    (
      {"batch_size": 6, "accumulation": 4},
      ConfigError,
      "batch_size=6 cannot be shared by 4 micro-batches x 1 processes; set a multiple of 4",
    ),
    ({"batch_size": 6, "accumulation": 2, "process_count": 2}, ConfigError, "set a multiple of 4"),
    ({"batch_size": 0}, ConfigError, "batch_size=0"),
    ({"batch_size": 4, "accumulation": 0}, ConfigError, "0 micro-batches"),
    ({"batch_size": 4, "process_index": 2, "process_count": 2}, ConfigError, "process_index=2 does not exist among 2"),
    ({"batch_size": 4, "epochs": 0.2}, ConfigError, "epochs=0.2 of 11 samples fill no batch of 4"),
    ({"batch_size": 12}, DataError, "11 samples do not fill a batch of 12; lower batch_size"),
  ],
)
def test_what_cannot_work_is_refused(records, processor, options, error, message):
  with pytest.raises(error, match=message):
    TrainingBatches(records, processor, **options)


@pytest.mark.parametrize("threads", [0, 4])
def test_a_bad_sample_arrives_as_its_own_error(records, processor, threads):
  batches = TrainingBatches(records, processor, batch_size=2, threads=threads)
  bad = records[batches.rows(3)[1][0]]
  os.remove(bad.images[0])
  iterator = iter(batches)
  for _ in range(3):
    next(iterator)
  with pytest.raises(DataError) as error:
    next(iterator)
  assert type(error.value) is DataError
  assert str(error.value).startswith(f"{bad.name}: image {bad.images[0]} is missing; ")
