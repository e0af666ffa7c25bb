"""Tables from foreign names to our paths: one row for each kind of tensor, with the transform between the two.

Paths are those of the model's state joined by "/", such as `vision/layers/q_proj/kernel`. Our layers are stacked: the
foreign tensors of layer 0, 1, ... fill the places 0, 1, ... of the first axis of one array. `mapping` reads by a table,
in either direction.
"""

import dataclasses
import math
import re

import numpy as np

from mllm_jax.weights.buffers import Index
from mllm_jax.weights.tensors import Tensors

LAYER = "{layer}"


@dataclasses.dataclass(frozen=True)
class Permute:
  """Axis i of our array is axis `axes[i]` of the foreign one; without axes the two are the same."""

  axes: tuple[int, ...] = ()

  def shape(self, foreign: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape of our array for a foreign one, None where the number of axes is wrong."""
    if not self.axes:
      return foreign
    return tuple(foreign[axis] for axis in self.axes) if len(foreign) == len(self.axes) else None

  @property
  def outer(self) -> int:
    """The axis of our array along which the foreign one lies in one piece after another."""
    return self.axes.index(0) if self.axes else 0

  @property
  def foreign_outer(self) -> int:
    """The axis of the foreign array along which ours lies in one piece after another."""
    return self.axes[0] if self.axes else 0

  def foreign_shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
    """The other way round."""
    return tuple(ours[axis] for axis in self._back) if self.axes else ours

  def read(self, tensors: Tensors, name: str, index: Index) -> np.ndarray:
    """The part `index` of our array, read from no more of the foreign one than it needs."""
    if not self.axes:
      return tensors.read(name, index)
    return tensors.read(name, tuple(index[axis] for axis in self._back)).transpose(self.axes)

  def read_foreign(self, tensors: Tensors, name: str, layer: Index, index: Index) -> np.ndarray:
    """The part `index` of the foreign array, read from ours; `layer` selects the place in a stack, () without one."""
    if not self.axes:
      return _unstacked(tensors.read(name, layer + index), layer)
    ours = tensors.read(name, layer + tuple(index[axis] for axis in self.axes))
    return _unstacked(ours, layer).transpose(self._back)

  @property
  def _back(self) -> tuple[int, ...]:
    return tuple(self.axes.index(axis) for axis in range(len(self.axes)))


@dataclasses.dataclass(frozen=True)
class PatchKernel:
  """The convolution (C, 3, p, p) that embeds patches, as the matrix [p * p * 3, C] that takes a patch's rows of pixels
  with their colours innermost.
  """

  outer, foreign_outer = 1, 0

  def shape(self, foreign: tuple[int, ...]) -> tuple[int, ...] | None:
    return (math.prod(foreign[1:]), foreign[0]) if len(foreign) == 4 else None

  def foreign_shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
    side = math.isqrt(ours[0] // 3)
    return (ours[1], 3, side, side)

  def read(self, tensors: Tensors, name: str, index: Index) -> np.ndarray:
    whole = tuple(slice(0, length) for length in tensors.shape(name)[1:])
    kernel = tensors.read(name, (index[1], *whole)).transpose(2, 3, 1, 0)
    return kernel.reshape(-1, kernel.shape[-1])[index[0]]

  def read_foreign(self, tensors: Tensors, name: str, layer: Index, index: Index) -> np.ndarray:
    rows = tensors.shape(name)[-2]
    side = math.isqrt(rows // 3)
    kernel = _unstacked(tensors.read(name, (*layer, slice(0, rows), index[0])), layer)
    return kernel.reshape(side, side, 3, -1).transpose(3, 2, 0, 1)[(slice(None), *index[1:])]


def _unstacked(array: np.ndarray, layer: Index) -> np.ndarray:
  return array[0] if layer else array


Transform = Permute | PatchKernel
SAME = Permute()
LINEAR = Permute((1, 0))  # (out, in) -> [in, out]
CONV = Permute((2, 3, 1, 0))  # (out, in, rows, columns) -> [rows, columns, in, out]
PATCHES = PatchKernel()


@dataclasses.dataclass(frozen=True)
class Row:
  """One kind of tensor. `foreign` is its literal name, with {layer} where the layer's number stands; `hint` is said
  where the shapes differ: what usually causes it.
  """

  foreign: str
  ours: str
  transform: Transform = SAME
  hint: str = "the checkpoint is of another width; compare its config.json with the model's configuration"

  @property
  def stacked(self) -> bool:
    return LAYER in self.foreign

  def match(self, name: str) -> int | None:
    """The layer number of a name of this row, 0 for rows without layers; None for other names."""
    found = re.fullmatch(re.escape(self.foreign).replace(re.escape(LAYER), r"(0|[1-9][0-9]*)"), name)
    return None if found is None else int(found[1]) if self.stacked else 0


@dataclasses.dataclass(frozen=True)
class Table:
  """How the weights of one family are named.

  renames: (regular expression, replacement), applied to each foreign name in turn before the rows: prefixes that some
  files have.
  ignored: (regular expression of a whole renamed name, why it is of no use here).
  hints: (regular expression of a whole renamed name, what an unexpected tensor of that name, or a missing one, tells).
  prefix: what stands before every name that is written.
  """

  rows: tuple[Row, ...]
  ignored: tuple[tuple[str, str], ...] = ()
  renames: tuple[tuple[str, str], ...] = ()
  hints: tuple[tuple[str, str], ...] = ()
  prefix: str = ""

  def rename(self, name: str) -> str:
    for pattern, replacement in self.renames:
      name = re.sub(pattern, replacement, name)
    return name


def norm(foreign: str, ours: str) -> tuple[Row, ...]:
  """The rows of a layer norm: weight and bias."""
  return Row(f"{foreign}.weight", f"{ours}/scale"), Row(f"{foreign}.bias", f"{ours}/bias")


def linear(foreign: str, ours: str, bias: bool = True, hint: str = Row.hint) -> tuple[Row, ...]:
  """The rows of a linear layer: weight and, where it has one, bias."""
  kernel = Row(f"{foreign}.weight", f"{ours}/kernel", LINEAR, hint)
  return (kernel, Row(f"{foreign}.bias", f"{ours}/bias", hint=hint)) if bias else (kernel,)
