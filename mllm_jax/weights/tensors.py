"""Tensors by name, read slice by slice from wherever they lie: the one interface between files, names and devices."""

from collections.abc import Iterable, Mapping
from typing import Protocol

import ml_dtypes
import numpy as np

from mllm_jax.weights.buffers import Index, whole


class Tensors(Protocol):
  """Named tensors. An index is one slice with start and stop, of step 1, an axis."""

  def names(self) -> list[str]:
    """All names, in the order in which they are best written."""
    ...

  def shape(self, name: str) -> tuple[int, ...]: ...

  def dtype(self, name: str) -> np.dtype: ...

  def read(self, name: str, index: Index = ()) -> np.ndarray:
    """The part `index` of a tensor, all of it for (); perhaps a read-only view of a file."""
    ...

  def release(self, name: str) -> None:
    """Says that a tensor is not needed for now, so that the memory it was read through can be given back."""
    ...


class InMemory:
  """Arrays that are on the host already; `path` says in messages where they are from."""

  def __init__(self, arrays: Mapping[str, np.ndarray], path: str = "memory"):
    self.arrays = dict(arrays)
    self.path = path

  def names(self) -> list[str]:
    return list(self.arrays)

  def shape(self, name: str) -> tuple[int, ...]:
    return self.arrays[name].shape

  def dtype(self, name: str) -> np.dtype:
    return np.dtype(self.arrays[name].dtype)

  def read(self, name: str, index: Index = ()) -> np.ndarray:
    return np.asarray(self.arrays[name][index])

  def release(self, name: str) -> None:
    pass


class View:
  """Tensors that are other tensors, changed: what a subclass does not say anew is passed through."""

  def __init__(self, source: Tensors):
    self.source = source

  def names(self) -> list[str]:
    return self.source.names()

  def shape(self, name: str) -> tuple[int, ...]:
    return self.source.shape(name)

  def dtype(self, name: str) -> np.dtype:
    return self.source.dtype(name)

  def read(self, name: str, index: Index = ()) -> np.ndarray:
    return self.source.read(name, index)

  def release(self, name: str) -> None:
    self.source.release(name)


class Chosen(View):
  """The tensors of some names only."""

  def __init__(self, source: Tensors, names: Iterable[str]):
    super().__init__(source)
    self.chosen = list(names)

  def names(self) -> list[str]:
    return list(self.chosen)


class Joined:
  """Several sources as one. Raises ValueError where two have a name in common."""

  def __init__(self, *sources: Tensors):
    self.holders: dict[str, Tensors] = {}
    for source in sources:
      for name in source.names():
        if name in self.holders:
          raise ValueError(f"two sources hold {name}")
        self.holders[name] = source

  def names(self) -> list[str]:
    return list(self.holders)

  def shape(self, name: str) -> tuple[int, ...]:
    return self.holders[name].shape(name)

  def dtype(self, name: str) -> np.dtype:
    return self.holders[name].dtype(name)

  def read(self, name: str, index: Index = ()) -> np.ndarray:
    return self.holders[name].read(name, index)

  def release(self, name: str) -> None:
    self.holders[name].release(name)


class Cast(View):
  """Floating-point tensors in another type; the rest as it is."""

  def __init__(self, source: Tensors, dtype: np.dtype):
    super().__init__(source)
    self.to = np.dtype(dtype)

  def dtype(self, name: str) -> np.dtype:
    stored = self.source.dtype(name)
    return self.to if is_float(stored) else stored

  def read(self, name: str, index: Index = ()) -> np.ndarray:
    return self.source.read(name, index).astype(self.dtype(name), copy=False)


class Merged(View):
  """A decoder with its adapters folded in: W + A B * alpha / rank, added in float32 and rounded to W's type."""

  def __init__(self, source: Tensors, scale: float):
    super().__init__(source)
    self.scale = scale
    self.adapted = {name.replace("/lora/a", "/kernel") for name in source.names() if name.endswith("/lora/a")}

  def names(self) -> list[str]:
    return [name for name in self.source.names() if "/lora/" not in name]

  def read(self, name: str, index: Index = ()) -> np.ndarray:
    kernel = self.source.read(name, index)
    if name not in self.adapted:
      return kernel
    layers, inputs, outputs = index or whole(self.shape(name))
    factor = name.removesuffix("kernel") + "lora/"
    rank = slice(0, self.source.shape(factor + "a")[-1])
    a = self.source.read(factor + "a", (layers, inputs, rank)).astype(np.float32)
    b = self.source.read(factor + "b", (layers, rank, outputs)).astype(np.float32)
    return (kernel.astype(np.float32) + np.matmul(a, b) * np.float32(self.scale)).astype(kernel.dtype)


class MoreRows(View):
  """Some tables with rows added at the end of their first axis (or columns, of the last): the mean of the others.

  New tokens need rows in the embedding table and the head. The mean as a head's row gives the mean of the other
  logits, which is never the largest: greedy decoding does not choose a token that was never trained.
  """

  def __init__(self, source: Tensors, tables: Iterable[str], rows: int):
    super().__init__(source)
    self.rows = rows
    self.added = {name: rows - source.shape(name)[0] for name in tables}

  def shape(self, name: str) -> tuple[int, ...]:
    shape = self.source.shape(name)
    return (self.rows, *shape[1:]) if self.added.get(name) else shape

  def read(self, name: str, index: Index = ()) -> np.ndarray:
    if not self.added.get(name):
      return self.source.read(name, index)
    rows, columns = index or whole(self.shape(name))
    known = self.source.shape(name)[0]
    parts = []
    if rows.start < known:
      parts.append(self.source.read(name, (slice(rows.start, min(rows.stop, known)), columns)))
    if rows.stop > known:
      table = self.source.read(name, (slice(0, known), columns))
      mean = table.mean(axis=0, dtype=np.float32).astype(table.dtype)
      parts.append(np.broadcast_to(mean, (rows.stop - max(rows.start, known), len(mean))))
    return np.concatenate(parts)


def is_float(dtype: np.dtype) -> bool:
  """Whether a type is a floating-point one, bfloat16 and the 8-bit ones included."""
  try:
    ml_dtypes.finfo(dtype)
  except ValueError:
    return False
  return True
