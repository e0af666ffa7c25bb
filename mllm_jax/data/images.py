"""Images: from a file to the uint8 square that the vision tower's preprocessing is defined on.

Decoding and resizing are Pillow's, because the released preprocessing is defined by Pillow's bicubic filter on uint8.
Every array is height x width x channel, whatever its size: the released processor reads a 3x3 picture as channels
first and refuses a 1x1 one.
"""

import io
import struct
import zlib
from collections.abc import Sequence

import numpy as np
from PIL import Image, UnidentifiedImageError

from mllm_jax.config import VisionConfig
from mllm_jax.data import image_files
from mllm_jax.data.records import DataError, ImageSize
from mllm_jax.places import PlaceError

# What Pillow raises on damaged files: its plugins let the exceptions of the parsers below them through.
DAMAGED = (
  OSError,
  ValueError,
  SyntaxError,
  EOFError,
  KeyError,
  IndexError,
  TypeError,
  OverflowError,
  struct.error,
  zlib.error,
  Image.DecompressionBombError,
)

# Pillow gives an image's memory back to the system and asks for it again for the next one, whose every page then has to
# be mapped and cleared: a quarter of the time that a picture takes. This many blocks, of 16 MiB at most, it keeps.
Image.core.set_blocks_max(4)


def load(source: str | bytes, *, sample_name: str = "") -> Image.Image:
  """Decodes a file, given by its path (local or remote) or as its bytes, to 8-bit RGB.

  As in the released path: the first frame of an animation, alpha dropped and not composited, EXIF orientation ignored
  (boxes in the conversations refer to the stored pixels). Unlike it, 16-bit greyscale is rescaled to 8 bits; Pillow's
  own conversion clips it at 255, which turns most such pictures white. A missing file is looked for under the other
  extensions of `image_files.EXTENSIONS`.

  Raises:
    DataError: the file is missing, not an image, truncated, damaged, or beyond Pillow's limit for decompression bombs.
  """
  return load_with_mode(source, sample_name=sample_name)[0]


def load_with_mode(source: str | bytes, *, sample_name: str = "") -> tuple[Image.Image, str]:
  """`load`, and the mode of the stored pixels in Pillow's words, such as "RGBA" or "I;16"."""
  what = source if isinstance(source, str) else f"of {len(source)} bytes inside the record"
  prefix = f"{sample_name}: image {what}" if sample_name else f"image {what}"
  return decode(read(source, prefix), prefix)


def read(source: str | bytes, name: str) -> bytes:
  """The encoded bytes of an image, which errors call `name`. Raises DataError where its file cannot be read."""
  try:
    return image_files.read(source) if isinstance(source, str) else source
  except FileNotFoundError:
    raise DataError(f"{name} is missing; restore the file, set data.image_folder, or take the sample out") from None
  except PlaceError as error:
    raise DataError(f"{name}: {error}") from error
  except (OSError, ValueError) as error:  # ValueError: a path that no file can have
    raise DataError(f"{name} cannot be read ({error}); restore the file or take the sample out") from error


def size(source: str | bytes | ImageSize, *, sample_name: str = "") -> tuple[int, int]:
  """(width, height) of what `load` gives, from the file's header alone. Raises DataError as `load` does."""
  if isinstance(source, ImageSize):
    return tuple(source)
  what = source if isinstance(source, str) else f"of {len(source)} bytes inside the record"
  name = f"{sample_name}: image {what}" if sample_name else f"image {what}"
  try:
    file = image_files.open_local(source) if isinstance(source, str) else None
  except OSError:
    file = None  # `read` says what is wrong
  with file or io.BytesIO(read(source, name)) as opened:
    try:
      with Image.open(opened) as image:
        return image.size
    except DAMAGED as error:
      raise _damaged(name, error) from error


def decode(data: bytes, name: str) -> tuple[Image.Image, str]:
  """What `load_with_mode` gives, of bytes; errors call the image `name`. Raises DataError as `load` does."""
  try:
    with Image.open(io.BytesIO(data)) as image:
      mode = image.mode
      image.seek(0)
      return to_rgb(image), mode  # Pillow reads lazily: a truncated file shows itself only here
  except DataError as error:
    raise DataError(f"{name}: {error}") from error
  except DAMAGED as error:
    raise _damaged(name, error) from error


