"""The probes' tasks: decoding, metrics and losses against cases that are worked out by hand or by PyTorch's words."""

import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from mllm_jax.config import VisionConfig
from mllm_jax.data.patches import unpatchify
from mllm_jax.data.records import DataError
from mllm_jax.probes import digits, tasks
from mllm_jax.probes.coco_stuff import VOID
from mllm_jax.probes.examples import Data, Example

VISION = VisionConfig(image_size=56, patch_size=14, width=16, layers=3, heads=2, mlp_width=32)


@pytest.mark.parametrize(
  "best, word",
  [
    ([0, 0, 0], ""),
    ([1, 1, 1], "a"),
    ([1, 0, 1], "aa"),
    ([0, 2, 2, 0, 0, 1, 1, 0, 1], "baa"),
    ([1, 2, 1, 1, 2], "abab"),
    ([], ""),
  ],
)
def test_greedy_decoding(best, word):
  assert tasks.greedy(np.asarray(best, int), ("", "a", "b")) == word


def text() -> tasks.Text:
  return tasks.Text(Data((), (), ("a", "b", "1")), VISION)


def test_words_as_rows():
  task = text()
  pixels = np.random.default_rng(0).integers(0, 256, (28, 112, 3), np.uint8)
  patches, word = task.row(Example(pixels, "Ab-b1"))
  assert task.grid == (2, 8) and task.outputs == 4
  np.testing.assert_array_equal(unpatchify(patches, task.grid, 14), pixels)  # it has the shape already
  assert word["letters"][:5].tolist() == [1, 2, 2, 3, 0] and word["count"] == 4 and word["needed"] == 5
  assert task.row(Example(pixels, "ab" * 13))[1]["needed"] > 1000
  labels = {"count": word["count"]}
  assert task.examine(Example(pixels, "Ab-b1"), labels, np.asarray([1, 2, 0, 2, 3, 3, 0, 0])) == ("abb1", "abb1", 1)
  assert task.examine(Example(pixels, "Ab-b1"), labels, np.asarray([1, 2, 2, 3])) == ("abb1", "ab1", 0)
  assert task.score(3, 4) == {"word accuracy": 0.75}


def test_ctc_loss_is_the_likelihood_of_all_paths():
  """Four columns of three letters and the blank: 256 paths, each decoded."""
  task, rng = text(), np.random.default_rng(1)
  logits = rng.normal(size=(2, 4, 4)).astype(np.float32)
  letters = np.zeros((2, tasks.LONGEST_WORD), np.int32)
  letters[:, :2] = [[1, 1], [3, 2]]
  labels = {"letters": letters, "count": np.asarray([2, 2]), "needed": np.asarray([3, 2])}
  loss = jax.jit(task.loss)
  found = loss(logits, labels)
  shares = np.exp(logits.astype(np.float64))
  shares /= shares.sum(-1, keepdims=True)
  for row, word in enumerate(("aa", "1b")):
    paths = itertools.product(range(4), repeat=4)
    total = sum(np.prod(shares[row, range(4), path]) for path in paths if tasks.greedy(path, task.names) == word)
    np.testing.assert_allclose(found[row], -np.log(total) / 2, rtol=1e-5)  # float32 sums of a dozen logarithms
  # "aa" takes three columns: with two there is no path, and nothing to learn.
  assert loss(logits[:, :2], labels)[0] == 0


