"""Files of weights: safetensors and PyTorch's .bin, whole or in shards, read slice by slice.

`open_weights` reads only the headers. Both formats are mapped into memory, so that a device's slice of a tensor is all
that is read for that device.
"""

from pathlib import Path
from typing import Protocol

import ml_dtypes
import numpy as np
import safetensors

from mllm_jax.weights import torch_bin
from mllm_jax.weights.known import WeightsError, missing, read_json

__all__ = ["Weights", "WeightsError", "open_weights"]

SAFETENSORS_DTYPES = {
  "F64": np.float64,
  "F32": np.float32,
  "F16": np.float16,
  "BF16": ml_dtypes.bfloat16,
  "I64": np.int64,
  "I32": np.int32,
  "I16": np.int16,
  "I8": np.int8,
  "U8": np.uint8,
  "BOOL": np.bool_,
}
# By preference: safetensors first, as transformers does. The last is what LLaVA-SP's first stage writes.
SINGLE_FILES = ("model.safetensors", "adapter_model.safetensors", "pytorch_model.bin", "adapter_model.bin", "model.bin")
SUFFIXES = (".safetensors", ".bin")
Index = tuple[slice, ...]


class File(Protocol):
  """One open file of weights."""

  path: Path

  def names(self) -> list[str]: ...

  def shape(self, name: str) -> tuple[int, ...]: ...

  def dtype(self, name: str) -> np.dtype: ...

  def read(self, name: str, index: Index) -> np.ndarray: ...


class SafetensorsFile:
  """A .safetensors file."""

  def __init__(self, path: Path):
    self.path = path
    try:
      self.handle = safetensors.safe_open(path, framework="numpy")
    except (safetensors.SafetensorError, OSError, ValueError) as error:
      with open(path, "rb") as file:
        remedy = torch_bin.pointer_or(file.read(64), "it is damaged or cut off, download it again")
      raise WeightsError(f"{path} cannot be read as safetensors ({error}); {remedy}") from error

  def names(self) -> list[str]:
    return list(self.handle.keys())

  def shape(self, name: str) -> tuple[int, ...]:
    return tuple(self.handle.get_slice(name).get_shape())

  def dtype(self, name: str) -> np.dtype:
    stored = self.handle.get_slice(name).get_dtype()
    if stored not in SAFETENSORS_DTYPES:
      raise WeightsError(
        f"{self.path}: tensor {name} is stored as {stored}, which is not read here; use a checkpoint in "
        "float16, bfloat16 or float32"
      )
    return np.dtype(SAFETENSORS_DTYPES[stored])

  def read(self, name: str, index: Index) -> np.ndarray:
    return self.handle.get_slice(name)[index] if index else self.handle.get_tensor(name)


class TorchFile:
  """A .bin file."""

  def __init__(self, path: Path):
    self.path = path
    self.views = torch_bin.read(path)

  def names(self) -> list[str]:
    return list(self.views)

  def shape(self, name: str) -> tuple[int, ...]:
    return self.views[name].shape

  def dtype(self, name: str) -> np.dtype:
    return self.views[name].dtype

  def read(self, name: str, index: Index) -> np.ndarray:
    return self.views[name][index]


class Weights:
  """The tensors of one checkpoint by their names, in one file or several."""

  def __init__(self, path: Path, holders: dict[str, File]):
    self.path = path
    self._holders = holders

  def names(self) -> list[str]:
    """All names, sorted."""
    return sorted(self._holders)

  def file(self, name: str) -> Path:
    """The file that holds a tensor."""
    return self._holder(name).path

  def shape(self, name: str) -> tuple[int, ...]:
    """The shape as stored."""
    return self._holder(name).shape(name)

  def dtype(self, name: str) -> np.dtype:
    """The type as stored; bfloat16 is ml_dtypes' one."""
    return self._holder(name).dtype(name)

  def read(self, name: str, index: Index = ()) -> np.ndarray:
    """The part of a tensor that `index`, one slice of step 1 an axis, selects; all of it for ().

    The array may be a read-only view of the file. Raises WeightsError for a name that is not there, ValueError for an
    index that does not fit.
    """
    holder = self._holder(name)
    if index and (len(index) != len(holder.shape(name)) or any(s.step not in (None, 1) for s in index)):
      raise ValueError(f"index {index} does not fit {name} of shape {holder.shape(name)}: one slice of step 1 an axis")
    return holder.read(name, tuple(index))

  def _holder(self, name: str) -> File:
    if name not in self._holders:
      raise WeightsError(f"{self.path} has no tensor {name}; it has {len(self._holders)} others")
    return self._holders[name]


