"""Reading by a table, in both directions: a checkpoint's tensors by our paths, and ours by a checkpoint's names.

All that does not fit is collected and reported at once, since a checkpoint of the wrong variant seldom has one fault
only.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax.weights import buffers
from mllm_jax.weights.buffers import Index
from mllm_jax.weights.io import Weights
from mllm_jax.weights.known import WeightsError
from mllm_jax.weights.tables import PatchKernel, Row, Table, Transform
from mllm_jax.weights.tensors import InMemory, Tensors, is_float

READ_BYTES = 2**27  # of a file, between two releases of its pages
ORDINALS = ("first", "second", "third")
LISTED = 12  # problems of one kind that an error spells out


@dataclasses.dataclass(frozen=True)
class Source:
  """Where one of our arrays comes from: the foreign names by layer, a single one for arrays that are not stacked."""

  row: Row
  names: dict[int, str]


class Ours:
  """A checkpoint's tensors by our paths, in our layout and the type they are stored in.

  Args:
    weights: the checkpoint. What its table ignores is never read.
    table: of the checkpoint's family.
    shapes: {path: shape} of what is wanted.

  Raises WeightsError that lists every path without a tensor, every tensor without a path, and every tensor whose shape
  or type does not fit.
  """

  def __init__(self, weights: Weights, table: Table, shapes: Mapping[str, tuple[int, ...]]):
    self.weights = weights
    self.shapes = {path: tuple(shape) for path, shape in shapes.items()}
    self.sources, problems = match(weights, table, self.shapes)
    for path, source in self.sources.items():
      problems += misfits(weights, path, source, self.shapes[path])
    if problems:
      raise WeightsError(report(weights, problems))

  def names(self) -> list[str]:
    return list(self.shapes)

  def shape(self, path: str) -> tuple[int, ...]:
    return self.shapes[path]

  def dtype(self, path: str) -> np.dtype:
    return functools.reduce(jnp.promote_types, {self.weights.dtype(name) for name in self.sources[path].names.values()})

  def read(self, path: str, index: Index = ()) -> np.ndarray:
    source = self.sources[path]
    index = index or buffers.whole(self.shapes[path])
    out = buffers.empty(tuple(part.stop - part.start for part in index), self.dtype(path))
    if not source.row.stacked:
      self._fill(out, source.names[0], source.row, index)
      return out
    for place, layer in enumerate(range(index[0].start, index[0].stop)):
      self._fill(out[place], source.names[layer], source.row, index[1:])
    return out

  def _fill(self, out: np.ndarray, name: str, row: Row, index: Index) -> None:
    """Copies a part of one tensor, giving back what was read of the file as it goes: a part that is small may be spread
    over all of a large tensor."""
    shape, transform, source = self.weights.shape(name), row.transform, row.source(self.weights)
    if not shape:
      out[...] = self.weights.read(name)
      return
    span = math.prod(shape[1:]) * self.weights.dtype(name).itemsize
    for cut in cuts(index, transform.outer, span):
      buffers.copy(out[buffers.within(cut, index)], transform.read(source, name, cut))
      self.weights.release(name)

  def release(self, path: str) -> None:
    pass  # read copies, and has released what it read


class Theirs:
  """Our tensors by a checkpoint's names, in its layout; the inverse of `Ours`.

  Raises WeightsError for a tensor that the table has no name for, and for a row without a tensor.
  """

  def __init__(self, ours: Tensors, table: Table):
    self.ours = ours
    rows = {row.ours: row for row in table.rows}
    nameless, absent = sorted(set(ours.names()) - set(rows)), sorted(set(rows) - set(ours.names()))
    if nameless or absent:
      raise WeightsError(
        f"cannot export: no name for {nameless}, no array for {absent}; the table and the model must be of the "
        "same configuration"
      )
    # By name the rows that fill the tensor, one part after another, and the place in their stacks.
    self.entries: dict[str, tuple[list[Row], Index]] = {}
    layers = max((ours.shape(path)[0] for path, row in rows.items() if row.stacked), default=0)
    for layer in range(layers):  # a layer's tensors side by side, as other tools write them
      for row in table.rows:
        if row.stacked and layer < ours.shape(row.ours)[0]:
          place = [], (slice(layer, layer + 1),)
          self.entries.setdefault(table.prefix + row.name(layer), place)[0].append(row)
    for row in table.rows:
      if not row.stacked:
        self.entries.setdefault(table.prefix + row.foreign, ([], ()))[0].append(row)

  def names(self) -> list[str]:
    return list(self.entries)

  def shape(self, name: str) -> tuple[int, ...]:
    rows, layer = self.entries[name]
    shape = rows[0].transform.foreign_shape(self.ours.shape(rows[0].ours)[len(layer) :])
    return (len(rows) * shape[0], *shape[1:]) if len(rows) > 1 else shape

  def dtype(self, name: str) -> np.dtype:
    return functools.reduce(jnp.promote_types, {self.ours.dtype(row.ours) for row in self.entries[name][0]})

  def read(self, name: str, index: Index = ()) -> np.ndarray:
    rows, layer = self.entries[name]
    index = index or buffers.whole(self.shape(name))
    out = buffers.empty(tuple(part.stop - part.start for part in index), self.dtype(name))
    if len(rows) == 1:
      self._fill(out, rows[0], layer, index)
      return out
    length = self.shape(name)[0] // len(rows)
    first = index[0]
    for number, row in enumerate(sorted(rows, key=lambda row: row.part)):
      start, stop = (min(max(end - number * length, 0), length) for end in (first.start, first.stop))
      place = number * length - first.start
      if start < stop:
        self._fill(out[place + start : place + stop], row, layer, (slice(start, stop), *index[1:]))
    return out

  def _fill(self, out: np.ndarray, row: Row, layer: Index, index: Index) -> None:
    if not index:
      out[...] = row.transform.read_foreign(self.ours, row.ours, layer, index)
      return
    span = math.prod(self.ours.shape(row.ours)[len(layer) + 1 :]) * out.itemsize
    for cut in cuts(index, row.transform.foreign_outer, span):
      buffers.copy(out[buffers.within(cut, index)], row.transform.read_foreign(self.ours, row.ours, layer, cut))
      self.ours.release(row.ours)

  def release(self, name: str) -> None:
    pass  # read copies, and has released what it read


def cuts(index: Index, axis: int, span: int) -> Iterator[Index]:
  """`index` in pieces along an axis, each read from no more than READ_BYTES of a file in which one step along that axis
  spans `span` bytes."""
  step = max(1, READ_BYTES // max(1, span))
  for start in range(index[axis].start, index[axis].stop, step):
    yield (*index[:axis], slice(start, min(index[axis].stop, start + step)), *index[axis + 1 :])


def load(weights: Weights, table: Table, targets: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
  """The arrays `targets` describes, by path, read from a checkpoint by its table: `Ours`, then `place`."""
  return place(Ours(weights, table, {path: target.shape for path, target in targets.items()}), targets)


def export(arrays: Mapping[str, np.ndarray], table: Table) -> dict[str, np.ndarray]:
  """The way back, in memory: host arrays by path -> foreign tensors by name, in the arrays' own type."""
  theirs = Theirs(InMemory({path: np.asarray(array) for path, array in arrays.items()}), table)
  return {name: theirs.read(name) for name in theirs.names()}


