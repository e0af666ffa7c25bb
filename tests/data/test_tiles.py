import numpy as np
import pytest
from PIL import Image

from mllm_jax.batch import NEWLINE
from mllm_jax.config import VisionConfig
from mllm_jax.data import tiles
from mllm_jax.data.aspects import Anyres
from mllm_jax.data.chat import Encoded
from mllm_jax.data.patches import patchify
from mllm_jax.data.processor import Processor
from mllm_jax.data.records import DataError, Turn

VISION = VisionConfig()
SMALL = VisionConfig(image_size=28, patch_size=14)  # 2 x 2 patches


def test_grids_are_the_released_ones(goldens):
  for width, height, *best in np.load(goldens / "anyres_select.npz")["rows"].tolist():
    columns, rows = tiles.best_grid(width, height, 336)
    assert [336 * columns, 336 * rows] == best, (width, height)


@pytest.mark.parametrize("name", ["wide640x360", "tall300x500", "square336"])
def test_pixels_are_the_released_ones(name, goldens):
  golden = np.load(goldens / f"img_{name}.npz")
  picture = Image.fromarray(golden["image_uint8"])
  crops = tiles.crop(picture, VISION)
  assert len(crops) == golden["anyres.num_tiles"] == tiles.crops_of(*picture.size, VISION)
  assert list(tiles.best_grid(*picture.size, 336)) == golden["anyres.grid_wh"].tolist()
  if "anyres.tiles_uint8" in golden:
    np.testing.assert_array_equal(crops, golden["anyres.tiles_uint8"].transpose(0, 2, 3, 1))


def released_places(width, height, grid, before):
  """The released merge, done on the numbers of the tokens in place of their features."""
  columns, rows = tiles.best_grid(width, height, 14 * grid)
  tokens = before + grid * grid
  features = np.arange((1 + columns * rows) * tokens).reshape(-1, tokens)
  spatial, patches = features[:, :before], features[:, before:]
  tiled = patches[1:].reshape(rows, columns, grid, grid).transpose(0, 2, 1, 3).reshape(rows * grid, columns * grid)
  current_height, current_width = tiled.shape
  if width / height > current_width / current_height:
    padding = (current_height - int(height * (current_width / width))) // 2
    tiled = tiled[padding : current_height - padding, :]
  else:
    padding = (current_width - int(width * (current_height / height))) // 2
    tiled = tiled[:, padding : current_width - padding]
  lines = [token for row in tiled for token in [*row, NEWLINE]]
  return [*spatial.reshape(-1), *patches[0], *lines]


@pytest.mark.parametrize("before", [0, 6])
@pytest.mark.parametrize(
  "size", [(640, 360), (300, 500), (336, 336), (1, 1), (1, 2000), (3000, 3), (1008, 336), (719, 431)]
)
def test_places_are_the_released_ones(size, before):
  found = tiles.table_rows(*size, VISION, before + 576)
  assert found.dtype == np.int32 and found.tolist() == released_places(*size, 24, before)


def test_tokens_that_are_no_map_are_refused():
  with pytest.raises(DataError, match="3 tokens of a crop are no map of 2 x 2"):
    tiles.table_rows(10, 10, SMALL, 3)


def test_rows_of_tiled_images(tokenizers):
  processor = Processor(tokenizers[False], Anyres(SMALL, 5), "vicuna_v1", 200, 10)
  wide, tall = Image.new("RGB", (60, 56), "red"), Image.new("RGB", (20, 61), "blue")
  row = processor.prompt([Turn("human", "<image>\nA\n<image>")], [wide, tall])
  crops = [tiles.crops_of(*picture.size, SMALL) for picture in (wide, tall)]
  assert crops == [5, 4] and (row.grids[:9] == 2).all() and not row.grids[9:].any() and not row.patches[9].any()
  np.testing.assert_array_equal(row.patches[5:9], patchify(tiles.crop(tall, SMALL), 14))
  first, second = (tiles.table_rows(*picture.size, SMALL, 5) for picture in (wide, tall))
  expected = [*first, *np.where(second < 0, second, second + 25)]
  assert row.visual_index[row.visual_index != -1].tolist() == expected
  assert processor.image_cost(*wide.size) == (5, len(first)) and processor.image_cost(20, 61) == (4, len(second))
  assert processor.with_room(2).max_images == 10 and processor.with_room(0).max_images == 1


def test_truncation_inside_the_tiles(tokenizers):
  processor = Processor(tokenizers[False], Anyres(SMALL, 5), "vicuna_v1", 200, 10)
  encoded = Encoded(np.array([1, -200, 7], np.int32), np.array([False, False, True]))
  whole, cut = (processor.places(encoded, [(60, 56)], length) for length in (None, 12))
  for before, after in zip(whole, cut, strict=True):
    if before.dtype != np.float32:
      assert before[:11].tolist() == after[:11].tolist()
  assert len(cut.tokens) == 12 and len(whole.tokens) == 2 + processor.image_cost(60, 56)[1]


def test_rows_without_room_are_refused(tokenizers):
  processor = Processor(tokenizers[False], Anyres(SMALL, 5), "vicuna_v1", 200, 2)
  with pytest.raises(DataError, match="5 crops, and a row has room for 2; raise data.max_images"):
    processor.prompt([Turn("human", "<image>")], [Image.new("RGB", (60, 56))])
