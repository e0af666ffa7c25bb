"""What a run does with samples that cannot be used, on real batches of real files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mllm_jax.config import ConfigError, VisionConfig
from mllm_jax.data import bad_samples
from mllm_jax.data.aspects import Square
from mllm_jax.data.bad_samples import BadSamples, make
from mllm_jax.data.pipeline import TrainingBatches
from mllm_jax.data.processor import Processor, Row
from mllm_jax.data.records import DataError, Records

N, BAD = 20, (3, 11, 12)


@pytest.fixture
def records(write_data):
  turns = lambda i: [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": f"A {i}"}]
  samples = [{"id": f"s{i}", "image": f"{i}.png", "conversations": turns(i)} for i in range(N)]
  samples[12]["conversations"] = turns(12)[:1]  # bad by its text; the others by their files
  path, folder = write_data(samples)
  os.remove(f"{folder}/3.png")
  with open(f"{folder}/11.png", "wb") as file:
    file.write(b"<html>")
  return Records.load(path, folder)


@pytest.fixture
def processor(tokenizers):
  return Processor(tokenizers[False], Square(VisionConfig(image_size=28), 3), "vicuna_v1", 90, 1)


def batches_of(records, processor, policy, **options):
  options = {"batch_size": 4, "epochs": 2, "seed": 3, "on_bad_sample": policy} | options
  return TrainingBatches(records, processor, **options)


@pytest.mark.parametrize("threads", [0, 3])
def test_replaced_samples_are_others_and_the_same_every_time(records, processor, threads, tmp_path):
  log = BadSamples(1.0, tmp_path / "stage")
  batches = batches_of(records, processor, "replace", threads=threads, bad_samples=log)
  whole = list(batches)
  asked = np.array([index for step in range(batches.steps) for (index,) in batches.rows(step)])
  got = [name for names, _ in whole for name in names]
  good = {f"s{i}" for i in range(N)} - {f"s{i}" for i in BAD}
  assert set(got) <= good
  for index, name in zip(asked.tolist(), got, strict=True):
    assert name == f"s{index}" or index in BAD
  assert all(batch.loss_weights.any(axis=-1).all() for _, batch in whole)
  rest = [names for names, _ in batches_of(records, processor, "replace").iterate(4)]
  assert rest == [names for names, _ in whole[4:]]

  assert (log.seen, log.bad) == (40, 6)
  lines = [json.loads(line) for line in (tmp_path / "stage" / bad_samples.FILE).read_text().splitlines()]
  assert [line["index"] for line in lines] == [i for i in asked.tolist() if i in BAD]
  assert [f"s{line['substitute']}" for line in lines] == [got[k] for k, i in enumerate(asked) if i in BAD]
  for line in lines:
    assert line["problem"].startswith(f"{records.source}, sample {line['index']} ('s{line['index']}'): ")


def test_processes_replace_alike(records, processor):
  alone = batches_of(records, processor, "replace")
  shares = [batches_of(records, processor, "replace", process_index=p, process_count=2) for p in range(2)]
  for (whole, _), (first, _), (second, _) in zip(alone, *shares, strict=True):
    assert whole == first + second


def test_skipped_samples_leave_an_empty_row(records, processor, tmp_path):
  log = BadSamples(1.0, tmp_path)
  batches = batches_of(records, processor, "skip", bad_samples=log)
  by_index = {i: processor.row(records[i]) for i in range(N) if i not in BAD}
  for step, (names, batch) in enumerate(batches):
    for row, (index, name) in enumerate(zip(np.ravel(batches.rows(step)), names, strict=True)):
      assert name == f"s{index}"
      expected = by_index.get(int(index), processor.empty_row())
      for field in Row._fields:
        np.testing.assert_array_equal(getattr(batch, field)[0, row], getattr(expected, field), strict=True)
  empty = processor.empty_row()
  assert not empty.loss_weights.any() and not empty.segment_ids.any() and (empty.visual_index == -1).all()
  assert log.bad == 6


def test_error_stops_at_the_first(records, processor):
  with pytest.raises(DataError, match=r"sample (3|11|12) \('s(3|11|12)'\): "):
    list(batches_of(records, processor, "error"))
  with pytest.raises(ConfigError, match="data.on_bad_sample='ignore' is unknown; known: error, skip, replace"):
    list(batches_of(records, processor, "ignore"))


def test_too_many_stop_the_run_and_the_file_is_named(records, processor, tmp_path):
  log = BadSamples(0.1, tmp_path, minimum=20)
  seen = 0
  with pytest.raises(DataError) as error:
    for names, _ in batches_of(records, processor, "skip", bad_samples=log):
      seen += len(names)
  assert seen == 16  # the fifth batch completes the first 20
  assert str(error.value).startswith("3 of 20 samples cannot be used (15.0%), and data.max_bad_share is 10.0%; ")
  assert f"{tmp_path / bad_samples.FILE} lists them; run `python -m mllm_jax.data check`" in str(error.value)
  patient = BadSamples(0.3, tmp_path, minimum=20)
  assert len(list(batches_of(records, processor, "skip", bad_samples=patient))) == 10


def test_where_everything_is_bad_replacing_gives_up():
  class Bad(list):
    source = "x"

    def __getitem__(self, i):
      raise DataError(f"x, sample {i}: bad")

  with pytest.raises(DataError, match="x, sample 2: bad; and 100 other samples tried in its place are bad too"):
    make(Bad([0] * 9), 2, lambda sample: sample, "replace", 0)


def test_substitutes_depend_on_seed_and_index():
  first = bad_samples.substitutes(0, 5, 1000)
  assert first == bad_samples.substitutes(0, 5, 1000) and 5 not in first
  assert first != bad_samples.substitutes(0, 6, 1000) and first != bad_samples.substitutes(1, 5, 1000)


def test_what_processes_found_before_is_shared_among_them(tmp_path):
  log = BadSamples(1.0, tmp_path)
  for step in range(6):
    log.note(bad_samples.Made("x", None, "p", 100 + step, -1), step, 0)
  with open(tmp_path / bad_samples.FILE, "a") as file:
    file.write('{"index": 3, "problem": "of an older version"}\n{"step": 1, "pla')  # the second cut by a crash
  again = BadSamples(1.0, tmp_path)
  again.resume(4, 40, 2)
  assert (again.seen, again.bad) == (40, 2)
  again.resume(0, 0)
  assert (again.seen, again.bad) == (0, 0)


def test_processes_do_not_tear_each_others_lines(tmp_path):
  code = """
import sys
from mllm_jax.data.bad_samples import BadSamples, Made
log = BadSamples(1.0, sys.argv[1])
for i in range(200):
  log.note(Made("x", None, "p" * 300, int(sys.argv[2]) * 1000 + i, -1), 0, i)
"""
  environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
  command = [sys.executable, "-c", code, str(tmp_path)]
  writers = [subprocess.Popen([*command, str(p)], env=environment) for p in range(3)]
  assert [writer.wait() for writer in writers] == [0, 0, 0]
  lines = [json.loads(line) for line in (tmp_path / bad_samples.FILE).read_text().splitlines()]
  assert sorted(line["index"] for line in lines) == sorted(p * 1000 + i for p in range(3) for i in range(200))
