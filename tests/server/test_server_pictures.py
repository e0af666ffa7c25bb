"""Where pictures may come from, and that none is decoded before it is known how large it is."""

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image
from serving import data_uri, picture

from mllm_jax.server.chat_request import Picture
from mllm_jax.server.errors import ApiError
from mllm_jax.server.pictures import Source, decode, sizes


def refused(source, url):
  with pytest.raises(ApiError) as caught:
    source.read(Picture(url, "messages[0]"))
  assert (caught.value.status, caught.value.param) == (400, "messages[0]")
  return caught.value.message


def png_bomb(width, height):
  """A PNG that says it has so many pixels, in a few bytes."""
  chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
  head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
  return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "gif", "bmp"])
def test_data_uris_of_every_format(kind):
  content = picture(kind=kind)
  asked = Picture(data_uri(content, kind), "x")
  assert Source(10**6).read(asked) == content
  assert sizes([asked], [content], 10**6) == [(80, 60)]
  np.testing.assert_array_equal(
    np.asarray(decode(asked, content)), np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
  )


@pytest.mark.parametrize(
  "url",
  [
    *["", "data:", "data:image/png,xyz", "data:text/html;base64,AAAA", "data:image/png;base64,A", "nonsense"],
    *["data:image/png;base64,AA AA", "data:image/png;base64,AAAA\n", "data:image/png;base64,ÄÖ", "ftp://a/b.png"],
    *["javascript:x", "\ud83d", "data:image/png;charset=x;base64,AAAA", "data:image/png;base64,=AAA", "/etc/passwd"],
  ],
)
def test_urls_that_are_none(url):
  refused(Source(10**6), url)


def test_remote_and_local_pictures_are_off_and_the_error_says_how_to_allow_them():
  assert "--allow_url=HOST" in refused(Source(10**6), "https://example.org/a.png")
  assert "--allow_files=DIR" in refused(Source(10**6), "file:///etc/passwd")


def test_files_only_below_the_allowed_folder(tmp_path):
  allowed, outside = tmp_path / "allowed", tmp_path / "outside"
  for folder in (allowed / "deep", outside, tmp_path / "allowed2"):
    folder.mkdir(parents=True)
    (folder / "a b.png").write_bytes(b"content")
  (allowed / "link.png").symlink_to(outside / "a b.png")
  (allowed / "inside.png").symlink_to(allowed / "deep" / "a b.png")
  (allowed / "linked").symlink_to(outside)
  source = Source(10, folders=(allowed.resolve(),))
  for good in (f"{allowed}/deep/a%20b.png", f"{allowed}/deep/../deep/a%20b.png", f"{allowed}/inside.png"):
    assert source.read(Picture(f"file://{good}", "x")) == b"content"
  assert source.read(Picture(f"file://localhost{allowed}/deep/a%20b.png", "x")) == b"content"
  messages = {
    refused(source, f"file://{bad}")
    for bad in (
      *(f"{outside}/a%20b.png", f"{allowed}/../outside/a%20b.png", f"{allowed}/%2e%2e/outside/a%20b.png"),
      *(f"{allowed}/link.png", f"{allowed}/linked/a%20b.png", f"{tmp_path}/allowed2/a%20b.png", "/etc/passwd"),
      *(f"{allowed}/missing.png", f"{allowed}", f"{allowed}/deep", f"{allowed}/a%00b", f"{allowed}/%ff", "/dev/zero"),
      *(f"host{allowed}/deep/a%20b.png", "[", ""),
    )
  }
  assert len(messages) == 1  # nobody learns what there is outside
  (allowed / "large.png").write_bytes(bytes(11))
  assert "more than 10 bytes" in refused(source, f"file://{allowed}/large.png")


def test_a_pipe_below_the_folder_does_not_block(tmp_path):
  import os

  os.mkfifo(tmp_path / "pipe")
  refused(Source(10, folders=(tmp_path.resolve(),)), f"file://{tmp_path}/pipe")


def test_pixels_are_counted_from_headers():
  bomb = png_bomb(40_000, 40_000)
  asked = Picture("data:", "x")
  tracemalloc.start()
  for pictures, limit in (([bomb], 10**6), ([picture(), picture()], 9599), ([png_bomb(2000, 1)], 10**6)):
    with pytest.raises(ApiError, match="shrink it"):
      sizes([asked] * len(pictures), pictures, limit)
  assert tracemalloc.get_traced_memory()[1] < 10**6
  tracemalloc.stop()
  assert sizes([asked] * 2, [picture(), picture()], 9600) == [(80, 60)] * 2


@pytest.mark.parametrize(
  "content", [b"", b"x", bytes(100), b"GIF89a", picture()[:60], b"<svg/>", b"%!PS-Adobe-3.0 EPSF-3.0"]
)
def test_bytes_that_are_no_picture(content):
  with pytest.raises(ApiError):
    asked = Picture("data:", "x")
    sizes([asked], [content], 10**6)
    decode(asked, content)


def test_a_damaged_picture_is_found_when_it_is_decoded():
  with pytest.raises(ApiError, match="damaged"):
    decode(Picture("data:", "x"), picture()[:-3000])
