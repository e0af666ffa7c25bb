"""What the probes are trained and tested on: pictures with a label each, from files or from memory."""

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from mllm_jax.data import images
from mllm_jax.data.records import DataError

CHECKED = 300_000  # files of a split that are looked for before anything is computed; of more, some at even distances


class Example(NamedTuple):
  """A picture, its file or uint8 [H, W, 3], and what is to be told of it: a word, the number of a class, or the class
  of each pixel as a file or uint8 [H, W]. box: left, top, right, bottom of what counts, in pixels; None: all of it."""

  picture: str | np.ndarray
  label: str | int | np.ndarray
  box: tuple[float, float, float, float] | None = None

  def open(self) -> Image.Image:
    """The picture, cut to its box. Raises DataError where its file cannot be used."""
    image = images.load(self.picture) if isinstance(self.picture, str) else Image.fromarray(self.picture)
    if self.box is None:
      return image
    left, top, right, bottom = (round(value) for value in self.box)
    left, top = min(max(left, 0), image.width - 1), min(max(top, 0), image.height - 1)
    return image.crop((left, top, max(min(right, image.width), left + 1), max(min(bottom, image.height), top + 1)))


class Data(NamedTuple):
  """Two halves without a picture in common, and the names of the classes, or of the letters. table: uint8 [256], the
  class of each value of a label map, or None where the values are the classes."""

  train: Sequence[Example]
  test: Sequence[Example]
  classes: tuple[str, ...]
  table: np.ndarray | None = None


def check(examples: Sequence[Example], source: str) -> None:
  """Raises DataError, naming the first, where the files of examples are missing, or there are no examples."""
  if not len(examples):
    raise DataError(f"{source} names no picture; the data set is not there as published, unpack it again")
  chosen = np.linspace(0, len(examples) - 1, min(len(examples), CHECKED)).astype(int).tolist()
  missing = [path for i in chosen for path in _files(examples[i]) if not os.path.isfile(path)]
  if missing:
    raise DataError(f"{source}: {len(missing)} files are missing, the first is {missing[0]}; unpack the data set again")


def _files(example: Example) -> list[str]:
  """The files of an example; a word is no file."""
  label_map = isinstance(example.label, str) and example.label.endswith(".png")
  return [each for each in (example.picture, example.label if label_map else None) if isinstance(each, str)]
