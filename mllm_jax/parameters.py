"""A model's parameters as a flat dictionary {path: array}, and the tables of rules over those paths.

A path is the way to the array through the modules, joined by "/": `decoder/layers/q_proj/kernel`. Training,
checkpoints, sharding and weight conversion all speak of parameters by these names.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mllm_jax.config import ConfigError

Flat = dict[str, Any]


def flatten(model: nnx.Module) -> tuple[nnx.GraphDef, Flat]:
  """(structure, {path: array or ShapeDtypeStruct}) of a model; `unflatten` is the inverse."""
  graphdef, state = nnx.split(model)
  return graphdef, {"/".join(map(str, path)): variable.get_value() for path, variable in nnx.to_flat_state(state)}


def unflatten(graphdef: nnx.GraphDef, flat: Mapping[str, Any]) -> nnx.Module:
  """The model again. Works under jit: nothing is copied."""
  split = lambda path: tuple(int(part) if part.isdigit() else part for part in path.split("/"))
  return nnx.merge(graphdef, nnx.from_flat_state({split(path): nnx.Param(value) for path, value in flat.items()}))


def match(rules: tuple[tuple[str, Any], ...], paths: list[str], name: str) -> dict[str, Any]:
  """{path: the value of the one rule whose pattern matches the whole path}.

  Raises ConfigError, naming all offenders, where a path is matched by no rule or by several, or a rule matches nothing:
  a parameter that is silently frozen, or trained, costs days.
  """
  problems, found, used = [], {}, set()
  for path in paths:
    hits = [index for index, (pattern, _) in enumerate(rules) if re.fullmatch(pattern, path)]
    used.update(hits)
    if len(hits) == 1:
      found[path] = rules[hits[0]][1]
    elif hits:
      problems.append(f"{path} is matched by {len(hits)} rules: {', '.join(repr(rules[i][0]) for i in hits)}")
    else:
      problems.append(f"{path} is matched by no rule")
  problems += [f"the rule {pattern!r} matches no parameter" for i, (pattern, _) in enumerate(rules) if i not in used]
  if problems:
    shown = "\n  ".join(problems[:12]) + (f"\n  and {len(problems) - 12} more" if len(problems) > 12 else "")
    raise ConfigError(
      f"{name}: each parameter must be matched by exactly one rule, and each rule by some parameter:\n  {shown}"
    )
  return found


def table(flat: Mapping[str, Any], learning_rates: Mapping[str, float]) -> str:
  """What the run trains, for people: a line for each group of parameters with count, type, bytes and learning rate."""
  groups: dict[tuple, list] = {}
  for path, array in flat.items():
    # Adapters stand apart from the layers they sit in; elsewhere two levels say enough.
    parts = path.split("/")
    group = "/".join(parts[:2]) + (" (LoRA)" if "lora" in parts else "")
    groups.setdefault((group, learning_rates[path], str(jnp.dtype(array.dtype))), []).append(array)
  rows = [("parameters", "count", "type", "bytes", "learning rate")]
  for (group, rate, dtype), arrays in groups.items():
    count, size = sum(a.size for a in arrays), sum(a.size * a.dtype.itemsize for a in arrays)
    rows.append((group, f"{count:,}", dtype, readable(size), f"{rate:g}" if rate else "frozen"))
  for name, trained in (("trained", True), ("frozen", False)):
    arrays = [a for path, a in flat.items() if bool(learning_rates[path]) == trained]
    size = sum(a.size * a.dtype.itemsize for a in arrays)
    rows.append((f"all {name}", f"{sum(a.size for a in arrays):,}", "", readable(size), ""))
  widths = [max(len(row[i]) for row in rows) for i in range(5)]
  line = lambda row: "  ".join(
    [row[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])]
  )
  return "\n".join([line(rows[0]), "-" * len(line(rows[0]))] + [line(row) for row in rows[1:]])


def readable(size: int) -> str:
  """Bytes in the unit that suits them."""
  for unit in ("B", "KiB", "MiB"):
    if size < 1024:
      return f"{size:.4g} {unit}"
    size /= 1024
  return f"{size:,.2f} GiB"


def norm(tree: Any) -> jax.Array:
  """Global L2 norm of a tree of arrays, in float32."""
  return jnp.sqrt(sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)))