def place(
  tensors: Tensors, targets: Mapping[str, jax.ShapeDtypeStruct], progress: Callable[[int], None] | None = None
) -> dict[str, jax.Array]:
  """Tensors as arrays with their targets' shardings (None: the first device) and types.

  For each device of this process the slice it holds is read and cast, piece by piece, so the host never holds more
  than one array's slices. On a CPU those are the array: nothing is copied. `progress` is given the bytes of each array
  as it is done. Raises WeightsError where a shape is not its target's.
  """
  arrays = {}
  for path, target in targets.items():
    if tensors.shape(path) != tuple(target.shape):
      raise WeightsError(f"{path} is {tensors.shape(path)}, and the model needs {tuple(target.shape)}")
    sharding = target.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    slices: dict[tuple, np.ndarray] = {}  # devices that hold the same slice share one reading of it

    def read(index: Index) -> np.ndarray:
      spans = tuple(part.indices(length)[:2] for part, length in zip(index, target.shape))
      if spans not in slices:
        slices[spans] = read_slice(tensors, path, tuple(slice(*span) for span in spans), target.dtype)
      return slices[spans]

    arrays[path] = jax.make_array_from_callback(target.shape, sharding, read)
    tensors.release(path)
    if progress is not None:
      progress(arrays[path].nbytes)
  return arrays


def read_slice(tensors: Tensors, path: str, index: Index, dtype: np.dtype) -> np.ndarray:
  """The part `index` of a tensor in another type, in memory that jax can take over."""
  out = buffers.empty(tuple(part.stop - part.start for part in index), dtype)
  for piece in buffers.pieces(index, tensors.dtype(path).itemsize):
    out[buffers.within(piece, index)] = tensors.read(path, piece)
  return out


