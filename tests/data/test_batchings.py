"""Batches of several samples a row or of several lengths, and batches made by worker processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mllm_jax.config import ConfigError, DataConfig, VisionConfig, check_batching
from mllm_jax.data import lengths
from mllm_jax.data.__main__ import main
from mllm_jax.data.aspects import Anyres, Square
from mllm_jax.data.bad_samples import FILE, BadSamples
from mllm_jax.data.pipeline import TrainingBatches
from mllm_jax.data.processor import Processor, Row
from mllm_jax.data.records import DataError, Records
from mllm_jax.data.rows import RowMaker, Wanted
from mllm_jax.data.sources.mix import open_data

N = 23
T = 3  # visual tokens of an image
WORDS = "the answer has some more words of different length".split()


@pytest.fixture
def records(write_data):
  samples = []
  for i in range(N):
    question = {"from": "human", "value": ("<image>" if i % 4 else "") + f"What is {i}?"}
    samples.append(
      {
        "id": i,
        "image": f"{i}.png" if i % 4 else [],
        "conversations": [question, {"from": "gpt", "value": " ".join((WORDS * 5)[: 1 + (7 * i) % 31])}],
      }
    )
  return Records.load(*write_data(samples))


@pytest.fixture
def processor(tokenizers):
  return Processor(tokenizers[False], Square(VisionConfig(image_size=28), T), "vicuna_v1", 230, 3)


@pytest.fixture
def table(records, processor):
  return lengths.measure(records, processor)


@pytest.fixture(params=["fixed", "group", "pack"])
def make(request, records, processor, table):
  """TrainingBatches(**options) of each batching."""
  options = {"lengths": table, "batching": request.param}
  options |= {"row_length": 460} if request.param == "pack" else {}
  options |= {"buckets": (150, 190, 230)} if request.param == "group" else {}

  def make(**more):
    return TrainingBatches(records, processor, **options | {"batch_size": 4, "threads": 0, "seed": 3} | more)

  make.batching = request.param
  return make


def arrays(batch) -> list[np.ndarray]:
  """All arrays of a Batch or a tuple of them."""
  return [getattr(part, name) for part in (batch if isinstance(batch, tuple) else (batch,)) for name in Row._fields]


def assert_same(found, expected):
  assert [ids for ids, _ in found] == [ids for ids, _ in expected]
  for (_, a), (_, b) in zip(found, expected, strict=True):
    for x, y in zip(arrays(a), arrays(b), strict=True):
      np.testing.assert_array_equal(x, y)


def test_measured_lengths_are_those_of_the_rows(records, processor, table):
  for i, sample in enumerate(records):
    row = processor.row(sample)
    assert table.places[i] == row.segment_ids.sum() and table.crops[i] == table.images[i] == row.grids.any(1).sum()
    assert table.words[i] == sum(len(turn.text.split()) for turn in sample.turns)
  assert (table.signed_words < 0).tolist() == [i % 4 == 0 for i in range(N)]
  with_workers = lengths.measure(records, processor, workers=2)
  for name in lengths.FIELDS:
    np.testing.assert_array_equal(getattr(with_workers, name), getattr(table, name))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sample_that_cannot_be_measured_is_named(write_data, processor, workers):
  turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A"}]
  records = Records.load(*write_data([{"id": "a", "conversations": turns[1:]}, {"id": "b", "conversations": turns}]))
  with pytest.raises(DataError, match=r"sample 1 \('b'\): 1 <image> in the human turns but 0 images"):
    lengths.measure(records, processor, workers=workers)


def test_lengths_are_measured_anew_only_where_the_data_changed(tmp_path, records, processor, table, tokenizers):
  path, measured = tmp_path / "run" / "lengths.npz", []
  ask = lambda processor: lengths.measured(path, records, processor, progress=measured.append)
  for _ in range(2):
    np.testing.assert_array_equal(ask(processor).places, table.places)
  assert sum(measured) == N
  more = Processor(tokenizers[False], Square(processor.vision, T + 1), "vicuna_v1", 230, 3)
  np.testing.assert_array_equal(ask(more).places, table.places + table.images)
  assert sum(measured) == 2 * N
  os.utime(records.source, ns=(1, 1))
  ask(more)
  assert sum(measured) == 3 * N


def test_a_step_is_the_same_wherever_iteration_starts(make):
  whole = list(make(epochs=3))
  for start in (1, len(whole) // 2, len(whole)):
    assert_same(list(make(epochs=3).iterate(start)), whole[start:])


def test_threads_and_workers_change_nothing(make):
  expected = list(make(epochs=1, accumulation=2))
  for options in ({"threads": 3}, {"workers": 1, "threads": 0}, {"workers": 2, "threads": 2}):
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
  batches = make(workers=2, batch_size=2)
  bad = records[next(i for row in batches.rows(2) for i in row if records[i].images)]
  os.remove(bad.images[0])
  iterator = iter(batches)
  with pytest.raises(DataError) as error:
    list(iterator)
  assert type(error.value) is DataError
  assert str(error.value).startswith(f"{bad.name}: image {bad.images[0]} is missing; ")


def is_worker(pid: int) -> bool:
  try:
    return b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()  # empty once it has ended
  except OSError:
    return False


def workers_of(pid: int) -> list[int]:
  """The processes that a process's multiprocessing has started, of which one watches over its shared memory."""
  found = []
  for folder in Path("/proc").glob("[0-9]*"):
    try:
      parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
      if parent == pid and is_worker(int(folder.name)):
        found.append(int(folder.name))
    except OSError:  # it has ended
      continue
  return found


