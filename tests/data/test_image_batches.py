"""Batches of images alone: which images, which pixels of them, and what becomes of bad ones."""

import json

import numpy as np
import pytest
from PIL import Image

from mllm_jax.config import ConfigError, DataConfig
from mllm_jax.data.bad_samples import BadSamples
from mllm_jax.data.image_batches import ImageBatches, centre_square, open_images
from mllm_jax.data.patches import unpatchify
from mllm_jax.data.records import DataError
from mllm_jax.data.sources import open_source


def write_images(folder, count, broken=()):
  """`count` pictures of one colour each, in two folders, and things that are no pictures."""
  (folder / "b").mkdir(parents=True)
  (folder / ".hidden").mkdir()
  for i in range(count):
    path = folder / ("b" if i % 2 else "") / f"{i:02d}.{'PNG' if i % 3 else 'png'}"
    Image.new("RGB", (40 + i, 30), (i, 2 * i, 3 * i)).save(path, "PNG")
    if i in broken:
      path.write_bytes(b"no picture")
  (folder / "notes.txt").write_text("nothing")
  Image.new("RGB", (9, 9)).save(folder / ".hidden" / "x.png")
  return str(folder)


def make(folder, **changes):
  settings = dict(image_size=28, patch_size=14, batch_size=4, steps=5, threads=2)
  return ImageBatches(open_images(DataConfig(path=folder), 0), **settings | changes)


def test_a_folder_gives_its_images_in_the_order_of_their_paths(tmp_path):
  records = open_source(write_images(tmp_path / "x", 5), "")
  assert [sample.id for sample in records] == ["00.png", "02.PNG", "04.PNG", "b/01.PNG", "b/03.png"]
  assert records[-1].images == (str(tmp_path / "x" / "b" / "03.png"),) and records[-1].turns == ()
  (tmp_path / "empty").mkdir()
  with pytest.raises(DataError, match="a folder without .arrayrecord files"):
    open_source(str(tmp_path / "empty"), "")


def test_a_batch_holds_the_pixels_of_the_images_it_names(tmp_path):
  batches = make(write_images(tmp_path / "x", 10), accumulation=2)
  seen = []
  for names, batch in batches.iterate():
    assert batch.patches.shape == (2, 2, 4, 588) and batch.patches.dtype == np.uint8 and (batch.weights == 1).all()
    for name, patches in zip(names, batch.patches.reshape(4, 4, 588), strict=True):
      number = int(name.split("/")[-1][:2])
      pixels = unpatchify(patches, (2, 2), 14)
      assert (pixels == np.array([number, 2 * number, 3 * number])).all()
    seen += names
  assert len(seen) == 20 and set(seen[:10]) == set(seen[10:]) and seen[:10] != seen[10:]


def test_any_start_and_any_number_of_processes_see_the_same(tmp_path):
  folder = write_images(tmp_path / "x", 11)
  whole = [names for names, _ in make(folder, accumulation=2, batch_size=8).iterate()]
  assert [names for names, _ in make(folder, accumulation=2, batch_size=8, threads=0).iterate(3)] == whole[3:]
  shares = [
    [names for names, _ in make(folder, accumulation=2, batch_size=8, process_index=i, process_count=2).iterate()]
    for i in range(2)
  ]
  for names, first, second in zip(whole, *shares, strict=True):
    assert names == first[:2] + second[:2] + first[2:] + second[2:]
  assert [names for names, _ in make(folder, batch_size=8, seed=1).iterate()] != whole


@pytest.mark.parametrize("size", [(70, 50), (50, 73), (28, 28), (29, 400), (13, 9)])
def test_the_square_is_torchvisions(size):
  """Resize to the short side with the nearest pixel, then the middle: written out place by place."""
  width, height = size
  pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)
  found = centre_square(Image.fromarray(pixels), 28)
  short = min(size)
  new_width, new_height = int(28 * width / short), int(28 * height / short)
  left, top = round((new_width - 28) / 2.0), round((new_height - 28) / 2.0)

  def places(new, old, start):
    # Pillow adds up the step in float64, and so decides what lies exactly between two pixels.
    scale = old / new
    return np.floor(np.cumsum([0.5 * scale] + [scale] * (new - 1))).astype(int)[start : start + 28]

  expected = pixels[places(new_height, height, top)][:, places(new_width, width, left)]
  np.testing.assert_array_equal(found, expected)


def test_strips_are_refused():
  with pytest.raises(DataError, match="4000 x 3 is too long"):
    centre_square(Image.new("RGB", (4000, 3)), 28)


def test_a_bad_image_ends_the_run_and_is_named(tmp_path):
  with pytest.raises(DataError, match="x, sample .*b/03.png.*it is no image"):
    list(make(write_images(tmp_path / "x", 6, broken=(3,))).iterate())


def test_a_bad_image_is_skipped_or_replaced(tmp_path):
  folder = write_images(tmp_path / "x", 6, broken=(3,))
  note = BadSamples(0.5, tmp_path / "notes", minimum=4)
  skipped = list(make(folder, on_bad_sample="skip", bad_samples=note).iterate())
  for names, batch in skipped:
    bad = np.array([name == "b/03.png" for name in names])
    np.testing.assert_array_equal(batch.weights[0], ~bad)
    assert not batch.patches[0][bad].any()
  assert sum("b/03.png" in names for names, _ in skipped) >= 3
  lines = (tmp_path / "notes" / "bad_samples.jsonl").read_text().splitlines()
  assert all("03.png" in json.loads(line)["problem"] for line in lines) and lines
  for names, batch in make(folder, on_bad_sample="replace").iterate():
    assert "b/03.png" not in names and (batch.weights == 1).all()
  with pytest.raises(DataError, match="samples cannot be used"):
    list(make(folder, on_bad_sample="skip", bad_samples=BadSamples(0.01, minimum=4)).iterate())


def test_each_image_of_a_llava_file_comes_once(tmp_path):
  write_images(tmp_path / "x", 4)
  turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]
  samples = [
    {"id": "a", "image": "00.png", "conversations": turns},
    {"id": "b", "conversations": turns},
    {"id": "c", "image": ["02.PNG", "00.png"], "conversations": turns},
    {"id": "d", "image": "b/01.PNG", "conversations": turns},
  ]
  (tmp_path / "data.json").write_text(json.dumps(samples))
  data = DataConfig(path=str(tmp_path / "data.json"), image_folder=str(tmp_path / "x"))
  records = open_images(data, 0)
  assert [(each.id, each.images[0][len(data.image_folder) + 1 :]) for each in records] == [
    ("a", "00.png"),
    ("c", "02.PNG"),
    ("d", "b/01.PNG"),
  ]
  (tmp_path / "data.json").write_text(json.dumps(samples[1:2]))
  with pytest.raises(DataError, match="no sample has an image"):
    open_images(data, 0)


def test_what_cannot_be_shared_evenly(tmp_path):
  folder = write_images(tmp_path / "x", 3)
  with pytest.raises(ConfigError, match="batch_size=4 cannot be shared by 3 micro-batches x 1 processes"):
    make(folder, accumulation=3)
  with pytest.raises(ConfigError, match="steps=0"):
    make(folder, steps=0)
  assert make(folder).samples == 3  # fewer than a batch: the next pass fills it
