"""What a compiled program does, read from its HLO text: products, bytes to and from memory, collectives.

XLA's own cost analysis counts the body of a loop once. Here it counts as often as the loop runs.
"""

import dataclasses
import math
import re
from collections import Counter

import numpy as np

BYTES = {"pred": 1, "f64": 8, "s64": 8, "u64": 8, "c64": 8, "s4": 0.5, "u4": 0.5, "token": 0}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
NO_BYTES = (
  "parameter constant tuple get-tuple-element bitcast while conditional call after-all iota partition-id replica-id "
  "copy-done slice-done send recv"
).split()
SHAPE = re.compile(r"(\w+)\[([\d,]*)\](\{[^{}]*\})?")
# The operation follows the type: an array's, or a tuple's in parentheses.
INSTRUCTION = re.compile(r"\s*(ROOT )?%?([\w.\-]+) = (.*)")
# Kernels of splash attention by a part of their name: how many products of the size queries x keys they compute.
SPLASH_PRODUCTS = {"_fwd_": 2, "_dq_": 3, "_dkv_": 4}
ON_CHIP = re.compile(r"S\([1-9]")  # memory spaces other than the large one


@dataclasses.dataclass(frozen=True)
class Instruction:
  name: str
  type: str
  op: str
  operands: tuple[str, ...]
  rest: str

  def called(self, key: str) -> list[str]:
    """The computations named by an attribute such as `calls`."""
    found = re.search(rf"\b{key}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.rest)
    return re.findall(r"[\w.\-]+", found[1]) if found else []


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective of a program. bytes: what a chip holds of it, whole. group: how many chips take part. crosses:
  whether they are of several slices, a chip each. times: how often it runs."""

  kind: str
  bytes: float
  group: int
  crosses: bool
  times: int

  @property
  def sent(self) -> float:
    """Bytes that each chip sends for it each time, on a ring."""
    share = (self.group - 1) / self.group
    return self.bytes * (1.0 if self.kind == "collective-permute" else share * (2 if self.kind == "all-reduce" else 1))


@dataclasses.dataclass(frozen=True)
class Cost:
  """Of one chip. flops: of matrix products. bytes: between the chip and its memory, fusions taken as one operation.
  custom: kernels whose products are not counted, {name: times}."""

  flops: float
  bytes: float
  collectives: tuple[Collective, ...]
  custom: dict[str, int]


def read(text: str) -> Cost:
  """The cost of a program, which is the same for all chips."""
  return _Program(text).cost()


class _Program:
  def __init__(self, text: str):
    self.computations, self.entry = parse(text)
    self.done: dict[str, Counter] = {}

  def cost(self) -> Cost:
    total = self.count(self.entry, fused=False)
    flops, size = total.pop("flops", 0.0), total.pop("bytes", 0.0)
    merged: Counter = Counter()
    for key, times in total.items():
      if isinstance(key, tuple):
        merged[key] += times
    collectives = tuple(Collective(*key, times) for key, times in merged.items())
    custom = {key: times for key, times in total.items() if isinstance(key, str)}
    return Cost(flops, size, tuple(sorted(collectives, key=lambda c: -c.sent * c.times)), custom)

  def count(self, name: str, fused: bool) -> Counter:
    """{"flops", "bytes", (collective), custom kernel: how much} of a computation; bytes only outside of fusions."""
    key = f"{name} {fused}"
    if key not in self.done:
      total: Counter = Counter()
      for instruction in self.computations.get(name, {}).values():
        self.add(total, instruction, name, fused)
      self.done[key] = total
    return self.done[key]

  def add(self, total: Counter, x: Instruction, name: str, fused: bool) -> None:
    types = lambda: [self.type(name, operand) for operand in x.operands]
    kind = x.op.removesuffix("-start")
    if x.op == "dot":
      total["flops"] += dot_flops(x, types())
    elif x.op == "convolution":
      total["flops"] += convolution_flops(x, types())
    elif kind in COLLECTIVES:
      self.add_collective(total, kind, x, name)
    elif x.op == "send":
      self.add_between_slices(total, x)
    elif x.op == "while":
      trips = self.trips(x, name)
      for key, value in (self.count(x.called("body")[0], False)).items():
        total[key] += value * trips
    elif x.op == "conditional":
      branches = x.called("branch_computations") or x.called("true_computation") + x.called("false_computation")
      total.update(max((self.count(branch, fused) for branch in branches), key=lambda c: (c["flops"], c["bytes"])))
    elif x.op in ("call", "async-start", "fusion"):
      inside = (x.called("calls") or x.called("to_apply"))[:1]
      for each in inside:
        total.update(self.count(each, fused or x.op == "fusion"))
    elif x.op == "custom-call":
      self.add_custom(total, x)
    if not fused and x.op not in NO_BYTES and not x.op.endswith("-done"):
      total["bytes"] += self.bytes(x, name)

  def add_collective(self, total: Counter, kind: str, x: Instruction, name: str) -> None:
    # A collective that runs beside other work stands in several fusions; the one that starts it counts.
    starts = any("AsyncCollectiveStart" in other.rest for other in self.computations[name].values())
    if "chain_id" in x.rest and not starts:
      return
    shapes = [size for size, _ in sizes(x.type) if size > 4]  # numbers are the hardware's
    if x.op.endswith("-start") and kind != "all-reduce":  # its type holds operands and results
      shapes = shapes[len(shapes) // 2 :]
    count = group_size(x.rest)
    total[kind, sum(shapes) * (count if kind == "reduce-scatter" else 1), count, False] += 1

  def add_between_slices(self, total: Counter, x: Instruction) -> None:
    """Between slices a collective is handed to the hosts: this part of it is one chip's, of so many slices."""
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', x.rest)
    target = re.search(r'_xla_megascale_target="\{([\d,:]+)\}', x.rest)
    if kind and target:
      ranges = [[int(n) for n in part.split(":")] for part in target[1].split(",")]
      count = sum(part[-1] - part[0] + 1 for part in ranges)
      total[kind[1].lower().replace("_", "-"), sizes(x.type)[0][0], count, True] += 1

  def add_custom(self, total: Counter, x: Instruction) -> None:
    if 'custom_call_target="tpu_custom_call"' in x.rest:
      products = [count for part, count in SPLASH_PRODUCTS.items() if x.name.startswith("splash_") and part in x.name]
      if products:
        # With a fifth product "dkv" gives the queries' gradient too: [B, blocks of keys, H, S, N], not added up yet.
        fused = any(shape.count(",") == 4 for _, shape, _ in SHAPE.findall(x.type))
        total["flops"] += (products[0] + fused) * splash_product_flops(x)
      else:
        total[re.sub(r"[.\d]+$", "", x.name)] += 1

  def trips(self, x: Instruction, name: str) -> int:
    """How often a loop's body runs: as the compiler says, or from the counter's start, step and end."""
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', x.rest)
    if known:
      return int(known[1])
    condition, body = (self.computations[x.called(part)[0]] for part in ("condition", "body"))
    compared = [y for y in condition.values() if y.op in ("compare", "fusion") and y.type.startswith("pred[]")]
    counters = [condition[o] for y in compared for o in y.operands if condition[o].op == "get-tuple-element"]
    if not counters:
      return 1
    place = int(re.search(r"index=(\d+)", counters[0].rest)[1])
    constants = lambda inside: [
      int(y.operands[0]) for y in inside.values() if y.op == "constant" and is_counter(y.type)
    ]
    inner = [constants(self.computations[c]) for y in compared for c in y.called("calls")]
    end = max(constants(condition) + sum(inner, []), default=1)
    root = list(body.values())[-1]
    step = self.increment(body, root.operands[place]) if root.op == "tuple" else 1
    initial = self.computations[name].get(x.operands[0])
    start = self.constant(name, initial.operands[place]) if initial and initial.op == "tuple" else 0
    return max(1, -(-(end - start) // max(step, 1)))

  def increment(self, body: dict[str, Instruction], name: str) -> int:
    """By how much one turn raises a counter: the constants on the way from it."""
    y = body[name]
    if y.op == "fusion":
      inside = self.computations[y.called("calls")[0]]
      return self.increment(inside, list(inside)[-1])
    if y.op not in ("add", "copy"):
      return int(y.operands[0]) if y.op == "constant" else 0
    return sum(self.increment(body, operand) for operand in y.operands)

  def constant(self, name: str, operand: str) -> int:
    y = self.computations[name].get(operand)
    while y is not None and y.op == "copy":
      y = self.computations[name].get(y.operands[0])
    return int(y.operands[0]) if y is not None and y.op == "constant" else 0

  def type(self, computation: str, name: str) -> str:
    found = self.computations[computation].get(name)
    return found.type if found else ""

  def bytes(self, x: Instruction, name: str) -> float:
    """Read and written by one operation. Of an array that a fusion only takes slices of, these; where it only replaces
    a slice, that."""
    large = lambda text: sum(size for size, on_chip in sizes(text) if not on_chip)
    operands = [large(self.type(name, operand)) for operand in x.operands]
    if x.op == "dynamic-update-slice":
      return 2 * operands[1]
    if x.op in ("dynamic-slice", "slice", "gather"):
      return 2 * large(x.type)
    written = large(x.type)
    if x.op == "fusion":
      inside = self.computations.get((x.called("calls") or [""])[0], {})
      parameters = {y.name: int(y.operands[0]) for y in inside.values() if y.op == "parameter"}
      users: dict[str, list[Instruction]] = {}
      for y in inside.values():
        for operand in y.operands:
          users.setdefault(operand, []).append(y)
      for parameter, index in parameters.items():
        uses = users.get(parameter, [])
        if index < len(operands) and uses and all(partial(y, parameter) for y in uses):
          whole = self.type_size(inside, parameter)
          taken = sum(self.slice_size(inside, y) for y in uses)
          operands[index] = min(operands[index], taken)
          if any(y.op == "dynamic-update-slice" for y in uses) and written >= whole:
            written -= whole - taken
    return sum(operands) + written

  def type_size(self, inside: dict[str, Instruction], name: str) -> float:
    return sum(size for size, _ in sizes(inside[name].type))

  def slice_size(self, inside: dict[str, Instruction], y: Instruction) -> float:
    if y.op == "dynamic-update-slice":
      return self.type_size(inside, y.operands[1]) if y.operands[1] in inside else 0.0
    return self.type_size(inside, y.name)


def is_counter(text: str) -> bool:
  return re.match(r"[su](32|64)\[\]", text) is not None


def partial(user: Instruction, name: str) -> bool:
  """Whether an operation touches only a part of its first operand, and that is `name`."""
  return user.op in ("dynamic-slice", "slice", "gather", "dynamic-update-slice") and (
    user.operands[0] == name and name not in user.operands[1:]
  )


def parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
  """({computation: {name: instruction}}, the name of the entry)."""
  computations: dict[str, dict[str, Instruction]] = {}
  current, entry = {}, ""
  for line in text.splitlines():
    if line.endswith("{") and " = " not in line.split("(")[0]:
      header = re.match(r"(ENTRY )?%?([\w.\-]+)", line)
      if header and "HloModule" not in line:
        current = computations.setdefault(header[2], {})
        entry = header[2] if header[1] else entry
      continue
    found = INSTRUCTION.match(line)
    if found:
      body = re.sub(r"/\*.*?\*/", "", found[3])
      end = _close(body, 0) + 1 if body.startswith("(") else body.index(" ")
      opened = body.index("(", end)
      closed = _close(body, opened)
      inner = body[opened + 1 : closed]
      op = body[end:opened].strip()
      names = r"%([\w.\-]+)" if "%" in inner else r"([\w.\-]+)"
      operands = (inner,) if op in ("constant", "parameter") else tuple(re.findall(names, inner))
      current[found[2]] = Instruction(found[2], body[:end], op, operands, body[closed + 1 :])
  return computations, entry


def _close(text: str, opened: int) -> int:
  """Where the parenthesis at `opened` closes."""
  depth = 0
  for place in re.finditer(r"[()]", text[opened:]):
    depth += 1 if place[0] == "(" else -1
    if depth == 0:
      return opened + place.start()
  return len(text) - 1


def sizes(text: str) -> list[tuple[float, bool]]:
  """(bytes, whether it lies on the chip) of each array in a type."""
  found = []
  for kind, dims, layout in SHAPE.findall(text):
    number = re.search(r"\d+", kind)
    width = BYTES.get(kind, int(number[0]) / 8 if number else 0)
    found.append((math.prod(int(d) for d in dims.split(",") if d) * width, bool(ON_CHIP.search(layout or ""))))
  return found


def dims(text: str) -> list[int]:
  found = SHAPE.search(text)
  return [int(d) for d in found[2].split(",") if d] if found else []


def dot_flops(x: Instruction, operands: list[str]) -> float:
  contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", x.rest)
  left = dims(operands[0])
  return 2.0 * math.prod(dims(x.type)) * math.prod(left[int(d)] for d in contracted[1].split(",") if d)


def convolution_flops(x: Instruction, operands: list[str]) -> float:
  """Products with numbers that are there: padding and the holes of a dilated operand are none."""
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", x.rest)
  window = dict(re.findall(r"(\w+)=([\dx_\-]+)", "".join(re.findall(r"window=\{([^}]*)\}", x.rest))))
  left, out = dims(operands[0]), dims(x.type)
  spatial = sorted(int(c) for c in labels[1] if c.isdigit())
  numbers = lambda key, default: [n for n in window[key].split("x")] if key in window else [default] * len(spatial)
  fields = zip(
    spatial,
    map(int, numbers("size", "1")),
    map(int, numbers("stride", "1")),
    numbers("pad", "0_0"),
    map(int, numbers("lhs_dilate", "1")),
    map(int, numbers("rhs_dilate", "1")),
  )
  total = 2.0
  for d, size, stride, pad, spread, kernel_spread in fields:
    length, result = left[labels[1].index(str(d))], out[labels[3].index(str(d))]
    place = (np.arange(result) * stride)[:, None] + np.arange(size) * kernel_spread - int(pad.split("_")[0])
    total *= int(((place >= 0) & (place < (length - 1) * spread + 1) & (place % spread == 0)).sum())
  attribute = lambda key: int(found[1]) if (found := re.search(rf"{key}=(\d+)", x.rest)) else 1
  batch, features = left[labels[1].index("b")], left[labels[1].index("f")]
  groups = attribute("feature_group_count") * attribute("batch_group_count")
  return total * batch * features * out[labels[3].index("f")] / groups


def splash_product_flops(x: Instruction) -> float:
  """One of the products of queries with keys in a splash attention kernel; blocks above the diagonal are left out.

  Its operands begin with tables of the grid [heads, blocks of queries, blocks of keys], and queries [B, H, S, N] are
  the first of four axes. Only a causal kernel is given the numbers of the queries' places, as its last operand [S, .].
  """
  shapes = [dims(found) for found in re.findall(r"\w+\[[\d,]*\]", x.rest.split("operand_layout_constraints=")[1])]
  batch, heads, length, width = next(shape for shape in shapes if len(shape) == 4)
  keys = [shape for shape in shapes if len(shape) == 4][1][2]
  blocks = next(shape[1] for shape in shapes if len(shape) == 3)
  flops = 2.0 * batch * heads * length * keys * width
  count = sum(len(shape) == 2 for shape in shapes)
  return flops * (blocks + 1) / (2 * blocks) if count else flops


def group_size(rest: str) -> int:
  """How many take part in a collective."""
  if "source_target_pairs" in rest:
    return 2
  found = re.search(r"replica_groups=\{\{([\d,]+)\}", rest)
  if found:
    return found[1].count(",") + 1
  found = re.search(r"replica_groups=\[\d+,(\d+)\]<=", rest)
  if found:
    return int(found[1])
  found = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", rest)
  if found:
    axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
    return math.prod(axes[name] for name in re.findall(r"'(\w+)'", found[2]))
  return 1
