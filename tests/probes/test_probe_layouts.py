"""The published layouts of the probes' data sets, made small here, and what is said where they are not whole."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from mllm_jax.data.records import DataError
from mllm_jax.probes import coco_stuff, layouts


def picture(path: Path, size=(20, 10)) -> Path:
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(np.full((size[1], size[0], 3), 90, np.uint8)).save(path)
  return path


@pytest.fixture
def mjsynth(tmp_path) -> Path:
  lines = {"train": ["./1/1/115_Lube_45484.jpg 45484", "./1/2/7_slinking_1.jpg 1"], "test": ["./2/1/3_AB12_9.jpg 9"]}
  for half, names in lines.items():
    (tmp_path / f"annotation_{half}.txt").write_text("\n".join(names) + ("\n" if half == "train" else ""))
    for name in names:
      picture(tmp_path / name.split(" ")[0])
  return tmp_path


def test_mjsynth(mjsynth):
  data = layouts.open_data("text", str(mjsynth), str(mjsynth))
  assert [example.label for example in data.train] == ["Lube", "slinking"]
  assert [example.label for example in data.test] == ["AB12"]  # its file has no end of line
  assert data.train[1].picture == str(mjsynth / "1/2/7_slinking_1.jpg") and data.train[1].open().size == (20, 10)
  assert len(data.classes) == 36


def test_iiit5k_is_tested_on_after_mjsynth(mjsynth, tmp_path):
  other = tmp_path / "IIIT5K"
  picture(other / "test" / "10_1.png"), picture(other / "test" / "10_2.png")
  fields = [("ImgName", object), ("GroundTruth", object), ("smallLexi", object)]
  rows = np.array([[("test/10_1.png", "MAKE", "x"), ("test/10_2.png", "YOU", "y")]], fields)
  savemat(other / "testdata.mat", {"testdata": rows})
  data = layouts.open_data("text", str(mjsynth), str(other))
  assert [example.label for example in data.test] == ["MAKE", "YOU"]
  assert data.test[1].picture == str(other / "test/10_2.png")
  savemat(other / "traindata.mat", {"something": np.zeros(3)})
  with pytest.raises(DataError, match="traindata.mat: holds no traindata"):
    layouts.open_data("text", str(other), str(other))


def test_words_that_are_not_there(mjsynth, tmp_path):
  with pytest.raises(DataError, match="neither annotation_train.txt .* nor traindata.mat"):
    layouts.open_data("text", str(tmp_path / "1"), str(mjsynth))
  with pytest.raises(DataError, match="nowhere: no such folder"):
    layouts.open_data("text", str(tmp_path / "nowhere"), str(mjsynth))
  (mjsynth / "1/2/7_slinking_1.jpg").unlink()
  with pytest.raises(DataError, match="1 files are missing, the first is .*7_slinking_1.jpg"):
    layouts.open_data("text", str(mjsynth), str(mjsynth))
  (mjsynth / "annotation_train.txt").write_text("./1/1/115.jpg 3\n")
  with pytest.raises(DataError, match="line 1: './1/1/115.jpg' is no NUMBER_WORD_NUMBER.jpg"):
    layouts.open_data("text", str(mjsynth), str(mjsynth))
  (mjsynth / "annotation_train.txt").write_text("")
  with pytest.raises(DataError, match="names no picture"):
    layouts.open_data("text", str(mjsynth), str(mjsynth))


def test_coco_stuff(tmp_path):
  for split in ("train2017", "val2017"):
    picture(tmp_path / "images" / split / "000000000009.jpg")
    (tmp_path / "annotations" / split).mkdir(parents=True)
    Image.fromarray(np.zeros((10, 20), np.uint8)).save(tmp_path / "annotations" / split / "000000000009.png")
  data = layouts.open_data("segmentation", str(tmp_path), str(tmp_path), 171)
  assert len(data.classes) == 171 and data.test[0].picture == str(tmp_path / "images/val2017/000000000009.jpg")
  assert len(layouts.open_data("segmentation", str(tmp_path), str(tmp_path)).classes) == 27
  (tmp_path / "images/val2017/000000000009.jpg").unlink()
  with pytest.raises(DataError, match="val2017/000000000009.jpg"):
    layouts.open_data("segmentation", str(tmp_path), str(tmp_path))
  with pytest.raises(DataError, match="annotations/train2017: no such folder"):
    layouts.open_data("segmentation", str(tmp_path / "images"), str(tmp_path))


def test_coco_stuff_classes():
  """Some of the categories by their published numbers, less one as label maps hold them."""
  groups, categories = coco_stuff.table(27), coco_stuff.table(171)
  names = coco_stuff.classes(27)
  told = {1: "person", 3: "vehicle", 17: "animal", 27: "accessory", 44: "kitchen", 62: "furniture", 90: "indoor"}
  told |= {97: "plant", 101: "floor", 106: "sky", 120: "water", 150: "solid", 151: "building", 182: "solid"}
  assert {number: names[groups[number - 1]] for number in told} == told
  for number in coco_stuff.UNUSED:
    assert groups[number - 1] == categories[number - 1] == coco_stuff.VOID
  assert groups[255] == categories[255] == coco_stuff.VOID and groups[182] == coco_stuff.VOID
  # Every category has a group, and the 171 are counted through in order.
  assert sorted(set(groups.tolist())) == [*range(27), coco_stuff.VOID]
  assert (groups != coco_stuff.VOID).sum() == (categories != coco_stuff.VOID).sum() == 171
  assert categories[0] == 0 and categories[181] == 170


def cub(folder: Path) -> Path:
  names = ["001.Black_footed_Albatross/a.jpg", "002.Laysan/b.jpg", "002.Laysan/c.jpg"]
  for name in names:
    picture(folder / "images" / name)
  write = lambda file, rows: (folder / file).write_text("".join(f"{i} {row}\n" for i, row in enumerate(rows, 1)))
  write("images.txt", names)
  write("image_class_labels.txt", [1, 2, 2])
  write("train_test_split.txt", [1, 1, 0])
  write("bounding_boxes.txt", ["1.0 2.0 5.0 6.0", "0.0 0.0 20.0 10.0", "15.0 5.0 30.0 30.0"])
  write("classes.txt", ["001.Black_footed_Albatross", "002.Laysan"])
  return folder


def test_cub(tmp_path):
  folder = str(cub(tmp_path))
  data = layouts.open_data("classes", folder, folder)
  assert [example.label for example in data.train] == [0, 1] and [example.label for example in data.test] == [1]
  assert data.classes == ("001.Black_footed_Albatross", "002.Laysan")
  assert data.train[0].open().size == (5, 6)
  assert data.test[0].open().size == (5, 5)  # what of its box is on the picture
  (tmp_path / "bounding_boxes.txt").write_text("1 1.0 2.0 5.0 6.0\n")
  with pytest.raises(DataError, match="image 2 of images.txt is not in all of .*bounding_boxes"):
    layouts.open_data("classes", folder, folder)
  (tmp_path / "train_test_split.txt").unlink()
  with pytest.raises(DataError, match="train_test_split.txt cannot be read"):
    layouts.open_data("classes", folder, folder)


def test_other_birds_are_refused(tmp_path):
  first, second = cub(tmp_path / "a"), cub(tmp_path / "b")
  (second / "classes.txt").write_text("1 001.Crow\n2 002.Jay\n")
  with pytest.raises(DataError, match="has other classes than"):
    layouts.open_data("classes", str(first), str(second))