def _damaged(name: str, error: Exception) -> DataError:
  # Pillow names the buffer by its address, which would make the same fault another text each time.
  reason = "it is no image" if isinstance(error, UnidentifiedImageError) else error
  return DataError(
    f"{name} cannot be decoded ({type(error).__name__}: {reason}); fetch the file again or take the sample out"
  )


def to_rgb(image: Image.Image) -> Image.Image:
  """8-bit RGB by `load`'s rules. Raises DataError for modes without a known range (32-bit integers and floats)."""
  # Older releases of Pillow open 16-bit greyscale PNGs in mode I.
  if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
    values = np.asarray(image).astype(np.uint32)
    return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")  # 65535 -> 255, rounded
  if image.mode in ("I", "F"):
    raise DataError(f"pixel mode {image.mode!r} has no known range; save it with 8 or 16 bits")
  if image.mode == "RGB":
    image.load()  # Pillow's conversion would copy it
    return image
  return image.convert("RGB")


def check_square(image: Image.Image) -> None:
  """Raises DataError where the square around an image is beyond Pillow's limit for decompression bombs: a strip may be
  small, its square not."""
  width, height = image.size
  side = max(width, height)
  if Image.MAX_IMAGE_PIXELS is not None and side * side > 2 * Image.MAX_IMAGE_PIXELS:
    raise DataError(f"an image of {width} x {height} needs a square of {side} x {side} pixels; shrink it first")


def pad_to_square(image: Image.Image, fill: tuple[int, int, int]) -> Image.Image:
  """Centres an RGB image on a square as long as its longer side; an odd pixel goes below or to the right.

  Raises DataError as `check_square` does.
  """
  check_square(image)
  width, height = image.size
  side = max(width, height)
  if width == height:
    return image
  square = Image.new("RGB", (side, side), fill)
  square.paste(image, ((side - width) // 2, (side - height) // 2))
  return square


def preprocess(image: Image.Image, vision: VisionConfig) -> np.ndarray:
  """An RGB image padded to a square with the mean colour and resized bicubically: uint8 [image_size, image_size, 3]."""
  fill = tuple(int(255 * mean) for mean in vision.mean)
  size = vision.image_size
  if image.width > image.height:
    # Pillow resizes rows first and rounds to bytes in between. A row of one colour stays what it is, so that rows of
    # padding can be put in when the picture is narrow already: the same pixels for less work.
    check_square(image)
    narrow = image.resize((size, image.height), Image.Resampling.BICUBIC)
    padded = Image.new("RGB", (size, image.width), fill)
    padded.paste(narrow, (0, (image.width - image.height) // 2))
  else:
    padded = pad_to_square(image, fill)
  return np.asarray(padded.resize((size, size), Image.Resampling.BICUBIC), np.uint8)


def crop_to_square(image: Image.Image, vision: VisionConfig) -> np.ndarray:
  """An RGB image as the tower's own preprocessing makes it a square: uint8 [image_size, image_size, 3].

  CLIP's resizes the shorter side bicubically and keeps the middle of the longer one; SigLIP's squeezes the whole image.
  Raises DataError for an image so thin that its resized longer side is beyond Pillow's limit for decompression bombs.
  """
  size = vision.image_size
  if not vision.class_token:
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC), np.uint8)
  short, long = sorted(image.size)
  length = int(size * long / short)
  if Image.MAX_IMAGE_PIXELS is not None and size * length > 2 * Image.MAX_IMAGE_PIXELS:
    raise DataError(
      f"an image of {image.width} x {image.height} is too thin to be cut to a square; use pad, or crop it"
    )
  width, height = (size, length) if image.width <= image.height else (length, size)
  resized = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC), np.uint8)
  top, left = (height - size) // 2, (width - size) // 2
  return resized[top : top + size, left : left + size]


def normalise(pixels: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
  """uint8 [..., 3] -> float32 [..., 3]: (pixels / 255 - mean) / std, what the vision tower eats."""
  scaled = pixels.astype(np.float32) / np.float32(255)
  return (scaled - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
