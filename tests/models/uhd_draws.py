"""What went into the released numbers of LLaVA-UHD v2 and what came out; tests/goldens/uhd/hiwin.md says how kept."""

import json
import math
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parents[1] / "goldens" / "uhd"


class Normals32:
  """Standard normal float32 numbers as torch's CPU generator draws them from a seed, to the last digit or two (Mersenne
  twister, one word a number; Box-Muller on blocks of 16 that pair number i with i + 8)."""

  def __init__(self, seed: int):
    self.state = np.random.RandomState(seed)

  def uniform(self, count: int) -> np.ndarray:
    if not count:  # asked for no bytes, numpy would still take a word
      return np.zeros(0)
    words = np.frombuffer(self.state.bytes(4 * count), "<u4")
    return (words & np.uint32(2**24 - 1)) * 2.0**-24

  def draw(self, shape: tuple[int, ...]) -> np.ndarray:
    """At least 16 numbers; a last block that is not full is drawn anew together with the numbers before it."""
    count = math.prod(shape)
    assert count >= 16, "torch draws fewer numbers in another way"
    numbers = self.uniform(count)
    whole = count - count % 16
    numbers[:whole] = blocks(numbers[:whole])
    if count % 16:
      numbers[-16:] = blocks(self.uniform(16))
    return numbers.reshape(shape).astype(np.float32)


def blocks(uniform: np.ndarray) -> np.ndarray:
  """Box-Muller on blocks of 16."""
  first, second = uniform.reshape(-1, 2, 8).swapaxes(0, 1)
  radius, angle = np.sqrt(-2 * np.log(1 - first)), 2 * math.pi * second
  return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).ravel()


def read(name: str) -> dict[str, np.ndarray]:
  """All arrays of a golden file, those that were drawn from a seed drawn again."""
  with np.load(FOLDER / f"{name}.npz") as file:
    arrays = dict(file)
  plan = json.loads(str(arrays.pop("draws_json")))
  normals = Normals32(plan["seed"])
  for array, shape, scale, offset, skip, half in plan["draws"]:
    normals.uniform(skip)
    drawn = (offset + scale * normals.draw(tuple(shape))).astype(np.float32)
    if half:
      drawn = drawn.astype(np.float16).astype(np.float32)
    if f"fix_at.{array}" in arrays:  # where a digit fell the other way
      drawn.ravel()[arrays.pop(f"fix_at.{array}")] = arrays.pop(f"fix_to.{array}")
    arrays[array] = drawn
  return arrays


def stride(size: int) -> int:
  """Every how manyeth element the files keep of an output or gradient; odd, so that it meets every row and channel."""
  return max(1, size // 4000) | 1 if size > 4000 else 1


def close(name: str, actual, arrays: dict[str, np.ndarray], relative: float) -> None:
  """Asserts |actual - expected| <= relative * the largest magnitude of all of expected, where the file has samples."""
  actual, expected = np.asarray(actual, np.float64).ravel(), arrays[name].ravel()
  actual = actual[:: stride(actual.size)]
  assert actual.shape == expected.shape, name
  difference, allowed = np.abs(actual - expected).max(), relative * float(arrays[f"max.{name}"])
  assert difference <= allowed, f"{name}: off by {difference:.2e}, allowed {allowed:.2e}"
