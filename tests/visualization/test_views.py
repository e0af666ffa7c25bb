"""What is drawn of a model: the values behind the pictures."""

import types

import numpy as np
import pytest
import tiny
import tiny_folders
from PIL import Image

import mllm_jax
from mllm_jax.config import ConfigError
from mllm_jax.data.aspects import Anyres, Slices, Square
from mllm_jax.models.projectors import pyramid
from mllm_jax.visualization import crops, pictures, spatial, uhd

SIDE = tiny.VISION.image_size


@pytest.fixture(scope="module")
def model_of(tmp_path_factory):
  """Models by kind, each read once."""
  loaded = {}

  def load(kind):
    if kind not in loaded:
      loaded[kind] = mllm_jax.load(str(tiny_folders.write(tmp_path_factory.mktemp("model") / kind, kind)))
    return loaded[kind]

  return load


@pytest.fixture(scope="module")
def image(tmp_path_factory):
  return Image.open(tiny_folders.picture(tmp_path_factory.mktemp("picture") / "a.png")).convert("RGB")


def test_slices_are_put_together_and_lines_drawn_on_their_borders(image):
  aspect = Slices(tiny.VISION, 4, 6, "spatial", (1, 2))
  pieces = aspect.crops(image)
  whole, columns, rows = crops.mosaic(pieces, aspect, image.size)
  assert (columns, rows) == (3, 1)
  np.testing.assert_array_equal(whole, image)  # 168 x 56 pixels are three slices as they are
  section = crops.slicing(pieces, aspect, image.size)
  slices, overview = section.rows[0]
  assert slices.name == "slices" and slices.caption.startswith("3 x 1 of 56 x 56 pixels, 4 x 4 patches")
  height, width = slices.pixels.shape[:2]
  plain = pictures.fitted(whole, width)
  for border in (width / 3, 2 * width / 3):
    assert (slices.pixels[:, round(border) - 1 : round(border) + 1] == 255).all()
  away = np.abs(np.arange(width)[:, None] - [0, width / 3, 2 * width / 3, width]).min(1) > 40  # no badges there either
  np.testing.assert_array_equal(slices.pixels[:, away], plain[:, away])
  assert overview.title == "The whole image, crop 3"
  hue = pictures.hues(4)[3]
  assert (overview.pixels[0] == hue).all() and (overview.pixels[:, -1] == hue).all()


def test_tiles_and_unsliced_images_are_put_together_too(image):
  aspect = Anyres(tiny.VISION, 16)
  whole, columns, rows = crops.mosaic(aspect.crops(image), aspect, image.size)
  assert (columns, rows) == (3, 1)
  np.testing.assert_array_equal(whole, image)
  square = Square(tiny.VISION, 16)
  pieces = square.crops(image)
  alone, columns, rows = crops.mosaic(pieces, square, image.size)
  np.testing.assert_array_equal(alone, pieces[0])
  assert (columns, rows) == (1, 1) and len(crops.slicing(pieces, square, image.size).rows[0]) == 1


