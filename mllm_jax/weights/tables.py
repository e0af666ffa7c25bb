"""Tables from foreign names to our paths: one row for each kind of tensor, with the transform between the two.

Paths are those of the model's state joined by "/", such as `vision/layers/q_proj/kernel`. Our layers are stacked: the
foreign tensors of layer 0, 1, ... fill the places 0, 1, ... of the first axis of one array. `mapping` reads by a table,
in either direction.
"""

import dataclasses
import math
import re

import numpy as np

from mllm_jax.weights.buffers import Index, whole
from mllm_jax.weights.tensors import Tensors, View

LAYER = "{layer}"


@dataclasses.dataclass(frozen=True)
class Permute:
  """Axis i of our array is axis `axes[i]` of the foreign one; without axes the two are the same.

  rank: how many axes the foreign array has, 0 for as many as ours. Those that are not among `axes` have length 1.
  """

  axes: tuple[int, ...] = ()
  rank: int = 0

  def shape(self, foreign: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape of our array for a foreign one, None where the number of axes is wrong."""
    if not self.axes:
      return foreign
    if len(foreign) != self._rank or any(foreign[axis] != 1 for axis in self._dropped):
      return None
    return tuple(foreign[axis] for axis in self.axes)

  @property
  def outer(self) -> int:
    """The axis of our array along which the foreign one lies in one piece after another."""
    return self.axes.index(min(self.axes)) if self.axes else 0

  @property
  def foreign_outer(self) -> int:
    """The axis of the foreign array along which ours lies in one piece after another."""
    return self.axes[0] if self.axes else 0

  def foreign_shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
    """The other way round."""
    return tuple(ours[self.axes.index(axis)] if axis in self.axes else 1 for axis in self._all) if self.axes else ours

  def read(self, tensors: Tensors, name: str, index: Index) -> np.ndarray:
    """The part `index` of our array, read from no more of the foreign one than it needs."""
    if not self.axes:
      return tensors.read(name, index)
    foreign = tuple(index[self.axes.index(axis)] if axis in self.axes else slice(0, 1) for axis in self._all)
    kept = tensors.read(name, foreign).squeeze(self._dropped)
    return kept.transpose(tuple(sorted(self.axes).index(axis) for axis in self.axes))

  def read_foreign(self, tensors: Tensors, name: str, layer: Index, index: Index) -> np.ndarray:
    """The part `index` of the foreign array, read from ours; `layer` selects the place in a stack, () without one."""
    if not self.axes:
      return _unstacked(tensors.read(name, layer + index), layer)
    ours = _unstacked(tensors.read(name, layer + tuple(index[axis] for axis in self.axes)), layer)
    return np.expand_dims(ours.transpose(tuple(map(self.axes.index, sorted(self.axes)))), self._dropped)

  @property
  def _rank(self) -> int:
    return self.rank or len(self.axes)

  @property
  def _all(self) -> range:
    return range(self._rank)

  @property
  def _dropped(self) -> tuple[int, ...]:
    return tuple(axis for axis in self._all if axis not in self.axes)


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
    kernel = tensors.read(name, (index[1], *whole(tensors.shape(name)[1:]))).transpose(2, 3, 1, 0)
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
CONV_1X1 = Permute((1, 0), rank=4)  # (out, in, 1, 1) -> [in, out]
LAST = Permute((2,), rank=3)  # (1, 1, width) -> [width]
PATCHES = PatchKernel()


@dataclasses.dataclass(frozen=True)
class Row:
  """One kind of tensor.

  foreign: its literal name, with {layer} where the layer's number stands.
  hint: is said where the shapes differ: what usually causes it.
  places: what stands for {layer} in the name of each layer, where it is not 0, 1, 2, ...
  part: (i, n), where ours is the i-th of n equal parts of the foreign tensor's first axis. The rows of the other parts
    have the same foreign name.
  """

  foreign: str
  ours: str
  transform: Transform = SAME
  hint: str = "the checkpoint is of another width; compare its config.json with the model's configuration"
  places: tuple[str, ...] = ()
  part: tuple[int, int] = (0, 1)

  @property
  def stacked(self) -> bool:
    return LAYER in self.foreign

  def name(self, layer: int) -> str:
    """The name of a layer's tensor."""
    return self.foreign.replace(LAYER, self.places[layer] if self.places else str(layer))

  def match(self, name: str) -> int | None:
    """The layer number of a name of this row, 0 for rows without layers; None for other names."""
    numbers = "|".join(map(re.escape, self.places)) if self.places else "0|[1-9][0-9]*"
    found = re.fullmatch(re.escape(self.foreign).replace(re.escape(LAYER), f"({numbers})"), name)
    if found is None or not self.stacked:
      return None if found is None else 0
    return self.places.index(found[1]) if self.places else int(found[1])

  def source(self, tensors: Tensors) -> Tensors:
    """The foreign tensors as this row's transform shall see them: its part of each."""
    return tensors if self.part == (0, 1) else Part(tensors, *self.part)


class Part(View):
  """Of each tensor the i-th of n equal parts of its first axis, which n must divide."""

  def __init__(self, source: Tensors, number: int, parts: int):
    super().__init__(source)
    self.number, self.parts = number, parts

  def shape(self, name: str) -> tuple[int, ...]:
    first, *others = self.source.shape(name)
    return first // self.parts, *others

  def read(self, name: str, index: Index = ()) -> np.ndarray:
    first, *others = index or whole(self.shape(name))
    start = self.number * self.shape(name)[0]
    return self.source.read(name, (slice(first.start + start, first.stop + start), *others))


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


def linear(
  foreign: str, ours: str, bias: bool = True, hint: str = Row.hint, transform: Transform = LINEAR
) -> tuple[Row, ...]:
  """The rows of a linear layer: weight and, where it has one, bias."""
  kernel = Row(f"{foreign}.weight", f"{ours}/kernel", transform, hint)
  return (kernel, Row(f"{foreign}.bias", f"{ours}/bias", hint=hint)) if bias else (kernel,)
