"""`python -m mllm_jax.data prepare`: the same samples, the same bytes, also when it is stopped in between."""

import dataclasses
import io
import json
import os
import pathlib
import pickle

import numpy as np
import pytest
from PIL import Image

from mllm_jax.config import VisionConfig
from mllm_jax.data import images, lengths
from mllm_jax.data.__main__ import main
from mllm_jax.data.aspects import Anyres, Square
from mllm_jax.data.chat import load_tokenizer
from mllm_jax.data.pipeline import TrainingBatches
from mllm_jax.data.processor import Processor
from mllm_jax.data.records import DataError, Records, check
from mllm_jax.data_commands import prepare
from mllm_jax.places import PlaceError

N = 11


@pytest.fixture
def data(tmp_path):
  folder = tmp_path / "images"
  folder.mkdir()
  samples = []
  for i in range(N):
    name = f"{i}.{('jpg', 'png')[i % 2]}"
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (20 + i, 30, 3), np.uint8)).save(folder / name)
    turns = [{"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": f"A {i}", "category": "c"}]
    samples.append({"id": f"s{i}", "image": name, "category": "ocr", "conversations": turns})
  del samples[4]["image"]
  samples[4]["conversations"][0]["value"] = "Q"
  (tmp_path / "train.json").write_text(json.dumps(samples))
  return tmp_path / "train.json", folder


def run(data, out, *options):
  path, folder = data
  return main(
    ["prepare", f"--path={path}", f"--image_folder={folder}", f"--out={out}", "--samples_per_shard=4", *options]
  )


def contents(folder):
  return {path.name: path.read_bytes() for path in sorted(pathlib.Path(folder).iterdir())}


@pytest.mark.parametrize("processes", [1, 2])
def test_shards_hold_the_samples_and_their_files(data, tmp_path, processes, capsys):
  out = tmp_path / "shards"
  assert run(data, out, f"--processes={processes}") == 0
  assert "11 samples in 3 shards" in capsys.readouterr().out
  names = [f"data-{i:05d}-of-00003.arrayrecord" for i in range(3)]
  beside = [f"data-{i:05d}-of-00003.outlines.gz" for i in range(3)]
  assert sorted(contents(out)) == sorted([*names, *beside, "manifest.json"])
  manifest = json.loads((out / "manifest.json").read_text())
  assert [(shard["name"], shard["samples"]) for shard in manifest["shards"]] == list(zip(names, (4, 4, 3), strict=True))
  before, after = Records.load(str(data[0]), str(data[1])), Records.load(str(out), "")
  assert len(after) == N
  for old, new in zip(before, after, strict=True):
    assert (new.id, new.turns, new.category, new.system) == (old.id, old.turns, old.category, old.system)
    assert new.images == tuple(pathlib.Path(image).read_bytes() for image in old.images)
  assert run(data, out) == 0
  assert "is finished already" in capsys.readouterr().out


def test_a_run_reads_the_same_batches(data, tmp_path, tokenizer_folder):
  out = tmp_path / "shards"
  assert run(data, out, "--processes=1") == 0
  processor = Processor(load_tokenizer(tokenizer_folder), Square(VisionConfig(image_size=28), 3), "vicuna_v1", 90, 1)
  both = [
    TrainingBatches(Records.load(str(path), str(data[1])), processor, batch_size=4, epochs=2) for path in (data[0], out)
  ]
  for (names, batch), (other_names, other) in zip(*both, strict=True):
    assert names == other_names
    np.testing.assert_array_equal(batch.patches, other.patches)
    np.testing.assert_array_equal(batch.tokens, other.tokens)


def test_outlines_tell_all_but_the_pixels(data, tmp_path, tokenizer_folder, capsys):
  out = tmp_path / "shards"
  assert run(data, out, "--processes=1") == 0
  records = Records.load(str(out), "")
  outlines = pickle.loads(pickle.dumps(records)).outlines()
  for whole, outline in zip(records, outlines, strict=True):
    assert dataclasses.replace(outline, images=()) == dataclasses.replace(whole, images=())
    assert [images.size(image) for image in outline.images] == [images.size(image) for image in whole.images]
    assert whole.id == "s4" or outline.images == ((30, 20 + outline.index),)

  (out / "data-00001-of-00003.arrayrecord").rename(tmp_path / "away")  # no record is read
  processor = Processor(load_tokenizer(tokenizer_folder), Anyres(VisionConfig(image_size=28), 4), "vicuna_v1", 90, 1)
  assert [text for _, text in check(records, max_images=0)] == [
    f"{out}, sample {i} ('s{i}'): has 1 images, and a row has room for 0; raise data.max_images"
    for i in range(N)
    if i != 4
  ]
  from_json = lengths.measure(Records.load(str(data[0]), str(data[1])), processor.with_room(1), 0)
  from_shards = lengths.measure(records, processor.with_room(1), 0)
  assert all((getattr(from_json, name) == getattr(from_shards, name)).all() for name in lengths.FIELDS)


