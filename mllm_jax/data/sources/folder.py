"""A folder of image files as a source: images alone, without turns."""

import os
from collections.abc import Iterator, Sequence

from mllm_jax import places
from mllm_jax.data.image_files import EXTENSIONS
from mllm_jax.data.records import DataError, Records, Sample
from mllm_jax.data.sources import SHARD


class FolderRecords(Records):
  """The image files of a folder and of the folders in it, by name. Can be pickled. Made by `FolderRecords.open`."""

  def __init__(self, source: str, names: Sequence[str]):
    self.source, self._names = source, tuple(names)

  @classmethod
  def open(cls, path: str) -> "FolderRecords":
    """Lists a local folder. Raises DataError where there is no image file."""
    names = sorted(image_names(path))
    if not names:
      raise DataError(f"{path}: holds no image files ({', '.join(EXTENSIONS)}); name another folder")
    return cls(path, names)

  def __len__(self) -> int:
    return len(self._names)

  def __getitem__(self, i: int) -> Sample:
    """Image i; its id is its path inside the folder. Raises IndexError past the end."""
    index = self._index(i)
    name = self._names[index]
    return Sample(name, index, (os.path.join(self.source, name),), (), source=self.source)


def image_names(path: str) -> Iterator[str]:
  """The image files in a local folder and in those inside it, by their paths from there; hidden ones are left out."""
  for folder, inner, files in os.walk(path, followlinks=True):
    inner[:] = [name for name in inner if not name.startswith(".")]
    for name in files:
      if name.lower().endswith(EXTENSIONS) and not name.startswith("."):
        yield os.path.relpath(os.path.join(folder, name), path)


def is_image_folder(path: str) -> bool:
  """Whether a path names a local folder of images. One with shards, or what `prepare` leaves beside them, is none."""
  if places.is_remote(path) or not os.path.isdir(path):
    return False
  with os.scandir(path) as entries:
    if any(entry.name.endswith((SHARD, ".json")) for entry in entries):
      return False
  return next(image_names(path), None) is not None
