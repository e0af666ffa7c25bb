"""The published data sets of the probes as they are unpacked: words, label maps, birds.

text            MJSynth: annotation_train.txt, annotation_test.txt and the numbered folders that they name;
                or IIIT5K: traindata.mat, testdata.mat, train/, test/
segmentation    COCO-Stuff: images/train2017, images/val2017 and annotations/train2017, annotations/val2017
classes         CUB-200-2011: images.txt, image_class_labels.txt, train_test_split.txt, bounding_boxes.txt,
                classes.txt, images/
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mllm_jax.data.records import DataError
from mllm_jax.probes import coco_stuff
from mllm_jax.probes.examples import Data, Example, check

# Words are told without case and without anything but letters and digits, as IIIT5K's results are published.
ALPHABET = tuple("0123456789abcdefghijklmnopqrstuvwxyz")


def open_data(task: str, train: str, test: str, classes: int = 27) -> Data:
  """The halves of a task's data set in local folders: the training half of `train`, the other of `test`.

  classes: of the segmentation, 27 or 171. Raises DataError where a file is missing or is not as published.
  """
  found = []
  for folder, half in ((train, "train"), (test, "test")):
    if not os.path.isdir(folder):
      raise DataError(f"{folder}: no such folder; it must hold a data set for the probe {task!r}, see --help")
    found.append({"text": words, "segmentation": label_maps, "classes": birds}[task](Path(folder), half))
    check(found[-1], f"{folder}, {half}")
  if task == "text":
    return Data(*found, ALPHABET)
  if task == "segmentation":
    return Data(*found, coco_stuff.classes(classes), coco_stuff.table(classes))
  if species(test) != species(train):
    raise DataError(f"{test} has other classes than {train}; test on those that are trained on")
  return Data(*found, species(train))


def words(folder: Path, half: str) -> Sequence[Example]:
  """MJSynth's or IIIT5K's pictures of words. Raises DataError where it is neither."""
  annotation, matrix = folder / f"annotation_{half}.txt", folder / f"{half}data.mat"
  if annotation.is_file():
    return MjSynth(annotation)
  if matrix.is_file():
    return iiit5k(matrix)
  raise DataError(
    f"{folder} holds neither {annotation.name} (MJSynth; in its archive mnt/ramdisk/max/90kDICT32px) nor {matrix.name} "
    "(IIIT5K); name the folder that does"
  )


class MjSynth(Sequence):
  """The lines of an annotation file, "./2425/1/115_Lube_45484.jpg 45484": the word stands in the picture's name.

  There are seven million, so that they are kept as the bytes of the file.
  """

  def __init__(self, annotation: Path):
    self.file, self._bytes = annotation, annotation.read_bytes()
    ends = np.flatnonzero(np.frombuffer(self._bytes, np.uint8) == ord("\n"))
    starts = np.concatenate([[0], ends + 1])
    self._starts = starts if starts[-1] < len(self._bytes) else starts[:-1]

  def __len__(self) -> int:
    return len(self._starts)

  def __getitem__(self, i: int) -> Example:
    start = int(self._starts[i])
    end = self._bytes.find(b"\n", start)
    line = self._bytes[start : end if end >= 0 else None].decode("utf-8", "replace")
    name = line.split(" ")[0].strip()
    parts = Path(name).stem.split("_")
    if len(parts) != 3:
      raise DataError(f"{self.file}, line {i + 1}: {name!r} is no NUMBER_WORD_NUMBER.jpg; the file is not as published")
    return Example(str(self.file.parent / name), parts[1])


def iiit5k(matrix: Path) -> list[Example]:
  """The words of traindata.mat or testdata.mat: a structure with the fields ImgName and GroundTruth."""
  from scipy.io import loadmat  # only this needs it

  key = matrix.stem
  try:
    rows = loadmat(matrix, squeeze_me=True, variable_names=[key])[key]
    found = [(str(row["ImgName"]), str(row["GroundTruth"])) for row in np.atleast_1d(rows)]
  except (KeyError, ValueError, TypeError, IndexError, NotImplementedError, OSError) as error:
    raise DataError(f"{matrix}: holds no {key} with ImgName and GroundTruth ({error}); fetch the file again") from error
  return [Example(str(matrix.parent / name), word) for name, word in found]


def label_maps(folder: Path, half: str) -> list[Example]:
  """COCO-Stuff's pictures, each with the PNG of its labels; the test half is val2017."""
  split = {"train": "train2017", "test": "val2017"}[half]
  maps = folder / "annotations" / split
  for needed in (maps, folder / "images" / split):
    if not needed.is_dir():
      raise DataError(f"{needed}: no such folder; COCO's pictures and stuffthingmaps' PNGs belong there")
  names = sorted(entry.name for entry in os.scandir(maps) if entry.name.endswith(".png"))
  return [Example(str(folder / "images" / split / (name[:-4] + ".jpg")), str(maps / name)) for name in names]


def birds(folder: Path, half: str) -> list[Example]:
  """CUB-200-2011's pictures with their classes, counted from 0, and the birds' boxes."""
  files = ("images", "image_class_labels", "train_test_split", "bounding_boxes")
  names, labels, splits, boxes = (_columns(folder / f"{name}.txt") for name in files)
  found = []
  for number, (name,) in names.items():
    try:
      (label,), (training,), (x, y, width, height) = labels[number], splits[number], map(float, boxes[number])
      if (training == "1") == (half == "train"):
        found.append(Example(str(folder / "images" / name), int(label) - 1, (x, y, x + width, y + height)))
    except (KeyError, ValueError) as error:
      raise DataError(f"{folder}: image {number} of images.txt is not in all of {', '.join(files[1:])}") from error
  return found


def species(folder: str) -> tuple[str, ...]:
  """The classes of CUB-200-2011."""
  return tuple(name for (name,) in _columns(Path(folder) / "classes.txt").values())


def _columns(file: Path) -> dict[str, list[str]]:
  """The lines of a file by their first word: its other words. Raises DataError where there is no such file."""
  try:
    lines = file.read_text(encoding="utf-8").split("\n")
  except OSError as error:
    raise DataError(f"{file} cannot be read ({error.strerror}); unpack the data set again") from error
  return {number: rest for number, *rest in (line.split() for line in lines if line.strip())}