def test_confusion_and_what_is_made_of_it():
  true = np.asarray([[0, 0, 1], [1, 2, VOID]], np.uint8)
  said = np.asarray([[0, 1, 1], [1, 0, 2]], np.uint8)
  confused = tasks.confusion(true, said, 4)
  np.testing.assert_array_equal(confused, [[1, 1, 0, 0], [0, 2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
  assert tasks.pixel_accuracy(confused) == 3 / 5
  # IoU: class 0 has 1 of 3, class 1 has 2 of 3, class 2 has 0 of 1, class 3 is nowhere.
  assert tasks.mean_iou(confused) == pytest.approx((1 / 3 + 2 / 3 + 0) / 3)
  assert tasks.mean_iou(np.zeros((3, 3), int)) == 0 and tasks.mean_iou(np.diag([2, 0, 5])) == 1


def segmentation(**more) -> tasks.Segmentation:
  return tasks.Segmentation(Data((), (), ("sky", "sea"), **more), VISION)


def test_label_maps_as_rows(tmp_path):
  """A wide picture is padded above and below, and its labels with no class."""
  table = np.full(256, VOID, np.uint8)
  table[[7, 9]] = 0, 1
  values = np.full((32, 64), 7, np.uint8)
  values[:, 32:] = 9
  values[:, 60:] = 100  # no class
  Image.fromarray(values).save(tmp_path / "labels.png")
  example = Example(np.zeros((32, 64, 3), np.uint8), str(tmp_path / "labels.png"))
  patches, labels = segmentation(table=table).row(example)
  expected = np.full((64, 64), VOID, np.uint8)
  expected[16:48, :32], expected[16:48, 32:60] = 0, 1
  np.testing.assert_array_equal(labels["points"], expected)
  assert patches.shape == (16, 588)
  with pytest.raises(DataError, match=r"labels of \(64, 32\) pixels for a picture of \(32, 32\)"):
    segmentation(table=table).row(example._replace(picture=np.zeros((32, 32, 3), np.uint8)))
  Image.fromarray(np.zeros((32, 64, 3), np.uint8)).save(tmp_path / "labels.png")
  with pytest.raises(DataError, match="pixels of mode RGB"):
    segmentation(table=table).row(example)


def test_segmentation_loss_is_that_of_every_point():
  """Against logits repeated to the points and a cross-entropy of each, in float64."""
  rng, task = np.random.default_rng(2), segmentation()
  points = rng.choice(np.asarray([0, 1, VOID], np.uint8), (2, 8, 8))
  logits = rng.normal(size=(2, 4, 4, 2))
  found = task.loss(jnp.asarray(logits, jnp.float32), {"points": jnp.asarray(points)})
  full = logits.repeat(2, 1).repeat(2, 2)
  full = full - np.log(np.exp(full).sum(-1, keepdims=True))
  for row in range(2):
    valid = points[row] != VOID
    expected = -full[row][valid][np.arange(valid.sum()), points[row][valid]].mean()
    np.testing.assert_allclose(found[row], expected, rtol=1e-5)  # float32
  nothing = task.loss(jnp.asarray(logits, jnp.float32), {"points": jnp.full((2, 8, 8), VOID, jnp.uint8)})
  np.testing.assert_array_equal(nothing, 0)
  true, said, confused = task.examine(None, {"points": points[0]}, np.asarray(task.predict(jnp.asarray(logits)))[0])
  np.testing.assert_array_equal(said, full[0].argmax(-1))
  assert confused.sum() == (true != VOID).sum()


def test_classes_read_mean_and_maximum():
  task = tasks.Classes(Data((), (), ("x", "y")), VISION)
  maps = np.random.default_rng(3).normal(size=(2, 3, 5, 4)).astype(np.float32)
  expected = np.concatenate([maps.mean((1, 2)), maps.max((1, 2))], -1)
  np.testing.assert_allclose(task.read(jnp.asarray(maps)), expected, rtol=1e-5, atol=1e-6)  # sums of 15
  picture = np.zeros((9, 9, 3), np.uint8)
  assert task.row(Example(picture, 1))[1]["class"] == 1
  with pytest.raises(DataError, match="class 3 of 2"):
    task.row(Example(picture, 2))


def test_digits():
  for name in ("text", "segmentation", "classes"):
    data, again = (digits.make(name, 3, 6, 4) for _ in range(2))
    assert len(data.train) == 6 and len(data.test) == 4
    np.testing.assert_array_equal(data.train[5].picture, again.train[5].picture)
    task = tasks.make(name, data, types.SimpleNamespace(**vars(VISION), grid=8))
    assert task.outputs == {"text": 11, "segmentation": 11, "classes": 10}[name]
  words = digits.make("text", 0, 200, 0).train
  assert {len(example.label) for example in words} == {3, 4, 5, 6}
  assert words[0].picture.shape == (56, 224, 3) and set("".join(e.label for e in words)) == set("0123456789")
  strokes = digits.make("segmentation", 0, 40, 0).train
  assert {int(value) for example in strokes for value in np.unique(example.label)} == set(range(11))
