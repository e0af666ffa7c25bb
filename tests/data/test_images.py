import pathlib
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from mllm_jax.config import VisionConfig
from mllm_jax.data import images
from mllm_jax.data.records import DataError

VISION = VisionConfig()
NAMES = ("wide640x360", "tall300x500", "square336")


@pytest.mark.parametrize("name", NAMES)
def test_preprocessing_is_the_released_one(name, goldens):
  golden = np.load(goldens / f"img_{name}.npz")
  image = Image.fromarray(golden["image_uint8"])
  fill = tuple(int(255 * mean) for mean in VISION.mean)
  assert fill == tuple(golden["clip.bg"]) == (122, 116, 104)
  assert images.pad_to_square(image, fill).size == tuple(golden["clip.square_size"])
  pixels = images.preprocess(image, VISION)
  assert pixels.dtype == np.uint8
  np.testing.assert_array_equal(pixels, golden["clip.resized_uint8"])
  normal = images.normalise(pixels, VISION.mean, VISION.std)
  assert normal.dtype == np.float32
  # float32 rounding of values up to 2.7
  np.testing.assert_allclose(normal.transpose(2, 0, 1), golden["clip.pixel_values"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_siglips_preprocessing_is_the_released_one(name, goldens):
  golden = np.load(goldens / f"img_{name}.npz")
  siglip = VisionConfig(image_size=384, patch_size=16, class_token=False, mean=(0.5,) * 3, std=(0.5,) * 3)
  pixels = images.preprocess(Image.fromarray(golden["image_uint8"]), siglip)
  normal = images.normalise(pixels, siglip.mean, siglip.std)
  np.testing.assert_allclose(normal.transpose(2, 0, 1), golden["siglip.pixel_values"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_cutting_to_a_square_is_clips_own_preprocessing(name, goldens):
  golden = np.load(goldens / f"img_{name}.npz")
  pixels = images.crop_to_square(Image.fromarray(golden["image_uint8"]), VISION)
  assert pixels.dtype == np.uint8 and pixels.shape == (336, 336, 3)
  normal = images.normalise(pixels, VISION.mean, VISION.std)
  np.testing.assert_allclose(normal.transpose(2, 0, 1), golden["clip_nopad.pixel_values"], rtol=0, atol=1e-6)


def test_the_middle_is_kept_and_siglip_squeezes():
  small = VisionConfig(image_size=4)
  ramp = np.broadcast_to(np.arange(9, dtype=np.uint8)[:, None, None] * 20, (9, 4, 3))
  # An odd pixel goes below or to the right: of 9 rows 2 to 5 are kept.
  assert images.crop_to_square(Image.fromarray(ramp), small)[:, 0, 0].tolist() == [40, 60, 80, 100]
  wide = Image.fromarray(ramp.swapaxes(0, 1))
  assert images.crop_to_square(wide, small)[0, :, 0].tolist() == [40, 60, 80, 100]
  squeezed = images.crop_to_square(wide, VisionConfig(image_size=4, class_token=False))
  np.testing.assert_array_equal(squeezed, np.asarray(wide.resize((4, 4), Image.Resampling.BICUBIC)))
  with pytest.raises(DataError, match="1 x 2000 is too thin"):
    images.crop_to_square(Image.new("RGB", (1, 2000)), VISION)


def test_odd_padding_goes_below_and_to_the_right():
  white = Image.new("RGB", (2, 5), (255, 255, 255))
  columns = np.asarray(images.pad_to_square(white, (1, 2, 3)))[0]
  assert columns.tolist() == [[1, 2, 3]] + [[255] * 3] * 2 + [[1, 2, 3]] * 2


@pytest.mark.parametrize("height,width", [(1, 1), (3, 3), (1, 3), (3, 1)])
def test_the_smallest_pictures_are_height_by_width_by_channel(height, width):
  colour = (10, 200, 60)
  pixels = images.preprocess(Image.new("RGB", (width, height), colour), VISION)
  assert pixels.shape == (336, 336, 3)
  assert pixels[168, 168].tolist() == list(colour)


def test_strips():
  assert images.preprocess(Image.new("RGB", (2000, 1)), VISION).shape == (336, 336, 3)
  with pytest.raises(DataError, match="100000 x 1 needs a square of 100000 x 100000 pixels; shrink it"):
    images.preprocess(Image.new("RGB", (100000, 1)), VISION)


def save(tmp_path, image, name, **options):
  path = tmp_path / name
  image.save(path, **options)
  return str(path)


def test_16_bit_greyscale_is_rescaled(tmp_path):
  ramp = np.array([[0, 128, 129, 257, 32896, 65535]], np.uint16)
  for name in ("ramp.png", "ramp.tiff"):
    loaded = images.load(save(tmp_path, Image.fromarray(ramp), name))
    assert loaded.mode == "RGB"
    assert np.asarray(loaded)[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255], name


@pytest.mark.parametrize("values", [np.zeros((2, 2), np.int32), np.zeros((2, 2), np.float32)])
def test_modes_without_a_range_are_refused(tmp_path, values):
  path = save(tmp_path, Image.fromarray(values), "x.tiff")
  with pytest.raises(DataError, match=f"^s: image {path}: pixel mode .* save it with 8 or 16 bits"):
    images.load(path, sample_name="s")


@pytest.mark.parametrize(
  "mode,colour,expected",
  [
    ("RGBA", (255, 0, 0, 0), [255, 0, 0]),  # alpha dropped, not composited
    ("LA", (80, 0), [80] * 3),
    ("L", 80, [80] * 3),
    ("1", 1, [255] * 3),
  ],
)
def test_modes(tmp_path, mode, colour, expected):
  path = save(tmp_path, Image.new(mode, (4, 4), colour), "x.png")
  assert np.asarray(images.load(path))[2, 2].tolist() == expected


def test_palette_transparency_is_ignored(tmp_path):
  image = Image.new("P", (4, 4), 1)
  image.putpalette([0, 0, 0, 255, 0, 0])
  path = save(tmp_path, image, "x.png", transparency=1)
  assert np.asarray(images.load(path))[0, 0].tolist() == [255, 0, 0]


def test_cmyk(tmp_path):
  path = save(tmp_path, Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "x.jpg")
  assert np.asarray(images.load(path))[0, 0].tolist() == [255, 255, 255]


def test_first_frame_of_an_animation(tmp_path):
  frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 255, 0))]
  path = save(tmp_path, frames[0], "x.gif", save_all=True, append_images=frames[1:])
  assert np.asarray(images.load(path))[0, 0].tolist() == [255, 0, 0]


def test_exif_orientation_is_ignored(tmp_path):
  exif = Image.Exif()
  exif[274] = 6  # rotate by 90 degrees
  path = save(tmp_path, Image.new("RGB", (8, 4)), "x.jpg", exif=exif)
  assert images.load(path).size == (8, 4)


@pytest.mark.parametrize("extension", ["png", "webp", "gif", "tiff"])
def test_the_first_frame_whatever_the_format(tmp_path, extension):
  frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 255, 0))]
  path = save(tmp_path, frames[0], f"x.{extension}", save_all=True, append_images=frames[1:])
  red, green, _ = np.asarray(images.load(path))[0, 0].tolist()
  assert red > 240 and green < 15  # WebP is lossy


