"""Batches of several samples a row or of several lengths, and batches made by worker processes."""

import os

import numpy as np
import pytest
from known_samples import N, T, arrays, assert_same

from mllm_jax.config import ConfigError, DataConfig, VisionConfig
from mllm_jax.data import lengths
from mllm_jax.data.aspects import Square
from mllm_jax.data.batching import check_batching
from mllm_jax.data.pipeline import TrainingBatches
from mllm_jax.data.processor import Processor, Row
from mllm_jax.data.records import DataError


def test_a_step_is_the_same_wherever_iteration_starts(make):
  whole = list(make(epochs=3))
  for start in (1, len(whole) // 2, len(whole)):
    assert_same(list(make(epochs=3).iterate(start)), whole[start:])


def test_threads_and_workers_change_nothing(make):
  expected = list(make(epochs=1, accumulation=2))
  for options in ({"threads": 3}, {"workers": 2, "threads": 2}):
    assert_same(list(make(epochs=1, accumulation=2, **options)), expected)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_every_micro_batch(make, processes):
  """So a run may go on with another number of them in the middle of an epoch."""
  options = {"batch_size": 8, "accumulation": 2, "epochs": 2}
  alone = list(make(**options))
  shares = [list(make(process_index=p, process_count=processes, **options)) for p in range(processes)]
  for step, (ids, batch) in enumerate(alone):
    assert sorted(ids) == sorted(name for share in shares for name in share[step][0])
    parts = [arrays(share[step][1]) for share in shares]
    for whole, *split in zip(arrays(batch), *parts, strict=True):
      np.testing.assert_array_equal(np.concatenate(split, axis=1), whole)


def test_every_epoch_sees_every_sample_once_in_a_new_order(make):
  batches = make(epochs=4, batch_size=1)
  seen = [i for step in range(batches.steps) for (*samples,) in batches.rows(step) for i in samples]
  epochs = [tuple(seen[i : i + N]) for i in range(0, len(seen), N)]
  assert [sorted(epoch) for epoch in epochs] == [list(range(N))] * 4
  assert len(set(epochs)) == 4
  other = make(epochs=1, batch_size=1, seed=4)
  assert tuple(i for step in range(other.steps) for row in other.rows(step) for i in row) not in epochs


def test_a_grouped_step_is_of_one_modality_and_as_long_as_it_needs_to_be(records, processor, table):
  options = {"batch_size": 6, "accumulation": 3, "epochs": 2, "threads": 0}
  batches = TrainingBatches(records, processor, batching="group", buckets=(150, 190, 230), lengths=table, **options)
  assert batches.steps == 2 * 4  # the last of 4 steps is filled up with rows of nothing
  by_id = {sample.id: processor.row(sample) for sample in records}
  shapes = set()
  for step, (ids, batch) in enumerate(batches):
    rows, names = batches.rows(step), iter(ids)
    images = [int(table.images[i]) for (i,) in filter(None, rows)]
    assert step % 4 >= 2 or len(set(images)) == 1  # the last ones hold what is left of both
    for number, micro_batch in enumerate(batch):
      longest = max([0, *(int(table.places[i]) for (i,) in filter(None, rows[2 * number : 2 * number + 2]))])
      assert micro_batch.tokens.shape == (1, 2, min(b for b in (150, 190, 230) if b >= longest))
      shapes.add(micro_batch.tokens.shape)
      for place, row in enumerate(rows[2 * number : 2 * number + 2]):
        found = Row(*(getattr(micro_batch, field)[0, place] for field in Row._fields))
        if not row:
          assert not any(values.any() for values in found._replace(visual_index=found.visual_index + 1))
          continue
        expected, length = by_id[next(names)], len(found.tokens)
        for field in Row._fields[:6]:
          np.testing.assert_array_equal(getattr(found, field), getattr(expected, field)[:length])
        np.testing.assert_array_equal(found.patches, expected.patches)
  assert len(shapes) > 1


def test_a_packed_row_holds_its_samples_one_behind_the_other(records, processor, table):
  batches = TrainingBatches(
    records, processor, batching="pack", row_length=460, lengths=table, batch_size=2, epochs=2, threads=0
  )
  by_id = {sample.id: processor.row(sample) for sample in records}
  several = 0
  for step, (ids, batch) in enumerate(batches):
    assert batch.tokens.shape == (1, 2, 460) and batch.patches.shape == (1, 2, 3, 4, 588)
    names = iter(ids)
    for place, samples in enumerate(batches.rows(step)):
      row = Row(*(getattr(batch, field)[0, place] for field in Row._fields))
      several += len(samples) > 1
      start = crop = 0
      for segment, i in enumerate(samples, start=1):
        own = by_id[next(names)]
        length = int(table.places[i])
        part = slice(start, start + length)
        for field in ("tokens", "targets", "loss_weights", "positions"):
          np.testing.assert_array_equal(getattr(row, field)[part], getattr(own, field)[:length])
        assert (row.segment_ids[part] == segment).all() and row.positions[start] == 0
        visual, own_visual = row.visual_index[part], own.visual_index[:length]
        np.testing.assert_array_equal(visual >= 0, own_visual >= 0)
        np.testing.assert_array_equal(visual[visual >= 0], own_visual[own_visual >= 0] + crop * T)
        for k in range(table.crops[i]):
          np.testing.assert_array_equal(row.patches[crop + k], own.patches[k])
          np.testing.assert_array_equal(row.grids[crop + k], own.grids[k])
        start, crop = start + length, crop + int(table.crops[i])
      assert not row.segment_ids[start:].any() and not row.loss_weights[start:].any() and not row.grids[crop:].any()
  assert several > 3


def test_samples_too_long_are_cut_before_they_are_packed(records, tokenizers, table):
  short = Processor(tokenizers[False], Square(VisionConfig(image_size=28), T), "vicuna_v1", 160, 3)
  batches = TrainingBatches(records, short, batching="pack", row_length=320, lengths=table, batch_size=2, threads=0)
  for step, (_, batch) in enumerate(batches):
    for place, samples in enumerate(batches.rows(step)):
      lengths_found = np.bincount(batch.segment_ids[0, place])[1:]
      assert lengths_found.tolist() == [min(160, table.places[i]) for i in samples]


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"batching": "packed"}, "stage.batching='packed' is unknown; known: fixed, group, pack"),
    ({"buckets": (64, 128)}, "are for batching=group, and batching is 'fixed'"),
    ({"batching": "group", "buckets": (64, 64, 128)}, "must be numbers that grow"),
    ({"batching": "group", "buckets": (64, 100)}, "and the last one max_length=128"),
    ({"row_length": 256}, "is for batching=pack"),
    ({"batching": "pack", "row_length": 100}, "with max_length=128 or more"),
  ],
)
def test_fields_that_do_not_go_together_are_refused(fields, message):
  with pytest.raises(ConfigError) as error:
    check_batching(DataConfig(max_length=128, **fields), "stage")
  assert message in str(error.value)


def test_a_batching_that_needs_lengths_does_not_go_without(records, processor, table):
  for wrong in (None, lengths.LengthTable(*(getattr(table, name)[:-1] for name in lengths.FIELDS))):
    with pytest.raises(ValueError, match="needs the lengths of all 23 samples"):
      TrainingBatches(records, processor, batching="pack", lengths=wrong, batch_size=2)


def test_a_bad_sample_in_a_worker_arrives_as_its_own_error(make, records):
  batches = make(workers=1, batch_size=2)
  bad = records[next(i for row in batches.rows(2) for i in row if records[i].images)]
  os.remove(bad.images[0])
  iterator = iter(batches)
  with pytest.raises(DataError) as error:
    list(iterator)
  assert type(error.value) is DataError
  assert str(error.value).startswith(f"{bad.name}: image {bad.images[0]} is missing; ")
