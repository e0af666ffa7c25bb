"""The probes' small data: handwritten digits in a row to be read, their strokes, and single ones to be named.

What is tested on are scans that nothing was trained on.
"""

import numpy as np

from mllm_jax.demo import scenes
from mllm_jax.probes.examples import Data, Example

TRAIN, TEST = 1000, 300
HEIGHT, WIDTH = scenes.IMAGE_SIZE // 2, scenes.IMAGE_SIZE * 2
LETTERS = range(3, 7)
INK = 0.5  # how much of a pixel is ink where it counts as the stroke


def make(task: str, seed: int, train: int = TRAIN, test: int = TEST) -> Data:
  """Pictures of training scans and of held-out ones."""
  digits = scenes.load_digits()
  draw, classes = {
    "text": (string, tuple(map(str, range(10)))),
    "segmentation": (strokes, ("ground", *map(str, range(10)))),
    "classes": (single, tuple(map(str, range(10)))),
  }[task]
  halves = []
  for half, (count, scans) in enumerate(((train, digits.train_indices), (test, digits.held_out_indices))):
    rng = np.random.default_rng([seed, half])
    halves.append([draw(rng, scans) for _ in range(count)])
  return Data(*halves, classes)


def string(rng: np.random.Generator, scans: np.ndarray) -> Example:
  """Three to six digits from left to right, of one colour."""
  count = int(rng.integers(LETTERS.start, LETTERS.stop))
  chosen = rng.choice(scans, count)
  margin = max(scenes.SIZES) // 2 + 1
  step = rng.uniform(max(scenes.SIZES) + 1, (WIDTH - 2 * margin) / count)
  x = rng.uniform(margin, WIDTH - margin - step * (count - 1))
  y = HEIGHT // 2 + int(rng.integers(-scenes.PATCH_SIZE // 2, scenes.PATCH_SIZE // 2 + 1))
  colour = list(scenes.COLOURS.values())[rng.integers(len(scenes.COLOURS))]
  picture = np.empty((HEIGHT, WIDTH, 3), np.float32)
  picture[:] = list(scenes.GROUNDS.values())[rng.integers(len(scenes.GROUNDS))]
  for place, scan in enumerate(chosen.tolist()):
    size = int(rng.integers(scenes.SIZES.start, scenes.SIZES.stop))
    left, top = round(x + place * step) - size // 2, y - size // 2
    area = picture[top : top + size, left : left + size]
    area += scenes.glyph(scan, size)[..., None] * (np.asarray(colour, np.float32) - area)
  word = "".join(map(str, scenes.load_digits().labels[chosen]))
  return Example((picture + 0.5).astype(np.uint8), word)


def strokes(rng: np.random.Generator, scans: np.ndarray) -> Example:
  """One to five digits, and for each pixel 0 for the ground, or 1 more than the digit whose stroke it is."""
  scene = scenes.sample_scene(rng, scans)
  picture = scenes.render(scene)
  labels = np.zeros(picture.shape[:2], np.uint8)
  for thing in scene.objects:
    left, top, right, bottom = thing.box
    labels[top:bottom, left:right][scenes.glyph(thing.scan, thing.size) > INK] = thing.digit + 1
  return Example(picture, labels)


def single(rng: np.random.Generator, scans: np.ndarray) -> Example:
  """One digit anywhere."""
  scene = scenes.sample_scene(rng, scans, count=1)
  return Example(scenes.render(scene), scene.objects[0].digit)
