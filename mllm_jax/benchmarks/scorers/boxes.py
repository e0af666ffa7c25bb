"""Boxes in text: reading them, undoing the padding to a square, and how well two of them match."""

import re
from collections.abc import Sequence

Box = tuple[float, float, float, float]  # left, top, right, bottom

NUMBER = r"\s*(-?\d*\.?\d+)\s*"
WRITTEN = re.compile(rf"\[{NUMBER},{NUMBER},{NUMBER},{NUMBER}\]")


def parse(answer: str) -> Box | None:
  """The first [left, top, right, bottom] in an answer, None where there is none."""
  found = WRITTEN.search(answer)
  return tuple(float(number) for number in found.groups()) if found else None


def in_pixels(box: Box, width: int, height: int, padded: bool) -> Box:
  """A box in fractions as pixels of a picture of this size.

  The fractions are of the picture, or, `padded`, of the square as long as its longer side in whose middle it lies
  (`data.images.pad_to_square`).
  """
  if not padded:
    return box[0] * width, box[1] * height, box[2] * width, box[3] * height
  side = max(width, height)
  left, top = (side - width) // 2, (side - height) // 2
  return box[0] * side - left, box[1] * side - top, box[2] * side - left, box[3] * side - top


def iou(a: Sequence[float], b: Sequence[float]) -> float:
  """Intersection over union, 0 to 1; 0 for a box whose edges are in the wrong order."""
  if not all(box[0] < box[2] and box[1] < box[3] for box in (a, b)):
    return 0.0
  width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
  common = max(width, 0) * max(height, 0)
  area = lambda box: (box[2] - box[0]) * (box[3] - box[1])
  return common / (area(a) + area(b) - common)
