"""Host memory for large tensors: aligned buffers, copies that transpose quickly, and tensors cut into pieces."""

import math
from collections.abc import Iterator

import numpy as np

ALIGNMENT = 64  # bytes; jax takes over a CPU buffer so aligned without copying it
TILE = 256  # elements along either side of a tile, which a cache holds
PADDING = 32  # elements at the end of a tile's rows, so that they do not lie a power of two apart
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
  several times slower on a transposed matrix. A tile is first copied as it lies: where a row is a power of two long,
  as it mostly is, all of a column's elements fall into the same few lines of the cache.
  """
  if out.shape != view.shape:
    raise ValueError(f"a tensor of shape {view.shape} cannot be copied into one of shape {out.shape}")
  out, view = joined(out, view)
  long = [axis for axis in range(out.ndim) if out.shape[axis] > 1]
  if len(long) < 2 or out.size <= TILE * TILE:
    out[...] = view
    return
  from_axis = min(long, key=lambda axis: abs(view.strides[axis]))
  to_axis = min(long, key=lambda axis: abs(out.strides[axis]))
  if from_axis == to_axis:
    out[...] = view
    return
  scratch = np.empty((TILE, TILE + PADDING), view.dtype)
  order = (*(axis for axis in range(out.ndim) if axis not in (from_axis, to_axis)), to_axis, from_axis)
  out, view = out.transpose(order), view.transpose(order)
  for place in np.ndindex(out.shape[:-2]):
    target, source = out[place], view[place]
    for i in range(0, target.shape[0], TILE):
      for j in range(0, target.shape[1], TILE):
        tile = source[i : i + TILE, j : j + TILE]
        part = scratch[: tile.shape[0], : tile.shape[1]]
        part[...] = tile
        target[i : i + TILE, j : j + TILE] = part


def joined(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Views of the same elements with fewer axes: neighbouring axes that both run through as one are made one."""
  shape, strides = [], ([], [])
  for length, *steps in zip(a.shape, a.strides, b.strides):
    if shape and all(known[-1] == length * step for known, step in zip(strides, steps)):
      shape[-1] *= length
      for known, step in zip(strides, steps):
        known[-1] = step
      continue
    shape.append(length)
    for known, step in zip(strides, steps):
      known.append(step)
  view = lambda x, steps: np.lib.stride_tricks.as_strided(x, shape, steps, writeable=x.flags.writeable)
  return view(a, strides[0]), view(b, strides[1])


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