@pytest.mark.parametrize(
  "aspect,before,lengths",
  [
    (Square(tiny.VISION, 16), 0, [4] * 4),
    (Square(tiny.VISION, 18), 2, [2] + [4] * 4),
    # Spatial tokens of the whole image and of three tiles, the whole image, the tiles' rows with a newline each.
    (Anyres(tiny.VISION, 18), 2, [2, 6] + [4] * 4 + [13] * 4),
    (Slices(tiny.VISION, 9, 6, "spatial", (1, 2)), 0, [10] * 3 + [1] + [3] * 3),
    (Slices(tiny.VISION, 9, 6, "slices", (1, 2)), 0, [10] * 3 + [3] * 3),
    (Slices(tiny.VISION, 5, 6, "slices", (1, 2)), 0, [6] * 3 + [5]),  # five tokens are no square
    (Slices(tiny.VISION, 9, 1, "spatial", (1, 2)), 0, [3] * 3),
  ],
)
def test_the_map_of_the_sequence_holds_every_place_in_order(aspect, before, lengths):
  places, count = aspect.places(168, 56), aspect.crops_of(168, 56)
  lines = crops.reading_order(places, aspect.tokens_per_crop, before, aspect.whole % count)
  # A row of slices of 3 x 3 tokens is as wide as three of them in the spatial organisation.
  assert [len(line) for line in lines] == lengths
  np.testing.assert_array_equal(np.concatenate(lines), np.arange(len(places.rows)))
  section = crops.layout(places, aspect, count, before)
  drawn, hues = section.rows[0][0].pixels, pictures.hues(count)
  cell = drawn.shape[0] // len(lines)
  for row, line in enumerate(lines):
    for column in range(drawn.shape[1] // cell):
      corner = drawn[row * cell, column * cell].tolist()
      visual = column < len(line) and places.rows[line[column]] >= 0
      expected = [*hues[places.rows[line[column]] // aspect.tokens_per_crop], 255] if visual else [0] * 4
      assert corner == expected
  assert f"{len(places.rows)} places" in section.rows[0][0].caption


def test_a_crop_goes_through_the_tower_as_in_the_model(model_of, image):
  model, processor = model_of("hiwin")
  batch = processor(["Look."], [[image]])
  normalised = model.vision.normalise(batch.patches)
  features = np.asarray(model.vision(normalised, batch.grids))[0]
  pieces = processor.aspect.crops(image)
  for number in (0, 3):
    crop = crops.encode(model, pieces, number)
    used = int(np.prod(crop.grid))
    assert crop.grid == tuple(np.asarray(batch.grids)[0, number])
    # Two programs add in other orders.
    np.testing.assert_allclose(crop.map.reshape(used, -1), features[number, :used], rtol=0, atol=1e-5)
  with pytest.raises(ConfigError, match="--crop=4: the image becomes 4 crops, 0 to 3"):
    crops.encode(model, pieces, 4)


def test_levels_share_their_colours(model_of, image):
  model, processor = model_of("hiwin")
  crop = crops.encode(model, processor.aspect.crops(image), 3)
  section, _ = uhd.sections(model, crop)
  figures = {figure.name: figure for row in section.rows for figure in row}
  assert set(figures) == {"crop", "features-0", "pyramid-2", "bilinear-2"}
  assert len({figure.pixels.shape for figure in figures.values()}) == 1
  shared, (rows, columns) = pictures.components(crop.map), crop.grid
  levels = uhd.level_maps(model.projector.pyramid, crop)
  np.testing.assert_allclose(levels[0], crop.map, rtol=0, atol=1e-6)
  bilinear = uhd.level_maps(pyramid.Bilinear((2,)), crop)
  for name, level, features in (
    ("features-0", 0, crop.map),
    ("pyramid-2", 2, levels[2]),
    ("bilinear-2", 2, bilinear[2]),
  ):
    cells, pixels = (rows * 2**level, columns * 2**level), figures[name].pixels
    assert features.shape[:2] == cells
    step = pixels.shape[0] // cells[0]
    np.testing.assert_array_equal(pixels, pictures.nearest(pictures.pca_picture(features, shared), step))
  assert figures["pyramid-2"].caption == f"{4 * columns} x {4 * rows} cells."


def test_windows_tile_the_map_unless_it_has_too_few_cells():
  assert uhd.window((4, 12), 2, 0, 1, 0) == (0, 2, 6, 4)
  assert uhd.window((4, 12), 2, 2, 1, 1) == (6, 2, 12, 4)
  # 12 windows on 3 cells: each is one cell long, and the last one reaches past the map.
  left, top, right, bottom = uhd.window((3, 24), 12, 0, 11, 5)
  assert (left, right) == (10, 12) and (top, bottom) == (2.75, 3.75)
  assert uhd.window((3, 24), 12, 2, 11, 5)[1::2] == (2.75, 3.0)


def test_the_busiest_window_is_the_one_with_contrast():
  pixels = np.zeros((56, 168, 3), np.uint8)
  pixels[29:31, 100:105] = 255
  crop = types.SimpleNamespace(pixels=pixels)
  assert uhd.busiest(crop, 2) == (1, 1)
  assert uhd.busiest(crop, 12) == (30 * 12 // 56, 100 * 12 // 168)
  assert uhd.busiest(types.SimpleNamespace(pixels=pixels[:3, :2]), 12) == (0, 0)


def test_the_attention_of_spatial_tokens_to_details(model_of, image):
  model, processor = model_of("cropping")
  crop = crops.encode(model, processor.aspect.crops(image), 0)
  found = spatial.attention(model, crop)
  assert found.shape == (2, 2, 2)
  np.testing.assert_allclose(found.sum((1, 2)), 1, rtol=0, atol=1e-6)

  # The paper's equation 4 in float64.
  dfi, number = model.projector.dfi, lambda x: np.asarray(x[...], np.float64)
  features = crop.map.astype(np.float64)
  tokens = np.asarray(model.projector.sfe(crop.map[None]))[0].astype(np.float64)
  kernel = number(dfi.kernel)
  windows = [features[i : i + 2, j : j + 2] for i in (0, 2) for j in (0, 2)]
  details = np.stack([np.einsum("hwc,hwce->e", window, kernel) for window in windows])

  def norm(x, layer):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt(centred.var(-1, keepdims=True) + 1e-5) * number(layer.scale) + number(layer.bias)

  queries = norm(tokens, dfi.query_norm) @ number(dfi.query.kernel) + number(dfi.query.bias)
  keys = norm(details, dfi.key_norm) @ number(dfi.key.kernel) + number(dfi.key.bias)
  scores = np.exp(queries @ keys.T / np.sqrt(8))
  np.testing.assert_allclose(found.reshape(2, 4), scores / scores.sum(1, keepdims=True), rtol=0, atol=1e-6)

  shown = spatial.warmth(found[0], 20, 20)
  assert shown.min() == pytest.approx(0, abs=1e-6) and shown.max() == pytest.approx(1, abs=1e-6)
  corner = np.unravel_index(found[0].argmax(), (2, 2))
  assert shown[corner[0] * 19, corner[1] * 19] == pytest.approx(1, abs=1e-6)
  assert not spatial.warmth(np.full((3, 3), 1 / 9, np.float32), 12, 12).any()


def test_squares_and_pools_of_spatial_tokens(model_of, image):
  model, processor = model_of("pooling")
  crop = crops.encode(model, processor.aspect.crops(image), 0)
  step = -(-spatial.TILE // 4)
  shown = crop.enlarged(step).astype(np.float64)
  whole, third, all_cells = spatial._pools(crop, (1, 3, 4))
  np.testing.assert_allclose(whole[5, 5], shown.mean((0, 1)), atol=0.51)  # rounding
  # The middle one of three bins of four patches is the mean of the second and third.
  middle = shown[step : 3 * step, step : 3 * step].mean((0, 1))
  np.testing.assert_allclose(third[2 * step, 2 * step], middle, atol=0.51)
  np.testing.assert_allclose(all_cells[step // 2, step // 2], shown[:step, :step].mean((0, 1)), atol=0.51)
  inner, outer = spatial._squares(crop, (2, 4))
  np.testing.assert_array_equal(outer, shown)
  np.testing.assert_array_equal(
    inner, pictures.resized(shown.astype(np.uint8)[step : 3 * step, step : 3 * step], 4 * step, 4 * step)
  )
