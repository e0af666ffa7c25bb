import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm_jax.data.chat import IMAGE_TOKEN_INDEX, Encoded
from mllm_jax.data.layout import expand, pad

VISUAL_TOKENS = 582  # 6 spatial and 576 patch tokens


def golden_rows(golden):
  """The golden's three rows as `encode` would have made them, without their padding."""
  for ids, labels, mask in zip(golden["input_ids"], golden["labels"], golden["attention_mask"], strict=True):
    yield Encoded(ids[mask].astype(np.int32), labels[mask] != -100)


def labels_of(row):
  """The released code's labels (unshifted, -100 where not trained on) of a row of ours."""
  return np.concatenate([[-100], np.where(row.loss_weights > 0, row.targets, -100)[:-1]])


@pytest.mark.parametrize("prefix,max_length", [("out", 612), ("trunc600", 600)])
def test_rows_are_those_of_the_released_model(prefix, max_length, goldens):
  golden = np.load(goldens / "e2e_crop_dfi.npz")
  for b, encoded in enumerate(golden_rows(golden)):
    images = (encoded.ids == IMAGE_TOKEN_INDEX).sum()
    row = pad(expand(encoded, [VISUAL_TOKENS] * images, max_length), max_length)
    np.testing.assert_array_equal(labels_of(row), golden[f"{prefix}.labels"][b])
    np.testing.assert_array_equal(row.segment_ids, golden[f"{prefix}.attention_mask"][b])
    if prefix == "out":
      assert row.segment_ids.sum() == golden["out.seq_lens"][b]


def test_visual_tokens_stand_where_the_released_model_puts_them(goldens):
  golden = np.load(goldens / "e2e_crop_dfi.npz")
  for b, encoded in enumerate(golden_rows(golden)):
    if b == 2:
      continue  # without an image
    row = expand(encoded, [VISUAL_TOKENS], 2048)
    first = np.flatnonzero(row.visual_index == 0)[0]
    embeds = golden["out.inputs_embeds"][b]
    np.testing.assert_array_equal(embeds[first : first + 12], golden["out.image_features_first12"][b])
    assert row.visual_index[first : first + VISUAL_TOKENS].tolist() == list(range(VISUAL_TOKENS))


def test_a_small_row():
  encoded = Encoded(np.array([1, 5, IMAGE_TOKEN_INDEX, 6, 7, 2], np.int32), np.array([0, 0, 0, 0, 1, 1], bool))
  row = expand(encoded, [3])
  assert row.tokens.tolist() == [1, 5, 0, 0, 0, 6, 7, 2]
  assert row.visual_index.tolist() == [-1, -1, 0, 1, 2, -1, -1, -1]
  assert row.targets.tolist() == [0, 0, 0, 0, 0, 7, 2, 0]
  assert row.loss_weights.tolist() == [0, 0, 0, 0, 0, 1, 1, 0]
  assert row.segment_ids.tolist() == [1] * 8 and row.positions.tolist() == list(range(8))
  assert [field.dtype for field in row] == [np.int32, np.int32, np.float32, np.int32, np.int32, np.int32]
  padded = pad(row, 10)
  assert [field[8:].tolist() for field in padded] == [[0, 0]] * 5 + [[-1, -1]]
  assert expand(encoded, [3], 7).loss_weights.tolist() == [0, 0, 0, 0, 0, 1, 0]  # the end token is cut off


pieces = st.lists(st.tuples(st.sampled_from(["text", "image"]), st.integers(0, 4), st.booleans()), max_size=12)


@settings(max_examples=200, deadline=None)
@given(pieces=pieces, max_length=st.integers(0, 40))
def test_every_place_is_accounted_for(pieces, max_length):
  ids, trained, runs, expected = [], [], [], []
  for kind, size, trained_on in pieces:
    if kind == "image":
      table = sum(runs)
      expected += [(0, False, table + k) for k in range(size)]
      ids.append(IMAGE_TOKEN_INDEX)
      trained.append(trained_on)
      runs.append(size)
    else:
      ids.append(10 + len(ids))
      trained.append(trained_on)
      expected.append((ids[-1], trained_on, -1))
  expected = expected[:max_length]
  row = expand(Encoded(np.array(ids, np.int32), np.array(trained, bool)), runs, max_length)
  assert [(token, k) for token, k in zip(row.tokens, row.visual_index, strict=True)] == [
    (token, k) for token, _, k in expected
  ]
  following = [*expected[1:], (0, False, -1)][: len(expected)]
  assert row.loss_weights.tolist() == [float(trained_on) for _, trained_on, _ in following]
  assert row.targets.tolist() == [token if trained_on else 0 for token, trained_on, _ in following]
  padded = pad(row, max_length)
  assert padded.segment_ids.sum() == len(expected)
  assert all(
    len(field) == max_length and field.dtype == before.dtype for field, before in zip(padded, row, strict=True)
  )


def test_mismatches_are_refused():
  encoded = Encoded(np.array([1, IMAGE_TOKEN_INDEX], np.int32), np.zeros(2, bool))
  with pytest.raises(ValueError, match="1 image placeholders but 2 images"):
    expand(encoded, [3, 3])
  with pytest.raises(ValueError, match="4 places cannot be padded to 3"):
    pad(expand(encoded, [3]), 3)