def test_files_are_known_by_their_content_and_not_by_their_name(tmp_path):
  """OCR-VQA's covers are named .jpg, and some of them are GIF or PNG files."""
  for format in ("GIF", "PNG", "WEBP"):
    Image.new("RGB", (6, 5), (255, 0, 0)).save(tmp_path / "x.jpg", format=format)
    assert images.load(str(tmp_path / "x.jpg")).size == (6, 5)


def test_bytes_are_decoded_as_files_are(tmp_path):
  ramp = np.array([[0, 128, 65535]], np.uint16)
  content = pathlib.Path(save(tmp_path, Image.fromarray(ramp), "x.png")).read_bytes()
  loaded, mode = images.load_with_mode(content)
  assert mode == "I;16" and np.asarray(loaded)[0, :, 0].tolist() == [0, 0, 255]
  with pytest.raises(DataError, match="^s: image of 6 bytes inside the record cannot be decoded .*it is no image.*;"):
    images.load(b"<html>", sample_name="s")


def png_chunk(kind: bytes, content: bytes) -> bytes:
  return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@pytest.mark.parametrize(
  "kind,content",
  [
    (b"zTXt", b"Comment\0\0" + zlib.compress(b"x" * 30 * 2**20)),
    (b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(b"x" * 30 * 2**20)),
    (b"iCCP", b"profile\0\0" + zlib.compress(b"x" * 30 * 2**20)),
  ],
)
def test_bombs_in_the_chunks_beside_the_pixels(tmp_path, kind, content):
  """A few KB that unpack to 30 MB: decoded without them, or refused; never anything else."""
  plain = pathlib.Path(save(tmp_path, Image.new("RGB", (4, 4), (7, 0, 0)), "x.png")).read_bytes()
  header = 8 + 25  # the signature and the first chunk, IHDR
  (tmp_path / "bomb.png").write_bytes(plain[:header] + png_chunk(kind, content) + plain[header:])
  tracemalloc.start()
  try:
    assert np.asarray(images.load(str(tmp_path / "bomb.png")))[0, 0].tolist() == [7, 0, 0]
  except DataError as error:
    assert "Decompressed" in str(error) and "fetch the file again" in str(error)
  finally:
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
  assert peak < 10 * 2**20