@pytest.mark.parametrize("end", ["close", "kill"])
def test_workers_end_with_the_process_that_started_them(tmp_path, records, tokenizer_folders, end):
  code = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from mllm_jax.config import VisionConfig
from mllm_jax.data import chat
from mllm_jax.data.pipeline import TrainingBatches
from mllm_jax.data.processor import Processor
from mllm_jax.data.aspects import Square
from mllm_jax.data.records import Records

if __name__ == "__main__":
  records = Records.load({records.source!r}, {records.image_folder!r})
  processor = Processor(chat.load_tokenizer(sys.argv[1]), Square(VisionConfig(image_size=28), 3), "vicuna_v1", 230, 3)
  batches = TrainingBatches(records, processor, batch_size=4, epochs=9, workers=2)
  iterator = iter(batches)
  next(iterator)
  print("first", flush=True)
  sys.stdin.readline()
  for _ in range(20):
    next(iterator)
  iterator.close()
  print("closed", flush=True)
  sys.stdin.readline()
"""
  (tmp_path / "main.py").write_text(code)
  process = subprocess.Popen(
    [sys.executable, str(tmp_path / "main.py"), tokenizer_folders[False]],
    env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )
  try:
    assert process.stdout.readline() == "first\n"
    workers = workers_of(process.pid)
    assert len(workers) == 2
    if end == "close":
      for pid in workers:  # as when a whole group of processes is signalled
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGTERM)
      process.stdin.write("\n")
      process.stdin.flush()
      assert process.stdout.readline() == "closed\n"
    else:
      process.kill()
    deadline = time.time() + 20
    while any(is_worker(pid) for pid in workers) and time.time() < deadline:
      time.sleep(0.1)
    assert not any(is_worker(pid) for pid in workers)
  finally:
    process.kill()
    process.communicate()


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


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("policy", ["skip", "replace"])
@pytest.mark.parametrize("batching", ["group", "pack"])
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


def test_tiled_pictures_are_measured_by_their_headers(write_data, tokenizers, tmp_path, monkeypatch):
  turns = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A dog."}]
  path, folder = write_data([{"id": i, "image": f"{i}.png", "conversations": turns} for i in range(12)])
  draw = np.random.default_rng(0)
  for i in range(12):
    shape = (*draw.integers(10, 200, 2), 3)
    Image.fromarray(draw.integers(0, 256, shape, np.uint8)).save(f"{folder}/{i}.png")
  os.rename(f"{folder}/5.png", f"{folder}/5.jpg")  # found under another extension
  maker = Processor(tokenizers[False], Anyres(VisionConfig(image_size=28), 4), "vicuna_v1", 400, 10)
  records = Records.load(path, folder)
  with monkeypatch.context() as patch:
    patch.setattr(Image.Image, "resize", None)  # nothing is decoded
    patch.setattr("mllm_jax.data.images.decode", None)
    table = lengths.measure(records, maker)
  rows = [maker.row(sample) for sample in records]
  assert table.places.tolist() == [int((row.segment_ids > 0).sum()) for row in rows]
  assert table.crops.tolist() == [int(row.grids.any(axis=1).sum()) for row in rows]
  assert len(set(table.crops.tolist())) > 1 and (table.images == 1).all()
  batches = TrainingBatches(
    records, maker, batching="pack", row_length=800, lengths=table, batch_size=2, threads=0, epochs=2
  )
  for _, batch in batches:
    assert batch.patches.shape[:3] == (1, 2, 10)
  narrow = Processor(tokenizers[False], Anyres(VisionConfig(image_size=28), 4), "vicuna_v1", 400, 2)
  with pytest.raises(DataError, match="crops, and a row has room for 2; raise data.max_images"):
    lengths.measure(records, narrow)
  os.remove(f"{folder}/3.png")
  with pytest.raises(DataError, match=r"sample 3 \('3'\): image .*3.png is missing"):
    lengths.measure(records, maker)
  with open(f"{folder}/3.png", "wb") as file:
    file.write(b"<html>")
  with pytest.raises(DataError, match=r"sample 3 \('3'\): image .*3.png cannot be decoded .*it is no image"):
    lengths.measure(records, maker)


def test_lengths_of_mixes_and_shards_are_kept(records, processor, tmp_path, write_data):
  other = write_data(
    [{"id": "x", "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}], "b"
  )
  os.rename(other[0], other[0] + ".json")
  rows = lambda share: DataConfig(
    path=records.source, image_folder=records.image_folder, mix=((other[0] + ".json", "", share),)
  )
  measured = []
  ask = lambda records: lengths.measured(tmp_path / "lengths.npz", records, processor, progress=measured.append)
  for _ in range(2):
    table = ask(open_data(rows("2.0"), 0))
  assert len(table) == N + 2 and sum(measured) == N + 2
  assert len(ask(open_data(rows("1.0"), 0))) == N + 1 and sum(measured) == 2 * N + 3
  os.utime(other[0] + ".json", ns=(1, 1))
  ask(open_data(rows("1.0"), 0))
  assert sum(measured) == 3 * N + 4

  shards = tmp_path / "shards"
  main(["prepare", f"--path={records.source}", f"--image_folder={records.image_folder}", f"--out={shards}"]
       + ["--samples_per_shard=9", "--processes=1"])  # fmt: skip
  before = sum(measured)
  for _ in range(2):
    table = ask(Records.load(str(shards), ""))
  assert sum(measured) == before + N
  np.testing.assert_array_equal(table.places, lengths.measure(records, processor).places)
  os.utime(sorted(shards.glob("*.arrayrecord"))[1], ns=(1, 1))
  ask(Records.load(str(shards), ""))
  assert sum(measured) == before + 2 * N