def open_weights(path: str | Path) -> Weights:
  """Opens a checkpoint: a .safetensors or .bin file, an index of shards (.index.json), or a folder with one of them.

  In a folder these are looked for: model.safetensors, adapter_model.safetensors, pytorch_model.bin or
  adapter_model.bin, each whole or as shards with their index; safetensors is taken before .bin. Otherwise the folder
  must hold exactly one file of weights. Raises WeightsError where nothing or more than one thing is found, for damaged
  files, for shards that are missing or lie outside the folder, and for names that stand twice.
  """
  path = Path(path)
  if path.is_dir():
    path = find(path)
  if not path.is_file():
    raise missing(path, "a .safetensors or .bin file, or a folder with one")
  if path.name.endswith(".index.json"):
    return open_shards(path)
  file = open_file(path)
  return Weights(path, {name: file for name in file.names()})


def open_file(path: Path) -> File:
  """Opens one file by its suffix."""
  if path.suffix not in SUFFIXES:
    raise WeightsError(f"{path} is neither .safetensors nor .bin; name a file of weights or its folder")
  return SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path)


def find(folder: Path) -> Path:
  """The file or index in a folder that stands for its checkpoint."""
  for name in SINGLE_FILES:
    whole, index = folder / name, folder / (name + ".index.json")
    if whole.exists() and index.exists():
      raise WeightsError(
        f"{folder} holds both {whole.name} and {index.name}, and they may differ; remove or rename one"
      )
    if whole.exists() or index.exists():
      return whole if whole.exists() else index
  others = sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES)
  if len(others) == 1:
    return others[0]
  sought = ", ".join(SINGLE_FILES)
  if others:
    raise WeightsError(
      f"{folder} holds {', '.join(file.name for file in others)} and no index that says which belong "
      f"together; looked for {sought} or one with .index.json; name the file, or download the index"
    )
  raise missing(folder / SINGLE_FILES[0], f"{sought}, whole or in shards with an .index.json")


def open_shards(index: Path) -> Weights:
  """Opens the shards that an index names."""
  weight_map = read_json(index, "an index of shards").get("weight_map")
  if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
    raise WeightsError(f"{index} has no weight_map from tensors to files; download it again")
  outside = sorted({file for file in weight_map.values() if file in ("", ".", "..") or "/" in file or "\\" in file})
  if outside:
    raise WeightsError(f"{index} names files outside its folder: {', '.join(outside)}; do not use this checkpoint")
  absent = sorted({file for file in weight_map.values() if not (index.parent / file).is_file()})
  if absent:
    raise missing(
      index.parent / absent[0], f"the shards that {index.name} names; {len(absent)} are absent: {', '.join(absent)}"
    )
  shards = {file: open_file(index.parent / file) for file in sorted(set(weight_map.values()))}
  seen: dict[str, str] = {}
  for file, shard in shards.items():
    for name in shard.names():
      if name in seen:
        raise WeightsError(
          f"{index.parent}: tensor {name} stands in both {seen[name]} and {file}; download the shards again"
        )
      seen[name] = file
  wrong = [name for name, file in weight_map.items() if seen.get(name) != file]
  if wrong:
    raise WeightsError(
      f"{index.parent / weight_map[wrong[0]]} lacks {len(wrong)} tensors that {index.name} expects of it or its "
      f"like, first {wrong[0]}; index and shards are of different checkpoints, download both again"
    )
  return Weights(index, {name: shards[file] for name, file in weight_map.items()})