def test_folders_of_before_the_outlines_are_read_and_can_be_completed(data, tmp_path, capsys):
  out = tmp_path / "shards"
  assert run(data, out, "--processes=1") == 0
  whole = contents(out)
  for path in out.glob("*.outlines.gz"):
    path.unlink()
  records = Records.load(str(out), "")
  assert records.outlines() is records
  assert run(data, out, "--processes=1") == 0
  assert contents(out) == whole and len(Records.load(str(out), "").outlines()) == N

  (out / "data-00002-of-00003.outlines.gz").write_bytes(whole["data-00002-of-00003.outlines.gz"][:-9] + b"x" * 9)
  with pytest.raises(PlaceError, match="data-00002-of-00003.outlines.gz: cannot be read"):
    check(Records.load(str(out), ""), max_images=1)


def test_stopped_and_started_again_gives_the_same_bytes(data, tmp_path, monkeypatch, capsys):
  whole, parts = tmp_path / "whole", tmp_path / "parts"
  assert run(data, whole, "--processes=1") == 0
  written = []

  def stopping(image, sample, max_side, encoded=prepare.encoded):
    written.append(sample.id)
    if len(written) == 7:
      raise KeyboardInterrupt
    return encoded(image, sample, max_side)

  with monkeypatch.context() as patch:
    patch.setattr(prepare, "encoded", stopping)
    assert run(data, parts, "--processes=1") == 130
  assert "interrupted" in capsys.readouterr().err
  assert "data-00000-of-00003.arrayrecord" in contents(parts) and "manifest.json" not in contents(parts)
  with pytest.raises(DataError, match="is not finished; start the same"):
    Records.load(str(parts), "")
  assert run(data, parts, "--max_side=9") == 2
  assert "was begun with something else (max_side 0, now 9)" in capsys.readouterr().err

  kept = os.stat(parts / "data-00000-of-00003.arrayrecord").st_mtime_ns
  assert run(data, parts, "--processes=1") == 0
  assert os.stat(parts / "data-00000-of-00003.arrayrecord").st_mtime_ns == kept
  assert contents(parts) == contents(whole)


def test_other_data_in_the_same_folder_is_refused(data, tmp_path, capsys):
  out = tmp_path / "shards"
  assert run(data, out, "--processes=1") == 0
  samples = json.loads(data[0].read_text())
  samples[3]["conversations"][1]["value"] = "changed"
  data[0].write_text(json.dumps(samples))
  assert run(data, out) == 2
  assert "was begun with something else (content" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made(data, capsys):
  assert run(data, data[0]) == 2
  assert f"error: {data[0]}: File exists" in capsys.readouterr().err


def test_large_images_are_shrunk(data, tmp_path):
  out = tmp_path / "shards"
  assert run(data, out, "--processes=1", "--max_side=30") == 0
  for i, (sample, old) in enumerate(zip(Records.load(str(out), ""), Records.load(str(data[0]), str(data[1])))):
    if not sample.images:
      continue
    with Image.open(io.BytesIO(sample.images[0])) as image:
      assert image.format == ("JPEG", "PNG")[i % 2]
      assert image.size == (30, 20 + i)
    assert sample.images[0] == pathlib.Path(old.images[0]).read_bytes()
  smaller = tmp_path / "smaller"
  assert run(data, smaller, "--processes=1", "--max_side=15") == 0
  with Image.open(io.BytesIO(Records.load(str(smaller), "")[10].images[0])) as image:
    assert image.size == (15, 15) and image.format == "JPEG"


def test_bad_samples_stop_or_are_left_out(data, tmp_path, capsys):
  os.remove(data[1] / "5.png")
  out = tmp_path / "shards"
  assert run(data, out, "--processes=1") == 2
  error = capsys.readouterr().err
  assert "sample 5 ('s5'): image" in error and "--on_bad_sample=skip leaves such samples out" in error
  assert run(data, tmp_path / "skipped", "--processes=1", "--on_bad_sample=skip") == 2
  assert "1 of 11 samples cannot be used (9.1%), and data.max_bad_share is 1.0%" in capsys.readouterr().err
  assert run(data, tmp_path / "skipped", "--on_bad_sample=skip", "--max_bad_share=0.1") == 0
  assert "10 samples in 3 shards, 1 bad ones left out" in capsys.readouterr().out
  assert [sample.id for sample in Records.load(str(tmp_path / "skipped"), "")] == [f"s{i}" for i in range(N) if i != 5]
  (line,) = (tmp_path / "skipped" / "bad_samples.jsonl").read_text().splitlines()
  assert json.loads(line)["index"] == 5
