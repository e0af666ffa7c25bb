"""Enlarging: pictures that training brings to another size before they are cut into slices, as LLaVA-UHD does.

The released loader (github.com/thunlp/LLaVA-UHD, llava/train/train.py, in both stages) brings pictures of TextVQA to
1024 pixels along the longer side, and of the others one in ten to the area of six slices, if it would not have six.
There chance is drawn whenever a sample is loaded. Here the seed, the sample's place in its file and the picture's in
the sample decide, in every epoch alike: lengths are measured ahead, and what is loaded must have them. A picture is
TextVQA's by its path in the data, which tfds and shards of older versions do not have.
"""

import dataclasses
import hashlib
from collections.abc import Sequence

from mllm_jax.config import VisionConfig
from mllm_jax.data import slices
from mllm_jax.data.records import Sample

SLICES = 6
TEXTVQA, LONG_SIDE = ("TextVQA", "textvqa"), 1024


@dataclasses.dataclass(frozen=True)
class Enlarging:
  """Sizes for the pictures of training samples.

  max_slices: that a picture is cut into. share: of the pictures that are drawn, 0 to 1.
  """

  vision: VisionConfig
  max_slices: int
  share: float

  def sizes(self, sample: Sample, sizes: Sequence[tuple[int, int]], seed: int) -> list[tuple[int, int]]:
    """The (width, height) that each of a sample's pictures is brought to, from those that they have; a pure function
    of its arguments. Raises DataError for a size that cannot be cut."""
    names = sample.names or [""] * len(sizes)
    return [
      self._size(size, name, _drawn(self.share, seed, sample.index, number))
      for number, (size, name) in enumerate(zip(sizes, names, strict=True))
    ]

  def _size(self, size: tuple[int, int], name: str, drawn: bool) -> tuple[int, int]:
    if any(word in name for word in TEXTVQA):
      return slices.long_side(size, LONG_SIDE)
    if drawn:
      # The first stage, which takes the whole picture alone, asks alike.
      plan = slices.plan(*size, self.vision, max(self.max_slices, SLICES))
      if plan.columns * plan.rows != SLICES:
        return slices.to_area(size, SLICES * self.vision.image_size**2)
    return size


def _drawn(share: float, seed: int, index: int, number: int) -> bool:
  digest = hashlib.blake2b(f"{seed} {index} {number}".encode(), digest_size=8).digest()
  return int.from_bytes(digest, "little") < share * 2**64