def test_16_bit_colour_and_grey_with_alpha(tmp_path):
  """Pillow itself reduces these to 8 bits, by the upper byte."""
  for colour_type, channels, expected in ((2, 3, [255, 128, 0]), (4, 2, [255] * 3)):
    row = struct.pack(f">{channels}H", *[65535, 0x80FF, 0][:channels])
    header = struct.pack(">IIBBBBB", 1, 1, 16, colour_type, 0, 0, 0)
    data = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(b"\0" + row)) + png_chunk(b"IEND", b"")
    assert np.asarray(images.load(b"\x89PNG\r\n\x1a\n" + data))[0, 0].tolist() == expected


def test_a_missing_file_is_named(tmp_path):
  with pytest.raises(DataError, match="^train.json, sample 3 .'x'.: image .*none.png is missing; restore the file"):
    images.load(str(tmp_path / "none.png"), sample_name="train.json, sample 3 ('x')")


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"\x89PNG\r\n\x1a\n", b"GIF89a"])
def test_files_that_are_no_images(tmp_path, content):
  (tmp_path / "x.png").write_bytes(content)
  with pytest.raises(DataError, match="cannot be decoded .*; fetch the file again"):
    images.load(str(tmp_path / "x.png"))


@pytest.mark.parametrize("extension", ["png", "jpg", "gif", "bmp", "webp", "tiff"])
def test_truncated_files(tmp_path, extension):
  noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
  path = save(tmp_path, Image.fromarray(noise), f"x.{extension}")
  content = pathlib.Path(path).read_bytes()
  for share in (0.05, 0.3, 0.6):
    with open(path, "wb") as file:
      file.write(content[: int(len(content) * share)])
    with pytest.raises(DataError, match="cannot be decoded"):
      images.load(path)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow remarks on some of them
def test_damaged_files_raise_nothing_else(tmp_path):
  """Bytes are turned at random: whatever Pillow's parsers make of them, only DataError comes out."""
  random = np.random.default_rng(1)
  noise = Image.fromarray(random.integers(0, 256, (12, 12, 3), np.uint8))
  for extension in ("png", "gif", "tiff", "webp"):
    content = np.frombuffer(pathlib.Path(save(tmp_path, noise, f"x.{extension}")).read_bytes(), np.uint8)
    for _ in range(40):
      damaged = content.copy()
      damaged[random.integers(0, min(len(content), 120), 4)] = random.integers(0, 256, 4)
      (tmp_path / f"d.{extension}").write_bytes(damaged.tobytes())
      try:
        assert images.load(str(tmp_path / f"d.{extension}")).mode == "RGB"
      except DataError:
        pass


def test_decompression_bombs_are_refused(tmp_path, monkeypatch):
  path = save(tmp_path, Image.new("RGB", (100, 100)), "x.png")
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
  with pytest.raises(DataError, match="DecompressionBombError"):
    images.load(path)


def test_preprocessing_is_padding_and_then_resizing_of_the_whole_square():
  """Wide pictures are made narrow before they are padded, which must not change a single byte."""
  draw = np.random.default_rng(0)
  shapes = [(480, 640), (375, 500), (427, 640), (640, 480), (333, 334), (1, 50), (2, 999), (50, 1), (336, 336), (7, 9)]
  shapes += [tuple(draw.integers(1, 900, 2)) for _ in range(40)]
  for number, (height, width) in enumerate(shapes):
    values = draw.integers(0, 256, (height, width, 3), np.uint8)
    picture = Image.fromarray(np.where(values > 127, 255, 0).astype(np.uint8) if number % 2 else values)
    for size in (28, 336):
      vision = VisionConfig(image_size=size, mean=tuple(draw.random(3)))
      fill = tuple(int(255 * mean) for mean in vision.mean)
      square = np.empty((max(width, height),) * 2 + (3,), np.uint8)
      square[:] = fill
      top, left = (len(square) - height) // 2, (len(square) - width) // 2
      square[top : top + height, left : left + width] = np.asarray(picture)
      expected = Image.fromarray(square).resize((size, size), Image.Resampling.BICUBIC)
      np.testing.assert_array_equal(images.preprocess(picture, vision), np.asarray(expected), f"{width} x {height}")


def test_a_size_is_read_from_the_header(tmp_path):
  picture = Image.fromarray(np.zeros((30, 40, 3), np.uint8))
  picture.save(tmp_path / "a.jpg")
  data = (tmp_path / "a.jpg").read_bytes()
  assert images.size(str(tmp_path / "a.jpg")) == images.size(data) == images.size(str(tmp_path / "a.png")) == (40, 30)
  for source, message in ((str(tmp_path / "b.jpg"), "is missing"), (b"<html>", "cannot be decoded")):
    with pytest.raises(DataError, match=f"sample 3: image .*{message}"):
      images.size(source, sample_name="sample 3")
