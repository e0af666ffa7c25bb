"""Image files: where they are, local or remote, also under another extension than the data set says."""

import functools
import os
from typing import BinaryIO

from mllm_jax import places

# Data sets are downloaded with other extensions than their annotations name: OCR-VQA's covers are .jpg there, and some
# of the files that its script fetches are .gif or .png (https://github.com/haotian-liu/LLaVA/issues/601).
EXTENSIONS = (".jpg", ".jpeg", ".png", ".gif", ".webp")


def locate(path: str) -> str | None:
  """Where an image is: the path itself, else the first sibling with another of EXTENSIONS; None if there is neither."""
  if _exists(path):
    return path
  return next(filter(_exists, siblings(path)), None)


def siblings(path: str) -> list[str]:
  """The same path with each of the other extensions; none for a path whose own extension is not of them."""
  stem, extension = os.path.splitext(path)
  if extension.lower() not in EXTENSIONS:
    return []
  return [stem + other for other in EXTENSIONS if other != extension]


def _exists(path: str) -> bool:
  if "://" not in path or not places.is_remote(path):
    return os.path.isfile(path)
  # One listing for a folder instead of one request for each of its files.
  return places.base_name(path) in _listing(str(places.parent(path)))


@functools.lru_cache(maxsize=64)
def _listing(folder: str) -> frozenset[str]:
  return frozenset(places.names(folder)) if places.is_dir(folder) else frozenset()


def read(path: str) -> bytes:
  """The bytes of an image file, or of its sibling.

  Raises:
    FileNotFoundError: there is neither.
    OSError, places.PlaceError: it cannot be read.
  """
  try:
    return places.fetch(path)
  except FileNotFoundError:
    for sibling in siblings(path):
      try:
        return places.fetch(sibling)
      except FileNotFoundError:
        continue
    raise


def open_local(path: str) -> BinaryIO | None:
  """A local image file, or its sibling, open for reading; None for a remote one. Raises OSError as `open` does."""
  if places.is_remote(path):
    return None
  return open(path if os.path.isfile(path) else locate(path) or path, "rb")
