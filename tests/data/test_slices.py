"""Slicing and token organisation of LLaVA-UHD v2 against the released code's, and the properties that hold beyond."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from mllm_jax.config import ConfigError, VisionConfig
from mllm_jax.data import slices
from mllm_jax.data.records import DataError

GOLDENS = Path(__file__).parents[1] / "goldens" / "uhd"
CLIP = VisionConfig()
SIGLIP = VisionConfig(image_size=384)
SMALL = VisionConfig(image_size=28)  # 2 x 2 patches

sides = st.one_of(st.integers(1, 3000), st.integers(1, 300_000))


@pytest.fixture(scope="module")
def slicing():
  with np.load(GOLDENS / "slicing.npz") as file:
    return dict(file)


def test_the_released_table(slicing):
  for width, height, most, *expected in slicing["table"].tolist():
    plan = slices.plan(width, height, CLIP, most)
    found = [*plan.overview, plan.columns, plan.rows, plan.columns * plan.rows, *plan.slice]
    assert found == expected, (width, height, most)
    assert slices.crops_of(width, height, CLIP, most) == expected[4] + 1
  assert len(slicing["table"]) == 210


def test_the_released_sizes_of_training(slicing):
  for width, height, *expected in slicing["extras"].tolist():
    found = [*slices.to_area((width, height), 6 * 336**2), *slices.long_side((width, height), 1024)]
    assert found == expected, (width, height)
  assert slices.long_side((5000, 1), 1024) == (1024, 1) and slices.to_area((1, 10**7), 100) == (1, 31622)


def test_the_released_pixels(slicing):
  """A band at the lower border: what is above it does not reach the rows that are compared."""
  width, height = slicing["size"]
  pixels = np.zeros((height, width, 3), np.uint8)
  pixels[slicing["band_start"] :] = slicing["band"]
  *parts, overview = slices.crop(Image.fromarray(pixels), CLIP, 7)
  assert overview.shape == (252, 420, 3) and [part.shape for part in parts] == [(364, 294, 3)] * 2
  np.testing.assert_array_equal(overview[-21:], slicing["overview_end"])
  np.testing.assert_array_equal(np.stack(parts)[:, -31:], slicing["slices_end"])


@pytest.mark.parametrize("key", sorted(np.load(GOLDENS / "token_organisation.npz")))
def test_the_released_organisation(key):
  expected = np.load(GOLDENS / "token_organisation.npz")[key]  # image * 1000 + token, or minus the separator's id
  _, permuted, grid, edge = key.split("_")
  tokens = int(edge.removeprefix("edge")) ** 2
  columns, rows = (0, 0) if grid == "gridnone" else map(int, grid.removeprefix("grid").split("x"))
  found = slices.table_rows(columns, rows, "spatial" if permuted == "permute1" else "slices", tokens)
  assert [array.dtype for array in found] == [np.int32] * 2
  visual = expected >= 0
  np.testing.assert_array_equal(found[0], np.where(visual, expected // 1000 * tokens + expected % 1000, -1))
  np.testing.assert_array_equal(found[1], np.where(visual, 0, -expected))


@settings(deadline=None, max_examples=300)
@given(sides, sides, st.integers(1, 12), st.sampled_from([CLIP, SIGLIP, SMALL]))
@example(1, 1, 7, CLIP)
@example(384, 384, 7, SIGLIP)
def test_plans(width, height, most, vision):
  ratio = max(width, height) / min(width, height)
  try:
    plan = slices.plan(width, height, vision, most)
  except DataError:
    # A side falls under one patch at a ratio of grid^2; before that nothing is too thin.
    assert ratio > vision.grid**2
    return
  crops = [plan.overview] + [plan.slice] * (plan.columns > 0)
  for side_x, side_y in crops:
    assert side_x % vision.patch_size == side_y % vision.patch_size == 0
    assert 1 <= side_x * side_y // vision.patch_size**2 <= slices.max_patches(vision)
  assert plan.columns * plan.rows <= most and plan.columns * plan.rows != 1
  assert (plan.columns == 0) == (plan.rows == 0) == (plan.slice == (0, 0))
  assert (plan.columns == 0) == (most == 1 or width * height <= vision.image_size**2)
  if ratio > vision.grid**2:
    return  # of the two shapes that are one another's mirror image one may just be too thin
  mirrored = slices.plan(height, width, vision, most)
  assert mirrored.columns * mirrored.rows <= most and (mirrored.columns == 0) == (plan.columns == 0)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 120), st.integers(1, 120), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_crops_cover_the_picture(width, height, most, seed):
  picture = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))
  try:
    plan = slices.plan(width, height, SMALL, most)
  except DataError:
    return
  *parts, overview = slices.crop(picture, SMALL, most)
  assert len(parts) + 1 == slices.crops_of(width, height, SMALL, most)
  np.testing.assert_array_equal(overview, picture.resize(plan.overview, Image.Resampling.BICUBIC))
  if parts:
    assert {part.shape for part in parts} == {(plan.slice[1], plan.slice[0], 3)}
    lines = [np.hstack(parts[row * plan.columns : (row + 1) * plan.columns]) for row in range(plan.rows)]
    whole = picture.resize((plan.columns * plan.slice[0], plan.rows * plan.slice[1]), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(np.vstack(lines), whole)


@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from(slices.ORGANISATIONS), st.integers(1, 6))
def test_lengths_and_places(columns, rows, organisation, edge):
  tokens = edge * edge
  found, separators = slices.table_rows(columns, rows, organisation, tokens, (7, 8))
  assert len(found) == len(separators) == slices.length(columns, rows, organisation, tokens)
  assert sorted(found[found >= 0]) == list(range((columns * rows + 1) * tokens))  # every token once
  assert set(separators[found < 0]) <= {7, 8} and not separators[found >= 0].any() and found.min() == -1
  if organisation == "spatial":  # right and left neighbours of a map's row are what they are in the picture
    line = found[: columns * edge].reshape(columns, edge)
    np.testing.assert_array_equal(line, np.arange(columns)[:, None] * tokens + np.arange(edge))


def test_an_unsliced_picture_is_its_overview():
  for organisation in slices.ORGANISATIONS:
    found, separators = slices.table_rows(0, 0, organisation)
    assert found.tolist() == list(range(144)) and separators.tolist() == [0] * 144
    assert slices.length(0, 0, organisation) == 144


def test_other_towers():
  assert slices.plan(384, 384, SIGLIP, 7) == ((378, 378), 0, 0, (0, 0))
  assert slices.plan(768, 768, SIGLIP, 7) == ((378, 378), 2, 2, (378, 378))
  assert slices.max_patches(CLIP) == 576 and slices.max_patches(SIGLIP) == 752


@pytest.mark.parametrize("size", [(112896, 1), (1, 112896), (8000, 12), (10**7, 1)])
def test_too_thin_a_picture(size):
  with pytest.raises(
    DataError, match=rf"{size[0]} x {size[1]} pixels is too thin: .* 1 to 576 patches; crop or pad it"
  ):
    slices.plan(*size, CLIP, 1)


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)])
def test_a_picture_without_pixels(size):
  with pytest.raises(DataError, match=rf"{size[0]} x {size[1]} pixels has nothing to show"):
    slices.plan(*size, CLIP, 7)


def test_thin_pictures_that_still_work():
  assert slices.plan(5000, 13, CLIP, 7).overview == (6538, 14) and slices.crops_of(1, 1, CLIP, 7) == 1


def test_bad_organisations():
  for call in (slices.table_rows, slices.length):
    with pytest.raises(ConfigError, match="'rows' is unknown; known: spatial, slices"):
      call(2, 1, "rows")
    with pytest.raises(ConfigError, match="10 tokens of a crop are no square map"):
      call(2, 1, "spatial", 10)
    assert call(2, 1, "slices", 10) is not None
