import pickle

import numpy as np
import pytest
from PIL import Image

from mllm_jax.config import VisionConfig
from mllm_jax.data import images
from mllm_jax.data.aspects import Square
from mllm_jax.data.patches import unpatchify
from mllm_jax.data.processor import Processor, Row, collate
from mllm_jax.data.records import DataError, Records, Turn

VISION = VisionConfig(image_size=28, patch_size=14)
SAMPLES = [
  {
    "id": "one",
    "image": "a.png",
    "conversations": [{"from": "human", "value": "<image>\nHi"}, {"from": "gpt", "value": "Yes"}],
  },
  {"id": "none", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]},
  {
    "id": "two",
    "image": ["b.png", "c.png"],
    "conversations": [
      {"from": "human", "value": "<image>"},
      {"from": "gpt", "value": "A"},
      {"from": "human", "value": "<image>"},
      {"from": "gpt", "value": "B"},
    ],
  },
]


@pytest.fixture
def records(write_data):
  return Records.load(*write_data(SAMPLES))


@pytest.fixture
def processor(tokenizers):
  return Processor(tokenizers[False], Square(VISION, 5), template="vicuna_v1", max_length=100, max_images=2)


def test_rows_have_one_shape(records, processor):
  one, none, two = rows = [processor.row(sample) for sample in records]
  for row in rows:
    assert row.tokens.shape == row.visual_index.shape == (100,)
    assert row.patches.shape == (2, 4, 588) and row.patches.dtype == np.uint8
    assert row.grids.shape == (2, 2) and row.grids.dtype == np.int32
  assert [row.grids.tolist() for row in rows] == [[[2, 2], [0, 0]], [[0, 0], [0, 0]], [[2, 2], [2, 2]]]
  for row, crop, path in ((one, 0, records[0].images[0]), (two, 1, records[2].images[1])):
    pixels = unpatchify(row.patches[crop], row.grids[crop], 14)
    np.testing.assert_array_equal(pixels, images.preprocess(images.load(path), VISION))
  assert not one.patches[1].any() and not none.patches.any()
  assert [row.visual_index.max() for row in rows] == [4, -1, 9]
  for row, answers in ((one, ["Yes"]), (none, ["Yes"]), (two, ["A", "B"])):
    trained = row.targets[row.loss_weights > 0]
    parts = np.split(trained, np.flatnonzero(trained == 2) + 1)[:-1]
    assert [processor.tokenizer.decode(part) for part in parts] == answers


def test_a_prompt_is_the_beginning_of_the_training_row(records, processor):
  sample = records[0]
  row, prompt = processor.row(sample), processor.prompt(sample.turns[:1], [images.load(sample.images[0])])
  length = len(prompt.tokens)
  for field in ("tokens", "visual_index", "segment_ids", "positions"):
    assert getattr(prompt, field).tolist() == getattr(row, field)[:length].tolist()
  np.testing.assert_array_equal(prompt.patches, row.patches)
  np.testing.assert_array_equal(prompt.grids, row.grids)
  assert not prompt.loss_weights.any() and not prompt.targets.any()
  assert np.flatnonzero(row.loss_weights)[0] == length - 1  # the prompt's last place predicts the answer's first token
  padded = processor.prompt(sample.turns[:1], [images.load(sample.images[0])], max_length=120)
  assert len(padded.tokens) == 120 and padded.segment_ids.sum() == length


def test_collate_stacks(records, processor):
  rows = [processor.row(sample) for sample in records]
  batch = collate(rows)
  assert batch.patches.shape == (3, 2, 4, 588)
  for field in Row._fields:
    np.testing.assert_array_equal(getattr(batch, field)[1], getattr(rows[1], field))


def test_truncation_keeps_what_fits_and_refuses_what_does_not(records, tokenizers):
  def cut(max_length):
    return Processor(tokenizers[False], Square(VISION, 5), "vicuna_v1", max_length, 2).row(records[0])

  whole = cut(100)
  places = np.flatnonzero(whole.loss_weights)
  assert len(places) > 1
  short = cut(int(places[0]) + 2)  # place 0 ... the answer's first token
  assert short.loss_weights.sum() == 1 and short.targets[places[0]] == whole.targets[places[0]]
  with pytest.raises(DataError) as error:
    cut(int(places[0]) + 1)
  text = int(whole.segment_ids.sum()) - 5
  assert str(error.value) == (
    f"{records.source}, sample 0 ('one'): no trained-on token is left in {places[0] + 1} places ({text} text and 5 "
    "visual tokens); raise data.max_length or take the sample out"
  )


def test_errors_name_the_sample(write_data, processor):
  turn = {"from": "human", "value": "<image>"}
  path, folder = write_data(
    [
      {"id": "gone", "image": "a.png", "conversations": [turn, {"from": "gpt", "value": "A"}]},
      {"id": "mismatch", "image": [], "conversations": [turn, {"from": "gpt", "value": "A"}]},
      {
        "id": "many",
        "image": ["b.png"] * 3,
        "conversations": [{"from": "human", "value": "<image>" * 3}, {"from": "gpt", "value": "A"}],
      },
      {"id": "silent", "image": "c.png", "conversations": [turn, {"from": "gpt", "value": ""}]},
    ]
  )
  records = Records.load(path, folder)
  (image,) = records[0].images
  open(image, "w").close()
  messages = [
    "cannot be decoded",
    "1 <image> in the human turns but 0 images",
    "3 images, and a row has room for 2",
    "no answer that is not empty",
  ]
  for i, message in enumerate(messages):
    with pytest.raises(DataError, match=message) as error:
      processor.row(records[i])
    assert str(error.value).startswith(f"{records[i].name}: ")


def test_prompts_that_do_not_fit(processor):
  turn, picture = Turn("human", "<image>"), Image.new("RGB", (4, 4))
  with pytest.raises(DataError, match="1 <image> in the human turns but 2 images"):
    processor.prompt([turn], [picture] * 2)
  with pytest.raises(DataError, match="3 images, and a row has room for 2"):
    processor.prompt([Turn("human", "<image>" * 3)], [picture] * 3)
  length = len(processor.prompt([turn], [picture]).tokens)
  with pytest.raises(DataError, match=f"the prompt takes {length} places and there are {length - 1}"):
    processor.prompt([turn], [picture], max_length=length - 1)
  assert len(processor.prompt([turn], [picture], max_length=length).tokens) == length


def test_unknown_template_is_refused_at_once(tokenizers):
  with pytest.raises(DataError, match="data.template must be one of vicuna_v1, plain"):
    Processor(tokenizers[False], Square(VISION, 5), "v0", 100, 1)


def test_pickling(records, processor):
  copy = pickle.loads(pickle.dumps(processor))
  for before, after in zip(processor.row(records[2]), copy.row(records[2]), strict=True):
    np.testing.assert_array_equal(before, after)


def test_what_ends_an_answer(tokenizers, byte_level):
  make = lambda tokenizer, template: Processor(tokenizer, Square(VISION, 5), template, 100, 1)
  assert make(tokenizers[False], "vicuna_v1").end_id == 2
  processor = make(byte_level["qwen2"], "chatml")
  assert processor.end_id == processor.tokenizer.token_id("<|im_end|>")
  with pytest.raises(DataError, match="choose another data.template"):
    make(tokenizers[False], "chatml")
