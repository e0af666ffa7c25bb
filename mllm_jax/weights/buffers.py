"""Host memory for large tensors: aligned buffers, copies that transpose quickly, and tensors cut into pieces."""

import itertools
import math
from collections.abc import Iterator

import numpy as np

ALIGNMENT = 64  # bytes; jax takes over a CPU buffer so aligned without copying it
TILE = 64  # elements along either side of a tile; 64 x 64 of two bytes are 8 KiB, which the first-level cache holds
PIECE_BYTES = 2**26  # what is read, transposed and cast at once

Index = tuple[slice, ...]


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
  """An uninitialised array whose memory begins at a multiple of ALIGNMENT."""
  size = math.prod(shape) * np.dtype(dtype).itemsize
  raw = np.empty(size + ALIGNMENT, np.uint8)
  start = -raw.ctypes.data % ALIGNMENT
  return raw[start : start + size].view(dtype).reshape(shape)


def copy(out: np.ndarray, view: np.ndarray) -> None:
  """out[...] = view, cast to out's type, tile by tile where the two run through memory along different axes.

  NumPy's own assignment then walks one of them in steps of a whole row, which misses the cache at every element: it is
  three times slower on a transposed matrix.
  """
  if out.shape != view.shape:
    raise ValueError(f"a tensor of shape {view.shape} cannot be copied into one of shape {out.shape}")
  long = [axis for axis in range(out.ndim) if out.shape[axis] > 1]
  if len(long) < 2 or out.size <= TILE * TILE:
    out[...] = view
    return
  from_axis = min(long, key=lambda axis: abs(view.strides[axis]))
  to_axis = min(long, key=lambda axis: abs(out.strides[axis]))
  if from_axis == to_axis:
    out[...] = view
    return
  rest = [range(out.shape[axis]) for axis in range(out.ndim) if axis not in (from_axis, to_axis)]
  for place in itertools.product(*rest):
    at = list(place)
    index = [slice(None) if axis in (from_axis, to_axis) else at.pop(0) for axis in range(out.ndim)]
    target, source = out[tuple(index)], view[tuple(index)]
    for i in range(0, target.shape[0], TILE):
      for j in range(0, target.shape[1], TILE):
        target[i : i + TILE, j : j + TILE] = source[i : i + TILE, j : j + TILE]


def pieces(index: Index, itemsize: int, limit: int = PIECE_BYTES) -> Iterator[Index]:
  """Cuts `index`, one slice of step 1 an axis, into indices of at most `limit` bytes each (or one element), in the
  order of memory: every piece is contiguous in an array that has exactly the elements of `index`."""
  lengths = [part.stop - part.start for part in index]
  if not index or math.prod(lengths) * itemsize <= limit:
    yield index
    return
  axis = next(axis for axis, length in enumerate(lengths) if length > 1)
  step = max(1, limit // (math.prod(lengths[axis + 1 :]) * itemsize))
  part = index[axis]
  for start in range(part.start, part.stop, step):
    cut = (*index[:axis], slice(start, min(part.stop, start + step)), *index[axis + 1 :])
    yield from pieces(cut, itemsize, limit)


def whole(shape: tuple[int, ...]) -> Index:
  """The index of all of an array."""
  return tuple(slice(0, length) for length in shape)


def within(index: Index, base: Index) -> Index:
  """`index` counted from where `base` begins."""
  return tuple(slice(part.start - zero.start, part.stop - zero.start) for part, zero in zip(index, base, strict=True))
