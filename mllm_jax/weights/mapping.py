"""From foreign names to our paths and back: tables, and what reads and writes by them.

A table has one row for each kind of tensor: its foreign name, our path, and the transform between the two. Paths are
those of the model's state joined by "/", such as `vision/layers/q_proj/kernel`. Our layers are stacked: the foreign
tensors of layer 0, 1, ... fill the places 0, 1, ... of the first axis of one array.

All that does not fit is collected and reported at once, since a checkpoint of the wrong variant seldom has one fault
only.
"""

import dataclasses
import math
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax.weights.io import Index, Weights, WeightsError

LAYER = "{layer}"
LISTED = 12  # problems of one kind that an error spells out


@dataclasses.dataclass(frozen=True)
class Permute:
  """Axis i of our array is axis `axes[i]` of the foreign one; without axes the two are the same."""

  axes: tuple[int, ...] = ()

  def shape(self, foreign: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape of our array for a foreign one, None where the number of axes is wrong."""
    if not self.axes:
      return foreign
    return tuple(foreign[axis] for axis in self.axes) if len(foreign) == len(self.axes) else None

  def read(self, weights: Weights, name: str, index: Index) -> np.ndarray:
    """The part `index` of our array, read from no more of the foreign one than it needs."""
    if not self.axes:
      return weights.read(name, index)
    foreign = [slice(None)] * len(self.axes)
    for axis, part in zip(self.axes, index):
      foreign[axis] = part
    return weights.read(name, tuple(foreign)).transpose(self.axes)

  def inverse(self, array: np.ndarray) -> np.ndarray:
    """The foreign array."""
    return array.transpose(np.argsort(self.axes)) if self.axes else array


@dataclasses.dataclass(frozen=True)
class PatchKernel:
  """The convolution (C, 3, p, p) that embeds patches, as the matrix [p * p * 3, C] that takes a patch's rows of pixels
  with their colours innermost.
  """

  def shape(self, foreign: tuple[int, ...]) -> tuple[int, ...] | None:
    return (math.prod(foreign[1:]), foreign[0]) if len(foreign) == 4 else None

  def read(self, weights: Weights, name: str, index: Index) -> np.ndarray:
    kernel = weights.read(name, (index[1], slice(None), slice(None), slice(None))).transpose(2, 3, 1, 0)
    return kernel.reshape(-1, kernel.shape[-1])[index[0]]

  def inverse(self, array: np.ndarray) -> np.ndarray:
    side = math.isqrt(array.shape[0] // 3)
    return array.reshape(side, side, 3, -1).transpose(3, 2, 0, 1)


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
  prefix: what `export` puts before every name.
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


@dataclasses.dataclass(frozen=True)
class Source:
  """Where one of our arrays comes from: the foreign names by layer, a single one for arrays that are not stacked."""

  row: Row
  names: dict[int, str]


def load(weights: Weights, table: Table, targets: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
  """The arrays `targets` describes, by path, read from a checkpoint.

  Every array is made directly with its target's sharding (None: the first device) and type: for each device the slice
  it holds is read, layer by layer, so the host never holds more than one array's slices. Ignored tensors are not read.

  Raises WeightsError that lists every target without a tensor, every tensor without a target, and every tensor whose
  shape or type does not fit.
  """
  sources, problems = match(weights, table, targets)
  problems += [problem for path, source in sources.items() for problem in misfits(weights, path, source, targets[path])]
  if problems:
    raise WeightsError(report(weights, problems))
  return {path: make(weights, sources[path], target) for path, target in targets.items()}


def match(
  weights: Weights, table: Table, targets: Mapping[str, jax.ShapeDtypeStruct]
) -> tuple[dict[str, Source], list[str]]:
  """The source of every target path that has one, and what is missing, unexpected or there twice, as sentences."""
  sources: dict[str, Source] = {}
  problems = []
  for name in weights.names():
    renamed = table.rename(name)
    if any(re.fullmatch(pattern, renamed) for pattern, _ in table.ignored):
      continue
    row, layer = next(((row, layer) for row in table.rows if (layer := row.match(renamed)) is not None), (None, 0))
    if row is None or row.ours not in targets or (row.stacked and layer >= targets[row.ours].shape[0]):
      problems.append(f"unexpected: {name} {weights.shape(name)}" + hint(table, renamed))
      continue
    names = sources.setdefault(row.ours, Source(row, {})).names
    if layer in names:
      problems.append(f"twice: {names[layer]} and {name} both stand for {row.ours}")
    names[layer] = name
  lacking = [(path, problem) for path, target in targets.items() if (problem := absence(table, path, target, sources))]
  for path, problem in lacking:
    sources.pop(path, None)
    problems.append(problem)
  return sources, problems


def absence(table: Table, path: str, target: jax.ShapeDtypeStruct, sources: Mapping[str, Source]) -> str:
  """What a target lacks, as a sentence; "" where it has all of its tensors."""
  row = next((row for row in table.rows if row.ours == path), None)
  if row is None:
    return f"missing: {path}, for which the table of this checkpoint's family has no name"
  found = sources[path].names if path in sources else {}
  absent = [layer for layer in range(target.shape[0] if row.stacked else 1) if layer not in found]
  if not absent:
    return ""
  name = table.prefix + row.foreign.replace(LAYER, str(absent[0]))
  layers = f" and {len(absent) - 1} other layers of it" if len(absent) > 1 else ""
  return f"missing: {name}{layers}, for {path} {target.shape}" + hint(table, row.foreign)


def hint(table: Table, name: str) -> str:
  """What a missing or unexpected name tells, by the table; "" where nothing is known of it."""
  return "".join(f" ({text})" for pattern, text in table.hints if re.fullmatch(pattern, name))


def misfits(weights: Weights, path: str, source: Source, target: jax.ShapeDtypeStruct) -> list[str]:
  """What is wrong with the shapes and types of the tensors of one target; only the first of its layers is told."""
  row, wanted = source.row, tuple(target.shape[1:] if source.row.stacked else target.shape)
  for name in source.names.values():
    stored = weights.shape(name)
    if row.transform.shape(stored) != wanted:
      turned = sorted(stored) == sorted(wanted)
      cause = "the same lengths in another order: it was saved transposed" if turned else row.hint
      needed = f"{path} needs {wanted} of it{describe(row.transform)}"
      return [f"shape: {name} is {stored} in the file, and {needed}; {cause}"]
    if not jnp.issubdtype(weights.dtype(name), jnp.floating):
      return [
        f"type: {name} holds {weights.dtype(name)}; quantised checkpoints are not read, use the float16, bfloat16 or "
        "float32 one"
      ]
  return []


def describe(transform: Transform) -> str:
  """What a transform does, as the end of a sentence."""
  if isinstance(transform, PatchKernel):
    return " after flattening its patches"
  return f" after transposing by {transform.axes}" if transform.axes else ""


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


def make(weights: Weights, source: Source, target: jax.ShapeDtypeStruct) -> jax.Array:
  """One array with its target's sharding."""
  sharding = target.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
  slices: dict[tuple, np.ndarray] = {}  # devices that hold the same slice share one reading of it

  def read(index: Index) -> np.ndarray:
    spans = tuple(part.indices(length)[:2] for part, length in zip(index, target.shape))
    if spans not in slices:
      slices[spans] = read_slice(weights, source, tuple(slice(*span) for span in spans), target.dtype)
    return slices[spans]

  return jax.make_array_from_callback(target.shape, sharding, read)


def read_slice(weights: Weights, source: Source, index: Index, dtype: np.dtype) -> np.ndarray:
  """The part `index` of one of our arrays, in the type it shall have."""
  out = np.empty([part.stop - part.start for part in index], dtype)
  transform = source.row.transform
  if not source.row.stacked:
    out[...] = transform.read(weights, source.names[0], index)
    return out
  for place, layer in enumerate(range(index[0].start, index[0].stop)):
    out[place] = transform.read(weights, source.names[layer], index[1:])
  return out


def export(arrays: Mapping[str, np.ndarray], table: Table) -> dict[str, np.ndarray]:
  """The way back: host arrays by path -> foreign tensors by name, in the arrays' own type and contiguous.

  Raises WeightsError for an array that the table has no name for, and for a row without an array.
  """
  rows = {row.ours: row for row in table.rows}
  nameless, absent = sorted(set(arrays) - set(rows)), sorted(set(rows) - set(arrays))
  if nameless or absent:
    raise WeightsError(
      f"cannot export: no name for {nameless}, no array for {absent}; the table and the model must be of the "
      "same configuration"
    )
  tensors = {}
  for path, row in rows.items():
    stack = np.asarray(arrays[path])
    for layer, array in enumerate(stack if row.stacked else [stack]):
      name = table.prefix + row.foreign.replace(LAYER, str(layer))
      tensors[name] = np.ascontiguousarray(row.transform.inverse(array))
  return tensors


def norm(foreign: str, ours: str) -> tuple[Row, ...]:
  """The rows of a layer norm: weight and bias."""
  return Row(f"{foreign}.weight", f"{ours}/scale"), Row(f"{foreign}.bias", f"{ours}/bias")


def linear(foreign: str, ours: str, bias: bool = True, hint: str = Row.hint) -> tuple[Row, ...]:
  """The rows of a linear layer: weight and, where it has one, bias."""
  kernel = Row(f"{foreign}.weight", f"{ours}/kernel", LINEAR, hint)
  return (kernel, Row(f"{foreign}.bias", f"{ours}/bias", hint=hint)) if bias else (kernel,)
