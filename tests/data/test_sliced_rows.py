"""Rows of sliced images: crops as patches, visual tokens laid out in the image's own shape, separators between them."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from mllm_jax import processors
from mllm_jax.config import ConfigError, DataConfig, ModelConfig, ProjectorConfig, VisionConfig
from mllm_jax.data import slices
from mllm_jax.data.aspects import Slices
from mllm_jax.data.patches import patchify, unpatchify
from mllm_jax.data.processor import Processor, join_rows
from mllm_jax.data.records import DataError, Turn

VISION = VisionConfig(image_size=56)
TOKENS = 4  # a crop: 2 x 2
COMMA, NEWLINE = 7, 8


def processor(tokenizers, organisation="spatial", max_slices=6, max_images=14):
  aspect = Slices(VISION, TOKENS, max_slices, organisation, (COMMA, NEWLINE))
  return Processor(tokenizers[False], aspect, "vicuna_v1", 300, max_images)


def noise(width: int, height: int) -> Image.Image:
  return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize("organisation", slices.ORGANISATIONS)
def test_a_sliced_image_in_its_place(tokenizers, organisation):
  maker, picture = processor(tokenizers, organisation), noise(112, 56)
  row = maker.prompt([Turn("human", "<image>\nA")], [picture])
  assert row.grids[:4].tolist() == [[4, 4], [4, 4], [2, 5], [0, 0]]  # left, right, the whole
  for crop, expected in enumerate(slices.crop(picture, VISION, 6)):
    np.testing.assert_array_equal(unpatchify(row.patches[crop], row.grids[crop], 14), expected)
    assert not row.patches[crop, row.grids[crop].prod() :].any()
  start = int(np.flatnonzero(row.visual_index >= 0)[0])
  length = maker.image_cost(112, 56)[1]
  index, tokens = row.visual_index[start : start + length], row.tokens[start : start + length]
  if organisation == "spatial":  # two rows of both slices side by side, a comma, then the overview
    expected = [0, 1, 4, 5, NEWLINE, 2, 3, 6, 7, NEWLINE, COMMA, 8, 9, 10, 11]
    separators = [4, 9, 10]
  else:
    expected = [0, 1, 2, 3, COMMA, 4, 5, 6, 7, NEWLINE, 8, 9, 10, 11]
    separators = [4, 9]
  assert length == len(expected) and (row.visual_index[start + length :] == -1).all()
  found = np.where(index >= 0, index, tokens)
  assert found.tolist() == expected
  assert np.flatnonzero(index < 0).tolist() == separators and not tokens[index >= 0].any()
  assert not row.loss_weights.any() and row.positions.tolist() == list(range(len(row.tokens)))


def test_several_images_count_on_through_the_table(tokenizers):
  maker = processor(tokenizers)
  row = maker.prompt([Turn("human", "<image>\nA\n<image>\nB<image>")], [noise(112, 56), noise(40, 40), noise(56, 112)])
  assert (row.grids.any(-1)).sum() == 3 + 1 + 3
  index = row.visual_index[row.visual_index >= 0]
  assert (
    sorted(index.tolist()) == list(range(7 * TOKENS)) and (np.diff(np.flatnonzero(row.visual_index == 12)) == 0).all()
  )
  assert row.grids[3].tolist() == [4, 4]  # enlarged to the tower's area


def test_separators_are_not_trained_on_and_answers_are(tokenizers):
  maker = processor(tokenizers)
  turns = [Turn("human", "<image>\nWhat is it?"), Turn("gpt", "a cat, or a dog\n")]
  batch = maker([turns], [[noise(112, 56)]])
  trained = batch.targets[0][batch.loss_weights[0] > 0]
  assert maker.tokenizer.decode(trained[:-1]).strip() == "a cat, or a dog" and trained[-1] == maker.end_id
  visual = np.flatnonzero(batch.visual_index[0] >= 0)
  assert not batch.loss_weights[0, visual[0] - 1 : visual[-1]].any()


def test_stage_one_takes_the_whole_image_only(tokenizers):
  maker = processor(tokenizers, max_slices=1, max_images=1)
  assert maker.aspect.most_crops == 1 and maker.image_cost(500, 100) == (1, TOKENS)
  row = maker.prompt([Turn("human", "<image>")], [noise(500, 100)])
  assert row.grids.tolist() == [[1, 8]] and row.visual_index.max() == TOKENS - 1


def test_rows_shared_by_samples_keep_their_separators(tokenizers):
  maker = processor(tokenizers)
  rows = [maker.prompt([Turn("human", "<image>\nA")], [noise(112, 56)]) for _ in range(2)]
  joined = join_rows(rows, 200, 14, maker.aspect)
  places = len(rows[0].tokens)
  for segment, row in enumerate(rows):
    part = slice(segment * places, (segment + 1) * places)
    np.testing.assert_array_equal(joined.tokens[part], row.tokens)
    shift = segment * 3 * TOKENS
    np.testing.assert_array_equal(
      joined.visual_index[part], np.where(row.visual_index >= 0, row.visual_index + shift, -1)
    )
  np.testing.assert_array_equal(joined.patches[3:6], rows[1].patches[:3])
  assert joined.grids[3:6].tolist() == rows[1].grids[:3].tolist() and not joined.grids[6:].any()


def test_what_cannot_be_used_is_refused(tokenizers):
  with pytest.raises(DataError, match="3 crops, and a row has room for 2; raise data.max_images"):
    processor(tokenizers, max_images=2).prompt([Turn("human", "<image>")], [noise(112, 56)])
  with pytest.raises(DataError, match="conversation 0: .*2000 x 1 pixels is too thin"):
    processor(tokenizers)([[Turn("human", "<image>")]], [[Image.new("RGB", (2000, 1))]])
  with pytest.raises(ConfigError, match="5 tokens of a crop are no square map"):
    Slices(VISION, 5, 6, "spatial", (COMMA, NEWLINE))


def test_aspects_that_a_model_can_read(tokenizers):
  tokenizer = tokenizers[False]
  model = ModelConfig(projector=ProjectorConfig(kind="hiwin"))
  data = DataConfig(image_aspect="slices")
  made = processors.make_aspect(model, tokenizer, data)
  assert (made.tokens_per_crop, made.patches, made.most_crops, made.organisation) == (144, 576, 7, "spatial")
  assert tokenizer.decode([made.separators[0]]).strip() == "," and tokenizer.decode([made.separators[1]]) == "\n"
  with_projector = lambda **fields: dataclasses.replace(model, projector=ProjectorConfig(kind="hiwin", **fields))
  assert processors.make_aspect(with_projector(separators="released"), tokenizer, data).separators == (29892, 13)
  for model, data, message in (
    (with_projector(separators="comma"), data, "projector.separators='comma' is unknown; known: text, released"),
    (with_projector(organisation="rows"), data, "organisation='rows' is unknown"),
    (model, DataConfig(image_aspect="slices", max_slices=0), "max_slices=0: 1 takes the whole image only"),
  ):
    with pytest.raises(ConfigError, match=message):
      processors.make_aspect(model, tokenizer, data)


def test_patches_and_pictures():
  pixels = np.arange(2 * 30 * 45 * 3).reshape(2, 30, 45, 3)
  patches = patchify(pixels, 14)
  assert patches.shape == (2, 2 * 3, 588)
  np.testing.assert_array_equal(patches[1, 4].reshape(14, 14, 3), pixels[1, 14:28, 14:28])
  np.testing.assert_array_equal(unpatchify(np.pad(patches[0], ((0, 3), (0, 0))), (2, 3), 14), pixels[0, :28, :42])
