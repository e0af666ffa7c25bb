"""Bad samples in rows of known lengths: what stands in their places, and how they are counted."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from known_samples import N

from mllm_jax.data import lengths
from mllm_jax.data.bad_samples import FILE, BadSamples
from mllm_jax.data.pipeline import TrainingBatches
from mllm_jax.data.records import DataError, Records
from mllm_jax.data.rows import RowMaker, Wanted

BAD = (3, 7, 8, 13)  # a broken picture, a missing one, no pictures, more pictures than a row has room for


@pytest.fixture
def damaged(records):
  """The records, four of which cannot be used; 8 is known to be so before its picture is opened, and so is 13."""
  content = json.loads(Path(records.source).read_text())
  Path(records.image_folder, "3.png").write_bytes(b"<html>")
  os.remove(Path(records.image_folder, "7.png"))

  content[8]["conversations"][0]["value"] = "<image><image>"
  content[13]["image"] = ["13.png"] * 4
  content[13]["conversations"][0]["value"] = "<image>" * 4
  Path(records.source).write_text(json.dumps(content))
  return Records.load(records.source, records.image_folder)


@pytest.mark.parametrize(
  "batching, policy, workers",
  [("group", "skip", 0), ("group", "replace", 0), ("pack", "skip", 0), ("pack", "replace", 0), ("pack", "replace", 1)],
)
def test_bad_samples_in_rows_of_known_lengths(damaged, processor, tmp_path, batching, policy, workers):
  with pytest.raises(DataError, match=r"sample 8 \('8'\): 2 <image> in the human turns but 0 images"):
    lengths.measure(damaged, processor)
  table = lengths.measure(damaged, processor, policy=policy, seed=3)
  if policy == "skip":
    assert not any(getattr(table, name)[[8, 13]].any() for name in lengths.FIELDS)
  else:
    assert (table.places[[8, 13]] > 0).all()
  log = BadSamples(1.0, tmp_path)
  options = {"row_length": 460} if batching == "pack" else {"buckets": (150, 190, 230)}
  options |= {"lengths": table, "batching": batching, "batch_size": 4, "seed": 3, "epochs": 2, "threads": 0}
  batches = TrainingBatches(
    damaged, processor, on_bad_sample=policy, bad_samples=log, workers=workers, **options | {"accumulation": 2}
  )
  rows_of_good = {str(i): processor.row(damaged[i]) for i in range(N) if i not in BAD}
  seen = replaced = 0
  for step, (names, batch) in enumerate(batches):
    names = iter(names)
    parts = batch if batching == "group" else (batch,)
    flat = lambda field: [row for part in parts for row in getattr(part, field).reshape(-1, part.tokens.shape[-1])]
    tokens, segments = flat("tokens"), flat("segment_ids")
    for samples, row_tokens, row_segments in zip(batches.rows(step), tokens, segments, strict=True):
      segment = 0
      for i, name in zip(samples, names):
        seen += 1
        if policy == "skip" and i in BAD:
          assert name in (str(i), str(damaged[i].id))
          continue
        if name not in rows_of_good:  # nothing fitted in its place
          assert i in BAD
          continue
        assert name == str(i) or i in BAD
        replaced += name != str(i)
        segment += 1
        own = rows_of_good[name]
        np.testing.assert_array_equal(row_tokens[row_segments == segment], own.tokens[own.segment_ids > 0])
      assert row_segments.max() == segment
  assert log.seen == seen and log.bad >= len(BAD)
  assert (replaced > 0) == (policy == "replace")
  written = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
  assert {line["index"] for line in written} == set(BAD) and len(written) == log.bad


def test_no_other_sample_fits(damaged, processor):
  """Then the places stay empty."""
  maker = RowMaker(damaged, processor, True, "replace", 0)
  made, row = maker(Wanted((1, 3), 460, ((230, 1), (5, 1))))
  assert [each.used for each in made] == [1, -1] and "other samples tried in its place are bad too" in made[1].problem
  np.testing.assert_array_equal(row.tokens[:230], processor.row(damaged[1]).tokens)
  assert row.segment_ids.max() == 1


@pytest.mark.parametrize("batching", ["fixed", "group", "pack"])
def test_counts_of_bad_samples_go_on_where_a_run_does(damaged, processor, tmp_path, batching):
  table = lengths.measure(damaged, processor, policy="skip")
  options = {"row_length": 460} if batching == "pack" else {}
  options |= {"lengths": table, "batching": batching, "batch_size": 4, "seed": 3, "epochs": 6, "threads": 0}
  make = lambda folder: TrainingBatches(
    damaged, processor, on_bad_sample="skip", bad_samples=BadSamples(1.0, folder), **options
  )
  whole, broken = make(tmp_path / "whole"), make(tmp_path / "broken")
  assert len(list(whole)) > 5
  iterator = iter(broken)
  for _ in range(4):
    next(iterator)
  iterator.close()
  again = make(tmp_path / "broken")  # after a crash, from a checkpoint two steps before
  list(again.iterate(2))
  log, expected = again._bad_samples, whole._bad_samples
  assert (log.seen, log.bad) == (expected.seen, expected.bad)
  assert (tmp_path / "broken" / FILE).read_text() == (tmp_path / "whole" / FILE).read_text()
