"""A tensor as it lies in a file, whatever the format: where, in which type, with which strides."""

import math
from typing import NamedTuple

import numpy as np

from mllm_jax.places import Bytes
from mllm_jax.weights.buffers import Index

AXES = 64  # numpy's and torch's limit


class Stored(NamedTuple):
  """One tensor of a file, checked to lie inside it. `start` and `strides` count bytes."""

  dtype: np.dtype
  shape: tuple[int, ...]
  strides: tuple[int, ...]
  start: int

  @property
  def stop(self) -> int:
    """One past its last byte."""
    if 0 in self.shape:
      return self.start
    return self.start + self.dtype.itemsize + sum((n - 1) * s for n, s in zip(self.shape, self.strides))

  def read(self, source: Bytes, index: Index) -> np.ndarray:
    """The part that `index` selects, () for all: a read-only view.

    Of a remote file the range is fetched that its slice along the outermost axis spans. Slices along other axes are cut
    out of that range, so devices that split the inner axes share one fetch.
    """
    index = index or (slice(None),) * len(self.shape)
    lengths = [len(range(*part.indices(n))) for part, n in zip(index, self.shape)]
    if 0 in lengths:
      return np.empty(lengths, self.dtype)
    start, shape, index = self.start, list(self.shape), list(index)
    if shape:
      outer = max(range(len(shape)), key=lambda axis: self.strides[axis] * (shape[axis] > 1))
      start += index[outer].indices(shape[outer])[0] * self.strides[outer]
      shape[outer], index[outer] = lengths[outer], slice(None)
    part = Stored(self.dtype, tuple(shape), self.strides, start)
    return np.ndarray(shape, self.dtype, source.view(start, part.stop), 0, self.strides)[tuple(index)]


def contiguous(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
  """The strides in bytes of a tensor whose last axis is innermost."""
  strides = []
  for length in reversed(shape):
    strides.append(itemsize)
    itemsize *= max(length, 1)
  return tuple(reversed(strides))


def is_shape(value) -> bool:
  """Whether a foreign value is a list or tuple of lengths that numpy can hold, whatever their product with a type of at
  most 8 bytes. bool is no int here.
  """
  if not isinstance(value, list | tuple) or len(value) > AXES or not all(type(n) is int and n >= 0 for n in value):
    return False
  return math.prod(max(n, 1) for n in value) < 2**60
