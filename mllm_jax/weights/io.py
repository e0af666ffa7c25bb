"""Files of weights: safetensors, PyTorch's .bin and Lightning's .ckpt, whole or in shards, read slice by slice.

`open_weights` reads only the headers. Local files are mapped into memory and remote ones read by ranges, so that a
device's slice of a tensor is all that is read for that device.
"""

import os

import numpy as np

from mllm_jax import places
from mllm_jax.places import Bytes, Place
from mllm_jax.weights import safetensors_file, torch_bin
from mllm_jax.weights.buffers import Index
from mllm_jax.weights.errors import WeightsError, shorten
from mllm_jax.weights.known import missing, read_json
from mllm_jax.weights.stored import Stored
from mllm_jax.weights.tensors import Tensors

__all__ = ["Index", "Tensors", "Weights", "WeightsError", "open_weights"]

LISTED = 12  # files of one kind that an error names
# By preference: safetensors first, as transformers does. The last is what LLaVA-SP's first stage writes.
SINGLE_FILES = ("model.safetensors", "adapter_model.safetensors", "pytorch_model.bin", "adapter_model.bin", "model.bin")
FORMATS = {".safetensors": safetensors_file.parse, ".bin": torch_bin.parse, ".ckpt": torch_bin.parse_lightning}


class File:
  """One open file of weights; Weights says what its methods do."""

  def __init__(self, path: Place, source: Bytes, tensors: dict[str, Stored]):
    self.path, self._source, self._tensors = path, source, tensors

  def names(self) -> list[str]:
    return list(self._tensors)

  def shape(self, name: str) -> tuple[int, ...]:
    return self._tensors[name].shape

  def dtype(self, name: str) -> np.dtype:
    return self._tensors[name].dtype

  def read(self, name: str, index: Index) -> np.ndarray:
    return self._tensors[name].read(self._source, index)

  def release(self, name: str) -> None:
    self._source.release(self._tensors[name].start, self._tensors[name].stop)


class Weights:
  """The tensors of one checkpoint by their names, in one file or several."""

  def __init__(self, path: Place, holders: dict[str, File]):
    self.path = path
    self._holders = holders

  def names(self) -> list[str]:
    """All names, sorted."""
    return sorted(self._holders)

  def file(self, name: str) -> Place:
    """The file that holds a tensor: a Path, or text where it is remote."""
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
    index that does not fit. Of a local file the pages stay in memory until `release`.
    """
    holder = self._holder(name)
    fits = len(index) == len(holder.shape(name)) and all(isinstance(s, slice) and s.step in (None, 1) for s in index)
    if index and not fits:
      raise ValueError(f"index {index} does not fit {name} of shape {holder.shape(name)}: one slice of step 1 an axis")
    return holder.read(name, tuple(index))

  def release(self, name: str) -> None:
    """Lets the pages of a tensor's file leave this process's memory; they come back when it is read again."""
    self._holder(name).release(name)

  def _holder(self, name: str) -> File:
    if name not in self._holders:
      raise WeightsError(f"{self.path} has no tensor {name}; it has {len(self._holders)} others")
    return self._holders[name]


def open_weights(path: Place) -> Weights:
  """Opens a checkpoint: a .safetensors, .bin or .ckpt file, an index of shards (.index.json), or a folder with one of
  them.

  The path is local, or remote with a protocol that fsspec knows, such as gs://bucket/folder. In a folder these are
  looked for: model.safetensors, adapter_model.safetensors, pytorch_model.bin or adapter_model.bin, each whole or as
  shards with their index; safetensors is taken before .bin. Otherwise the folder must hold exactly one file of weights.
  Raises WeightsError where nothing or more than one thing is found, for damaged files, for shards that are missing or
  lie outside the folder, and for names that stand twice.
  """
  path = places.place(path)
  if places.is_dir(path):
    path = find(path)
  if not places.is_file(path):
    raise missing(path, "a .safetensors, .bin or .ckpt file, or a folder with one")
  if str(path).endswith(".index.json"):
    return open_shards(path)
  file = open_file(path)
  return Weights(path, {name: file for name in file.names()})


def open_file(path: Place) -> File:
  """Opens one file by its suffix."""
  parse = FORMATS.get(suffix(places.base_name(path)))
  if parse is None:
    raise WeightsError(f"{path} is neither .safetensors nor .bin nor .ckpt; name a file of weights or its folder")
  source = places.open_bytes(path)
  return File(path, source, parse(path, source))


def suffix(name: str) -> str:
  """The last dot of a file's name and what follows."""
  return os.path.splitext(name)[1]


def find(folder: Place) -> Place:
  """The file or index in a folder that stands for its checkpoint."""
  names = places.names(folder)
  for whole in SINGLE_FILES:
    index = whole + ".index.json"
    if whole in names and index in names:
      raise WeightsError(f"{folder} holds both {whole} and {index}, and they may differ; remove or rename one")
    if whole in names or index in names:
      return places.join(folder, whole if whole in names else index)
  others = [name for name in names if suffix(name) in FORMATS]
  if len(others) == 1:
    return places.join(folder, others[0])
  sought = ", ".join(SINGLE_FILES)
  if others:
    raise WeightsError(
      f"{folder} holds {', '.join(others)} and no index that says which belong "
      f"together; looked for {sought} or one with .index.json; name the file, or download the index"
    )
  raise missing(places.join(folder, SINGLE_FILES[0]), f"{sought}, whole or in shards with an .index.json")


def open_shards(index: Place) -> Weights:
  """Opens the shards that an index names."""
  folder, title = places.parent(index), places.base_name(index)
  weight_map = read_json(index, "an index of shards").get("weight_map")
  if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
    raise WeightsError(f"{index} has no weight_map from tensors to files; download it again")
  files = sorted(set(weight_map.values()))
  outside = [file for file in files if file in ("", ".", "..") or set(file) & set("/\\")]
  if outside:
    raise WeightsError(f"{index} names files outside its folder: {listed(outside)}; do not use this checkpoint")
  present = set(places.names(folder))
  absent = [file for file in files if file not in present]
  if absent:
    raise missing(
      places.join(folder, shorten(absent[0])),
      f"the shards that {title} names; {len(absent)} are absent: {listed(absent)}",
    )
  shards = {file: open_file(places.join(folder, file)) for file in files}
  seen: dict[str, str] = {}
  for file, shard in shards.items():
    for name in shard.names():
      if name in seen:
        raise WeightsError(
          f"{folder}: tensor {shorten(name)} stands in both {seen[name]} and {file}; download the shards again"
        )
      seen[name] = file
  wrong = [name for name, file in weight_map.items() if seen.get(name) != file]
  if wrong:
    raise WeightsError(
      f"{places.join(folder, weight_map[wrong[0]])} lacks {len(wrong)} tensors that {title} expects of it or its "
      f"like, first {shorten(wrong[0])}; index and shards are of different checkpoints, download both again"
    )
  return Weights(index, {name: shards[file] for name, file in weight_map.items()})


def listed(files: list[str]) -> str:
  """Names of files for a message, the first dozen of them."""
  more = f" and {len(files) - LISTED} more" if len(files) > LISTED else ""
  return ", ".join(shorten(name) for name in files[:LISTED]) + more
