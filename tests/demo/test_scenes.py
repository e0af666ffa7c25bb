import json

import numpy as np
import pytest
from PIL import Image

from mllm_jax.demo import scenes
from mllm_jax.demo.export_digits import split
from mllm_jax.demo.write import Sizes, write

SMALL = Sizes(pictures=15, captions=12, conversations=20, turns=3, heldout_pictures=16, heldout_questions=4)


def test_the_split_is_disjoint_and_in_proportion():
  digits = scenes.load_digits()
  assert digits.scans.shape == (1797, 8, 8) and digits.scans.max() == 16
  assert (len(digits.train_indices), len(digits.held_out_indices)) == (1437, 360)
  assert not set(digits.train_indices) & set(digits.held_out_indices)
  for digit in range(10):
    share = (digits.labels[digits.held_out] == digit).sum() / (digits.labels == digit).sum()
    assert abs(share - 360 / 1797) < 0.01  # half a scan of some 180


def test_no_scan_stands_on_both_sides_of_the_split():
  digits = scenes.load_digits()
  train = {scan.tobytes() for scan in digits.scans[digits.train_indices]}
  assert not train & {scan.tobytes() for scan in digits.scans[digits.held_out_indices]}


def test_the_stored_split_is_the_exported_one():
  digits = scenes.load_digits()
  np.testing.assert_array_equal(digits.held_out, split(digits.labels, 360))


def test_objects_lie_in_the_picture_apart_and_in_their_places():
  rng, scans = np.random.default_rng(0), scenes.load_digits().train_indices
  for count in (None, None, 9) * 100:
    scene = scenes.sample_scene(rng, scans, count=count)
    places = [thing.row * 3 + thing.column for thing in scene.objects]
    assert places == sorted(set(places))
    for thing in scene.objects:
      left, top, right, bottom = thing.box
      assert min(left, top) >= 0 and max(right, bottom) <= scenes.IMAGE_SIZE
      assert (thing.y * 3 // scenes.IMAGE_SIZE, thing.x * 3 // scenes.IMAGE_SIZE) == (thing.row, thing.column)
      assert thing.digit == scenes.load_digits().labels[thing.scan]
    patches = [thing.patch for thing in scene.objects]
    assert len(set(patches)) == len(patches)


def test_a_picture_shows_its_scene():
  thing = scenes.Object(scan=0, digit=0, colour="red", row=0, column=2, x=91, y=21, size=16)
  picture = scenes.render(scenes.Scene("navy", (thing,)))
  assert picture.shape == (112, 112, 3) and picture.dtype == np.uint8
  left, top, right, bottom = thing.box
  outside = np.ones((112, 112), bool)
  outside[top:bottom, left:right] = False
  assert (picture[outside] == scenes.GROUNDS["navy"]).all()
  ink = scenes.glyph(0, 16)
  ground, colour = np.array(scenes.GROUNDS["navy"]), np.array(scenes.COLOURS["red"])
  expected = ground + ink[..., None] * (colour - ground)
  assert ink.max() > 0.9 and np.abs(picture[top:bottom, left:right] - expected).max() <= 0.51  # rounding to uint8
  np.testing.assert_array_equal(picture, scenes.render(scenes.Scene("navy", (thing,))))


def test_the_data_set_is_written_once_and_is_the_same_again(tmp_path):
  folder = write(tmp_path / "data", seed=3, sizes=SMALL)
  before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
  content = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
  assert write(folder, seed=3, sizes=SMALL) == folder
  assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
  other = write(tmp_path / "other", seed=3, sizes=SMALL)
  assert {path.relative_to(other): path.read_bytes() for path in other.rglob("*") if path.is_file()} == content
  write(folder, seed=4, sizes=SMALL)
  assert (folder / "pretrain.json").read_bytes() != content[(other / "pretrain.json").relative_to(other)]
  assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "other"]


def test_an_interrupted_run_leaves_nothing_that_counts(tmp_path, monkeypatch):
  def full(*args, **kwargs):
    raise OSError("disk full")

  with monkeypatch.context() as patch:
    patch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError):
      write(tmp_path / "data", sizes=SMALL)
  assert not (tmp_path / "data").exists()
  assert (write(tmp_path / "data", sizes=SMALL) / "heldout.json").is_file()


def test_a_folder_of_other_things_is_left_alone(tmp_path):
  (tmp_path / "thesis.txt").write_text("mine")
  with pytest.raises(FileExistsError, match="dataset.json"):
    write(tmp_path, sizes=SMALL)
  assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_the_files_are_llava_json(tmp_path):
  folder = write(tmp_path / "data", sizes=SMALL)
  files = {name: json.loads((folder / f"{name}.json").read_text()) for name in ("pretrain", "finetune", "heldout")}
  assert [len(samples) for samples in files.values()] == [12, 20, 16]
  for name, samples in files.items():
    assert len({sample["id"] for sample in samples}) == len(samples)
    for sample in samples:
      with Image.open(folder / sample["image"]) as picture:
        assert picture.size == (112, 112) and picture.mode == "RGB"
      turns = sample["conversations"]
      assert [turn["from"] for turn in turns] == ["human", "gpt"] * {"pretrain": 1, "finetune": 3, "heldout": 4}[name]
      assert turns[0]["value"].startswith("<image>\n") and "<image>" not in "".join(turn["value"] for turn in turns[1:])
      assert all(("category" in turn) == (name == "heldout" and turn["from"] == "gpt") for turn in turns)
  kinds = [turn["category"] for sample in files["heldout"] for turn in sample["conversations"][1::2]]
  assert max(map(kinds.count, kinds)) - min(map(kinds.count, kinds)) <= 2
  assert len(set(kinds)) == 8
