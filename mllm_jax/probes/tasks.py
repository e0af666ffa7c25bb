"""The three probes: what of a feature map its linear head reads, the loss, the prediction, and how it is scored.

Each task has the same members: `grid` (h, w) of its pictures in patches; `row`, a picture and its label as arrays;
`read`, which features the head is given; `loss` of each row of a batch [B] float32; `predict`, small arrays for the
host; `examine`, (what is true, what was said, what counts) of one row; `score`, the metrics from the sum of what counts
and the number of rows.

The paper names the tasks (appendix, fig. 8); how the pictures are brought into shape and what the heads read is chosen
here.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image

from mllm_jax.config import VisionConfig
from mllm_jax.data import images
from mllm_jax.data.patches import patchify
from mllm_jax.data.records import DataError
from mllm_jax.probes.coco_stuff import VOID
from mllm_jax.probes.examples import Data, Example

LONGEST_WORD = 24  # letters; MJSynth's longest has 23
BLANK = 0
LABELS_PER_PATCH = 16  # along a side of a patch, so that cells of all levels hold whole squares of labels


def make(name: str, data: Data, vision: VisionConfig):
  """The task of this name, "text", "segmentation" or "classes"."""
  return {"text": Text, "segmentation": Segmentation, "classes": Classes}[name](data, vision)


class Text:
  """Reading a word: of each column of the map the head reads the mean and the maximum over its rows, and says a letter
  or none (CTC, Graves et al. 2006).

  As in CRNN (Shi et al. 2017) the picture is brought to one shape whatever its own, here four times as wide as high,
  with no more patches than the tower's square.
  """

  name, metrics = "text", ("word accuracy",)

  def __init__(self, data: Data, vision: VisionConfig):
    self.letters = {letter: number + 1 for number, letter in enumerate(data.classes)}
    self.names = ("", *data.classes)
    self.grid = (max(vision.grid // 2, 1), 2 * vision.grid)
    self.side, self.outputs = vision.patch_size, len(data.classes) + 1

  def spelled(self, word: str) -> str:
    """The word in the letters that the head knows."""
    return "".join(letter for letter in word.lower() if letter in self.letters)

  def row(self, example: Example) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """uint8 [P, 3 p p], and the word: letters int32 [24], how many there are, and how many columns CTC needs for it."""
    size = (self.grid[1] * self.side, self.grid[0] * self.side)
    pixels = np.asarray(example.open().resize(size, Image.Resampling.BICUBIC), np.uint8)
    letters = [self.letters[letter] for letter in self.spelled(example.label)][:LONGEST_WORD]
    needed = len(letters) + sum(a == b for a, b in zip(letters, letters[1:]))
    if len(self.spelled(example.label)) > LONGEST_WORD:
      needed = 10**6  # told apart from words that can be learnt
    padded = np.zeros(LONGEST_WORD, np.int32)
    padded[: len(letters)] = letters
    word = {"letters": padded, "count": np.int32(len(letters)), "needed": np.int32(needed)}
    return patchify(pixels, self.side), word

  def read(self, maps: jax.Array) -> jax.Array:
    """[B, h, w, C] -> [B, w, 2 C]."""
    return jnp.concatenate([maps.mean(1), maps.max(1)], -1)

  def loss(self, logits: jax.Array, labels: dict[str, jax.Array]) -> jax.Array:
    """Negative log likelihood of each word by letter, 0 for one that has no path through the columns."""
    beyond = jnp.arange(LONGEST_WORD) >= labels["count"][:, None]
    nothing = jnp.zeros(logits.shape[:2], jnp.float32)
    losses = optax.ctc_loss(logits, nothing, labels["letters"], beyond.astype(jnp.float32), blank_id=BLANK)
    return jnp.where(labels["needed"] <= logits.shape[1], losses / jnp.maximum(labels["count"], 1), 0)

  def predict(self, logits: jax.Array) -> jax.Array:
    """The likeliest letter of each column, int32 [B, w]."""
    return jnp.argmax(logits, -1).astype(jnp.int32)

  def examine(self, example: Example, labels: dict[str, np.ndarray], best: np.ndarray) -> tuple[str, str, int]:
    true, said = self.spelled(example.label), greedy(best, self.names)
    return true, said, int(true == said)

  def score(self, total: int, rows: int) -> dict[str, float]:
    return {"word accuracy": total / rows}


def greedy(best: np.ndarray, names: Sequence[str]) -> str:
  """The word of the likeliest letters of all columns: repeated ones are one letter, blanks part them."""
  kept = [here for before, here in zip([BLANK, *best], best) if here != before and here != BLANK]
  return "".join(names[number] for number in kept)


class Segmentation:
  """Telling the class of every pixel: a cell of the map says the same of all of its pixels.

  So a head on the tower's own features says one thing of a patch; to interpolate what it says would be the same as to
  interpolate what it reads. Labels are taken at 16 x 16 points of each patch, the picture and its labels padded to a
  square.
  """

  name, metrics = "segmentation", ("pixel accuracy", "mIoU")

  def __init__(self, data: Data, vision: VisionConfig):
    self.names, self.table, self.vision = data.classes, data.table, vision
    self.grid, self.outputs = (vision.grid, vision.grid), len(data.classes)

  def row(self, example: Example) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """uint8 [P, 3 p p], and the classes of the points, uint8 [16 h, 16 w], VOID where there is none."""
    picture = example.open()
    labels = read_labels(example.label)
    if labels.shape != (picture.height, picture.width):
      raise DataError(f"{example.label}: labels of {labels.shape[::-1]} pixels for a picture of {picture.size}")
    side = max(labels.shape)
    square = np.full((side, side), VOID, np.uint8)
    top, left = ((side - length) // 2 for length in labels.shape)
    square[top : top + labels.shape[0], left : left + labels.shape[1]] = (
      labels if self.table is None else self.table[labels]
    )
    size = LABELS_PER_PATCH * self.vision.grid
    points = np.asarray(Image.fromarray(square).resize((size, size), Image.Resampling.NEAREST), np.uint8)
    return patchify(images.preprocess(picture, self.vision), self.vision.patch_size), {"points": points}

  def read(self, maps: jax.Array) -> jax.Array:
    return maps

  def loss(self, logits: jax.Array, labels: dict[str, jax.Array]) -> jax.Array:
    """Cross-entropy averaged over the points that have a class."""
    batch, height, width, _ = logits.shape
    n = labels["points"].shape[1] // height
    cells = labels["points"].reshape(batch, height, n, width, n).swapaxes(2, 3).reshape(batch, height, width, n * n)
    valid = cells != VOID
    chosen = jnp.take_along_axis(logits, jnp.where(valid, cells, 0).astype(jnp.int32), axis=-1)
    losses = jnp.where(valid, jax.nn.logsumexp(logits, -1, keepdims=True) - chosen, 0)
    return losses.sum((1, 2, 3)) / jnp.maximum(valid.sum((1, 2, 3)), 1)

  def predict(self, logits: jax.Array) -> jax.Array:
    """The likeliest class of each cell, uint8 [B, h, w]."""
    return jnp.argmax(logits, -1).astype(jnp.uint8)

  def examine(self, example: Example, labels: dict[str, np.ndarray], best: np.ndarray):
    del example
    n = len(labels["points"]) // len(best)
    said = best.repeat(n, 0).repeat(n, 1)
    return labels["points"], said, confusion(labels["points"], said, self.outputs)

  def score(self, total: np.ndarray, rows: int) -> dict[str, float]:
    del rows
    return {"pixel accuracy": pixel_accuracy(total), "mIoU": mean_iou(total)}


def read_labels(source: str | np.ndarray) -> np.ndarray:
  """A label map uint8 [H, W]. Raises DataError where the file is none."""
  if not isinstance(source, str):
    return source
  try:
    with Image.open(source) as image:
      if image.mode not in ("L", "P"):
        raise DataError(f"{source} has pixels of mode {image.mode}; a label map is a PNG of 8 bits and one channel")
      return np.asarray(image, np.uint8)
  except images.DAMAGED as error:
    raise DataError(f"{source} cannot be decoded ({error}); unpack the data set again") from error


def confusion(true: np.ndarray, said: np.ndarray, count: int) -> np.ndarray:
  """int64 [count, count]: how many points of each class (rows) were said to be of each (columns); VOID left out."""
  valid = true != VOID
  pairs = true[valid].astype(np.int64) * count + said[valid]
  return np.bincount(pairs, minlength=count * count).reshape(count, count)


def pixel_accuracy(confused: np.ndarray) -> float:
  """The share of points told rightly."""
  return float(np.trace(confused) / max(confused.sum(), 1))


def mean_iou(confused: np.ndarray) -> float:
  """Intersection over union, averaged over the classes that there are or were said to be."""
  union = confused.sum(0) + confused.sum(1) - np.diag(confused)
  return float(np.mean(np.diag(confused)[union > 0] / union[union > 0])) if union.any() else 0.0


class Classes:
  """Naming the class of a picture, cut to its box: the head reads the mean and the maximum over the map.

  The mean alone would be all but the same for a map and its interpolation.
  """

  name, metrics = "classes", ("accuracy",)

  def __init__(self, data: Data, vision: VisionConfig):
    self.names, self.vision = data.classes, vision
    self.grid, self.outputs = (vision.grid, vision.grid), len(data.classes)

  def row(self, example: Example) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """uint8 [P, 3 p p], and the class."""
    if not 0 <= example.label < self.outputs:
      raise DataError(f"{example.picture}: class {example.label + 1} of {self.outputs}")
    return patchify(images.preprocess(example.open(), self.vision), self.vision.patch_size), {
      "class": np.int32(example.label)
    }

  def read(self, maps: jax.Array) -> jax.Array:
    """[B, h, w, C] -> [B, 2 C]."""
    return jnp.concatenate([maps.mean((1, 2)), maps.max((1, 2))], -1)

  def loss(self, logits: jax.Array, labels: dict[str, jax.Array]) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels["class"])

  def predict(self, logits: jax.Array) -> jax.Array:
    return jnp.argmax(logits, -1)

  def examine(self, example: Example, labels: dict[str, np.ndarray], best: np.ndarray) -> tuple[str, str, int]:
    true, said = self.names[int(labels["class"])], self.names[int(best)]
    return true, said, int(true == said)

  def score(self, total: int, rows: int) -> dict[str, float]:
    return {"accuracy": total / rows}
