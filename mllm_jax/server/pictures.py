"""Pictures of requests: data URIs, and what the operator allowed besides. Looked at before they are decoded."""

import base64
import binascii
import dataclasses
import io
import math
import os
import re
import stat
import urllib.parse
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from mllm_jax.data import images
from mllm_jax.data.records import DataError
from mllm_jax.server.chat_request import Picture
from mllm_jax.server.errors import ApiError
from mllm_jax.server.fetch import FetchError, Origin, fetch

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # other decoders of Pillow are seldom used and less looked after
DATA = re.compile(r"data:image/[a-z0-9.+-]+;base64,", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Source:
  """Where pictures may come from, besides data URIs. max_bytes: of an encoded one. origins, folders: those allowed."""

  max_bytes: int
  origins: tuple[Origin, ...] = ()
  folders: tuple[Path, ...] = ()

  def is_remote(self, picture: Picture) -> bool:
    """Whether reading it means waiting for another machine."""
    return bool(re.match("https?:", picture.url, re.IGNORECASE))

  def read(self, picture: Picture) -> bytes:
    """The encoded picture. Raises ApiError that names the field."""
    scheme = picture.url.partition(":")[0].lower()
    if scheme == "data":
      return _data(picture)
    if scheme in ("http", "https"):
      return self._remote(picture)
    if scheme == "file":
      return self._file(picture)
    raise _refused(picture, "it must be a data URI: data:image/png;base64,...")

  def _remote(self, picture: Picture) -> bytes:
    if not self.origins:
      raise _refused(
        picture,
        "remote pictures are off; send a data URI, or start the server with --allow_url=HOST",
      )
    try:
      return fetch(picture.url, self.origins, self.max_bytes)
    except FetchError as error:
      raise _refused(picture, str(error)) from error

  def _file(self, picture: Picture) -> bytes:
    if not self.folders:
      raise _refused(picture, "local files are off; send a data URI, or start the server with --allow_files=DIR")
    # One answer to all that fails, so that nobody learns which files there are outside the folders.
    missing = _refused(picture, "there is no such file below a folder that --allow_files names")
    try:
      parts = urllib.parse.urlsplit(picture.url)
      path = os.path.realpath(urllib.parse.unquote(parts.path, errors="strict"))
      if parts.netloc not in ("", "localhost") or not any(Path(path).is_relative_to(each) for each in self.folders):
        raise missing
      # Nothing is followed any more: what was looked at is what is opened. A pipe would block without O_NONBLOCK.
      descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
      raise missing from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
      os.close(descriptor)
      raise missing
    with open(descriptor, "rb") as file:
      content = file.read(self.max_bytes + 1)
    if len(content) > self.max_bytes:
      raise _refused(picture, f"the file has more than {self.max_bytes} bytes")
    return content


def sizes(pictures: Sequence[Picture], contents: Sequence[bytes], max_pixels: int) -> list[tuple[int, int]]:
  """(width, height) of encoded pictures, from their headers alone.

  Raises ApiError where one is none, all of them have more than max_pixels together, or one is so long and thin that
  the square around it has more than twice as many.
  """
  found = []
  for picture, content in zip(pictures, contents, strict=True):
    try:
      with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        found.append(image.size)
    except Image.DecompressionBombError as error:
      raise _refused(picture, f"at most {max_pixels} pixels are read; shrink it") from error
    except images.DAMAGED as error:
      raise _refused(picture, f"it cannot be read as a picture ({', '.join(FORMATS)})") from error
    width, height = found[-1]
    total = sum(math.prod(size) for size in found)
    if total > max_pixels:
      raise _refused(picture, f"with it there are {total} pixels, and at most {max_pixels} are read; shrink it")
    if max(width, height) ** 2 > 2 * max_pixels:
      raise _refused(picture, f"it is {width} x {height}, too long a side for at most {max_pixels} pixels; shrink it")
  return found


def decode(picture: Picture, content: bytes) -> Image.Image:
  """An RGB image by the rules of `data.images.load`. Raises ApiError where it is damaged."""
  try:
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
      image.seek(0)
      return images.to_rgb(image)
  except (DataError, *images.DAMAGED) as error:
    raise _refused(picture, "it is damaged, or of a kind that cannot be shown; save it again as PNG or JPEG") from error


def _data(picture: Picture) -> bytes:
  head = DATA.match(picture.url)
  if not head:
    raise _refused(picture, "its data URI must begin like data:image/png;base64,")
  try:
    return base64.b64decode(picture.url[head.end() :], validate=True)
  except (binascii.Error, ValueError) as error:
    raise _refused(picture, "its data URI is no valid base64") from error


def _refused(picture: Picture, reason: str) -> ApiError:
  return ApiError(400, f"{picture.param}: {reason}", param=picture.param, code="invalid_image_url")
