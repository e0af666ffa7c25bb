"""Lengths: measured without making rows, checked in the same pass, and kept."""

import os

import numpy as np
import pytest
from known_samples import N, T
from PIL import Image

from mllm_jax.config import DataConfig, VisionConfig
from mllm_jax.data import lengths
from mllm_jax.data.__main__ import main
from mllm_jax.data.aspects import Anyres, Square
from mllm_jax.data.pipeline import TrainingBatches
from mllm_jax.data.processor import Processor
from mllm_jax.data.records import DataError, Records, check
from mllm_jax.data.sources.mix import open_data


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


def test_one_pass_finds_what_the_check_finds(write_data, processor, tmp_path):
  """And what else no row can be made of; such samples count as nothing, and their lengths are not kept."""
  turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A"}]
  samples = [{"id": i, "image": f"{i}.png", "conversations": turns} for i in range(6)]
  samples[2]["image"], samples[4]["conversations"] = [], turns[:1]
  records = Records.load(*write_data(samples))
  os.remove(records[5].images[0])
  problems = []
  table = lengths.measured(tmp_path / "lengths.npz", records, processor, problems=problems)
  assert problems == check(records, max_images=3) and [i for i, _ in problems] == [2, 4, 5]
  assert table.places.tolist() == [table.places[0]] * 2 + [0] + [table.places[0]] * 1 + table.places[4:].tolist()
  assert table.places[0] > 0 and not (tmp_path / "lengths.npz").exists()
  skipped = []
  lengths.measured(tmp_path / "lengths.npz", records, processor, policy="skip", problems=skipped)
  again = []
  lengths.measured(tmp_path / "lengths.npz", records, processor, policy="skip", problems=again)
  assert skipped == again == problems and (tmp_path / "lengths.npz").exists()


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
  elsewhere = Records.load(path, str(tmp_path))  # where pictures of the same names may have other sizes
  assert lengths.fingerprint(elsewhere, maker) != lengths.fingerprint(records, maker)
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
