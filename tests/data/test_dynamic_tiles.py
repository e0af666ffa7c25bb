"""InternVL's tiles: grids, pixels, and which token stands where."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mllm_jax import processors
from mllm_jax.batch import Batch
from mllm_jax.config import SHUFFLED, ConfigError, DataConfig, DecoderConfig, ModelConfig, ProjectorConfig, VisionConfig
from mllm_jax.data import chat, dynamic_tiles
from mllm_jax.data.aspects import Tiles
from mllm_jax.data.processor import Processor
from mllm_jax.data.records import DataError
from mllm_jax.models.projectors import tokens_per_crop

VISION = VisionConfig(image_size=56, patch_size=14, width=16, layers=1, heads=2, mlp_width=16)


@pytest.mark.parametrize(
  "size, most, grid",
  [
    ((448, 448), 12, (1, 1)),
    ((400, 300), 12, (4, 3)),  # the nearest shape, however small the picture
    ((800, 800), 12, (2, 2)),  # (1, 1) is as near, and of (3, 3) it fills less than a half
    ((2000, 2000), 12, (3, 3)),
    ((640, 480), 6, (3, 2)),
    ((480, 640), 6, (2, 3)),
    ((5000, 200), 12, (12, 1)),
    ((900, 300), 1, (1, 1)),
  ],
)
def test_grids(size, most, grid):
  assert dynamic_tiles.best_grid(*size, 448, most) == grid


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 4000), st.integers(1, 4000), st.integers(1, 12))
def test_no_grid_is_nearer_in_shape(width, height, most):
  columns, rows = dynamic_tiles.best_grid(width, height, 448, most)
  distance = lambda columns, rows: abs(width / height - columns / rows)
  every = [(i, j) for i in range(1, most + 1) for j in range(1, most + 1) if i * j <= most]
  assert (columns, rows) in every
  assert distance(columns, rows) == min(distance(*grid) for grid in every)
  crops = dynamic_tiles.crops_of(width, height, VISION, 1)
  assert crops == 1


def test_tiles_show_the_picture_in_rows_and_the_last_the_whole():
  colours = np.array([[10, 60, 110], [160, 210, 250]], np.uint8)
  picture = Image.fromarray(np.repeat(np.repeat(colours, 56, 0), 56, 1)[..., None].repeat(3, 2))
  crops = dynamic_tiles.crop(picture, VISION, 12)
  assert [crop.shape for crop in crops] == [(56, 56, 3)] * 7
  assert [int(np.median(crop)) for crop in crops[:6]] == colours.ravel().tolist()
  np.testing.assert_array_equal(crops[6], np.asarray(picture.resize((56, 56), Image.Resampling.BICUBIC)))
  (alone,) = dynamic_tiles.crop(picture, VISION, 1)
  np.testing.assert_array_equal(alone, crops[6])
  with pytest.raises(DataError, match="0 x 5"):
    dynamic_tiles.best_grid(0, 5, 56, 12)


def test_places_of_an_image_and_of_one_between_texts():
  bare, framed = (Tiles(VISION, 5, 12, frame) for frame in ((), (90, 91)))
  assert (bare.most_crops, bare.tiling(112, 56), bare.tiling(50, 50)) == (13, (2, 1), (0, 0))
  assert bare.places(112, 56).rows.tolist() == list(range(15)) and not bare.places(112, 56).tokens.any()
  rows, tokens = framed.places(112, 56)
  assert rows.tolist() == [-1, *range(15), -1] and tokens.tolist() == [90, *[0] * 15, 91]
  for aspect in (bare, framed):
    assert all(aspect.places_of(*size) == len(aspect.places(*size).rows) for size in ((9, 9), (112, 56), (30, 400)))
  assert dataclasses.replace(bare, max_tiles=1).most_crops == 1


def test_a_row_of_a_qwen2_with_internvls_tokens(byte_level_folders, tmp_path):
  """The frame stands around all tiles of an image, in front of the line break of its question."""
  tokenizer = chat.load_tokenizer(with_tokens(byte_level_folders["qwen2"], tmp_path / "tokenizer"))
  model = ModelConfig(vision=VISION, projector=ProjectorConfig(kind="spatial_shuffle", stride=1, dfi_kernel=2))
  assert tokens_per_crop(model) == 2 + 4
  data = DataConfig(image_aspect="tiles", max_slices=2)
  aspect = processors.make_aspect(model, tokenizer, data)
  processor = Processor(tokenizer, aspect, "internvl2", 200, 3)
  batch: Batch = processor(["<image>\nWhat?"], [[Image.new("RGB", (112, 56))]])
  start, end = (tokenizer.specials[mark] for mark in ("<img>", "</img>"))
  place = batch.tokens[0].tolist().index(start)
  assert batch.visual_index[0, place : place + 20].tolist() == [-1, *range(18), -1]
  assert batch.tokens[0, place + 19] == end and batch.tokens[0, place + 20] == tokenizer.single_id("\n")
  assert (batch.visual_index[0] >= 0).sum() == 18


def with_tokens(folder, to):
  """A tokenizer with InternVL's marks added."""
  tokenizer = chat.hf_tokenizer(folder)
  tokenizer.add_special_tokens({"additional_special_tokens": ["<img>", "</img>", "<IMG_CONTEXT>"]})
  tokenizer.save_pretrained(to)
  return str(to)


@pytest.mark.parametrize(
  "kind, data, message",
  [
    ("hiwin", DataConfig(image_aspect="tiles"), "image_aspect=tiles is for square crops"),
    ("pixel_shuffle", DataConfig(image_aspect="tiles", max_slices=0), "max_slices=0: 1 takes the whole image only"),
  ],
)
def test_what_cannot_be_tiled(kind, data, message, tokenizers):
  model = ModelConfig(vision=VISION, projector=ProjectorConfig(kind=kind, query_grid=2))
  with pytest.raises(ConfigError, match=message):
    processors.make_aspect(model, tokenizers[False], data)


def test_without_the_marks_in_the_vocabulary_there_is_no_frame(tokenizers):
  for kind in SHUFFLED:
    model = ModelConfig(vision=VISION, decoder=DecoderConfig(), projector=ProjectorConfig(kind=kind, stride=1))
    aspect = processors.make_aspect(model, tokenizers[False], DataConfig(image_aspect="tiles", max_slices=4))
    assert aspect.frame == () and aspect.most_crops == 5