def match(weights: Weights, table: Table, shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, Source], list[str]]:
  """The source of every path that has one, and what is missing, unexpected or there twice, as sentences."""
  sources: dict[str, Source] = {}
  problems = []
  for name in weights.names():
    renamed = table.rename(name)
    if any(re.fullmatch(pattern, renamed) for pattern, _ in table.ignored):
      continue
    found = [(row, layer) for row in table.rows if (layer := row.match(renamed)) is not None]
    found = [(row, layer) for row, layer in found if row.ours in shapes]
    if not found or any(row.stacked and layer >= shapes[row.ours][0] for row, layer in found):
      problems.append(f"unexpected: {name} {weights.shape(name)}" + hint(table, renamed))
      continue
    for row, layer in found:
      names = sources.setdefault(row.ours, Source(row, {})).names
      if layer in names:
        problems.append(f"twice: {names[layer]} and {name} both stand for {row.ours}")
      names[layer] = name
  lacking = [(path, problem) for path, shape in shapes.items() if (problem := absence(table, path, shape, sources))]
  for path, problem in lacking:
    sources.pop(path, None)
    problems.append(problem)
  return sources, problems


def absence(table: Table, path: str, shape: tuple[int, ...], sources: Mapping[str, Source]) -> str:
  """What a path lacks, as a sentence; "" where it has all of its tensors."""
  row = next((row for row in table.rows if row.ours == path), None)
  if row is None:
    return f"missing: {path}, for which the table of this checkpoint's family has no name"
  found = sources[path].names if path in sources else {}
  absent = [layer for layer in range(shape[0] if row.stacked else 1) if layer not in found]
  if not absent:
    return ""
  name = table.prefix + row.name(absent[0])
  layers = f" and {len(absent) - 1} other layers of it" if len(absent) > 1 else ""
  return f"missing: {name}{layers}, for {path} {shape}" + hint(table, row.foreign)


def hint(table: Table, name: str) -> str:
  """What a missing or unexpected name tells, by the table; "" where nothing is known of it."""
  return "".join(f" ({text})" for pattern, text in table.hints if re.fullmatch(pattern, name))


def misfits(weights: Weights, path: str, source: Source, shape: tuple[int, ...]) -> list[str]:
  """What is wrong with the shapes and types of the tensors of one path; only the first of its layers is told."""
  row, wanted = source.row, shape[1:] if source.row.stacked else shape
  number, parts = row.part
  for name in source.names.values():
    stored = weights.shape(name)
    divided = parts == 1 or (stored and stored[0] % parts == 0)
    if not divided or row.transform.shape(row.source(weights).shape(name)) != wanted:
      turned = sorted(stored) == sorted(wanted)
      cause = "the same lengths in another order: it was saved transposed" if turned else row.hint
      share = f", the {ORDINALS[number]} of {parts} equal parts" if parts > 1 else ""
      needed = f"{path} needs {wanted} of it{describe(row.transform)}{share}"
      return [f"shape: {name} is {stored} in the file, and {needed}; {cause}"]
    if not is_float(weights.dtype(name)):
      return [
        f"type: {name} holds {weights.dtype(name)}; quantised checkpoints are not read, use the float16, bfloat16 or "
        "float32 one"
      ]
  return []


def describe(transform: Transform) -> str:
  """What a transform does, as the end of a sentence."""
  if isinstance(transform, PatchKernel):
    return " after flattening its patches"
  dropped = " and leaving out axes of length 1" if transform.rank > len(transform.axes) else ""
  return f" after transposing by {transform.axes}{dropped}" if transform.axes else ""


def report(weights: Weights, problems: list[str]) -> str:
  """All problems as one message; of each kind the first dozen are spelt out."""
  lines, counts = [], {}
  for problem in sorted(problems, key=lambda problem: problem.split(":")[0]):
    kind = problem.split(":")[0]
    counts[kind] = counts.get(kind, 0) + 1
    if counts[kind] <= LISTED:
      lines.append(f"  {problem}")
    elif counts[kind] == LISTED + 1:
      total = sum(other.startswith(kind + ":") for other in problems)
      lines.append(f"  {kind}: and {total - LISTED} more")
  return f"{weights.path} does not fit the model: {len(problems)} problems\n" + "\n".join(lines)
