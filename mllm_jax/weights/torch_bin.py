"""Reading what `torch.save` wrote, without torch and without running anything the file says.

A file in the format of torch 1.6 and later is an uncompressed zip archive: `<root>/data.pkl` describes the tensors,
`<root>/data/<key>` are the bytes of their storages. A pickle may name any function to be called, so only the handful
that describe tensors are let through, and each of them stands for code of this file. A tensor comes out as a view of
the memory-mapped file: nothing is read before it is used.
"""

import collections
import math
import pickle
import struct
import zipfile
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from mllm_jax.weights.known import WeightsError

STORAGE_DTYPES = {
  "FloatStorage": np.float32,
  "HalfStorage": np.float16,
  "BFloat16Storage": ml_dtypes.bfloat16,
  "DoubleStorage": np.float64,
  "LongStorage": np.int64,
  "IntStorage": np.int32,
  "ShortStorage": np.int16,
  "CharStorage": np.int8,
  "ByteStorage": np.uint8,
  "BoolStorage": np.bool_,
}
LOCAL_HEADER_BYTES = 30  # of a zip entry, before its name and extra field


class StorageType(NamedTuple):
  dtype: np.dtype


class Storage(NamedTuple):
  key: str
  dtype: np.dtype


class Tensor(NamedTuple):
  """A tensor as the pickle describes it; offset and strides count elements. Nothing in it is trusted yet."""

  storage: Storage
  offset: int
  shape: tuple
  strides: tuple


def rebuild_tensor(storage, offset, shape, strides, requires_grad=False, hooks=None, metadata=None):
  del requires_grad, hooks, metadata
  return Tensor(storage, offset, shape, strides)


def rebuild_parameter(tensor, requires_grad=False, hooks=None):
  del requires_grad, hooks
  return tensor


ALLOWED = {
  ("collections", "OrderedDict"): collections.OrderedDict,
  ("torch._utils", "_rebuild_tensor_v2"): rebuild_tensor,
  ("torch._utils", "_rebuild_parameter"): rebuild_parameter,
} | {("torch", name): StorageType(np.dtype(dtype)) for name, dtype in STORAGE_DTYPES.items()}


class TensorUnpickler(pickle.Unpickler):
  """An unpickler that knows tensors and dictionaries, and refuses everything else."""

  def find_class(self, module, name):
    if (module, name) not in ALLOWED:
      raise pickle.UnpicklingError(f"it refers to {module}.{name}, which is no part of a tensor")
    return ALLOWED[module, name]

  def persistent_load(self, pid):
    kind, storage_type, key = pid[:3]
    if kind != "storage" or not isinstance(storage_type, StorageType) or not isinstance(key, str):
      raise pickle.UnpicklingError(f"it refers to a {kind!r} of a type this reader does not know")
    return Storage(key, storage_type.dtype)


def read(path: str | Path) -> dict[str, np.ndarray]:
  """The tensors of a file that `torch.save` wrote of a flat dictionary: read-only views of the memory-mapped file.

  Raises WeightsError for a damaged file, the format of torch before 1.6, a pickle that asks for anything but tensors,
  and a tensor that reaches beyond its storage.
  """
  path = Path(path)
  if not zipfile.is_zipfile(path):
    raise not_a_zip(path)
  try:
    with zipfile.ZipFile(path) as archive:
      entries = {entry.filename: entry for entry in archive.infolist()}
      described = [name for name in entries if name.endswith("data.pkl") and name.count("/") <= 1]
      if len(described) != 1:
        raise WeightsError(f"{path} is a zip archive without the data.pkl of a PyTorch file; is it the right file?")
      root = described[0][: -len("data.pkl")]
      byte_order = archive.read(entries[root + "byteorder"]) if root + "byteorder" in entries else b"little"
      if byte_order != b"little":
        raise WeightsError(f"{path} holds big-endian numbers; save it again on a little-endian machine")
      with archive.open(described[0]) as file:
        content = TensorUnpickler(file).load()
  except WeightsError:
    raise
  except zipfile.BadZipFile as error:
    raise WeightsError(f"{path} is damaged ({error}); download it again") from error
  except Exception as error:  # a hostile or damaged pickle can make the unpickler raise anything
    raise WeightsError(
      f"{path} is refused: {error}; only plain dictionaries of tensors are read, so save it again as "
      "`torch.save(model.state_dict(), path)` or as safetensors"
    ) from error
  if not isinstance(content, dict):
    raise WeightsError(f"{path} holds a {type(content).__name__} instead of a dictionary of tensors")
  buffer = np.memmap(path, np.uint8, mode="r")
  return {name: view(path, buffer, entries, root, name, tensor) for name, tensor in content.items()}


def view(path: Path, buffer: np.ndarray, entries: dict[str, zipfile.ZipInfo], root: str, name, tensor) -> np.ndarray:
  """The array that a pickled tensor describes, after checking that it lies within its storage."""
  if not isinstance(name, str) or not isinstance(tensor, Tensor) or not isinstance(tensor.storage, Storage):
    raise WeightsError(
      f"{path}: the entry {name!r} is a {type(tensor).__name__}, not a tensor; save the weights alone, as "
      "`torch.save(model.state_dict(), path)`"
    )
  storage, offset, shape, strides = tensor
  numbers = (offset, *shape, *strides) if isinstance(shape, tuple) and isinstance(strides, tuple) else (None,)
  if not all(type(n) is int and n >= 0 for n in numbers) or len(shape) != len(strides):
    raise WeightsError(
      f"{path}: tensor {name} is described by shape {shape}, strides {strides}, offset {offset}; the file is "
      "damaged, download it again"
    )
  if 0 in shape:
    return np.zeros(shape, storage.dtype)
  start, size = storage_bytes(path, buffer, entries, root + "data/" + storage.key)
  last = offset + sum((length - 1) * stride for length, stride in zip(shape, strides))
  if (last + 1) * storage.dtype.itemsize > size:
    raise WeightsError(
      f"{path}: tensor {name} of shape {shape} reaches beyond its storage of {size} bytes; the file is "
      "damaged, download it again"
    )
  itemsize = storage.dtype.itemsize
  return np.ndarray(shape, storage.dtype, buffer, start + offset * itemsize, [stride * itemsize for stride in strides])


def storage_bytes(path: Path, buffer: np.ndarray, entries: dict[str, zipfile.ZipInfo], name: str) -> tuple[int, int]:
  """Where the bytes of a storage start in the file, and how many there are."""
  entry = entries.get(name)
  if entry is None or entry.compress_type != zipfile.ZIP_STORED:
    raise WeightsError(
      f"{path}: the storage {name} is {'missing' if entry is None else 'compressed'}; the file is damaged or "
      "was not written by torch.save, download it again"
    )
  header = bytes(buffer[entry.header_offset : entry.header_offset + LOCAL_HEADER_BYTES])
  if len(header) < LOCAL_HEADER_BYTES or header[:4] != b"PK\x03\x04":
    raise WeightsError(
      f"{path}: the storage {name} has no header where the archive says; the file is damaged, download it again"
    )
  # The local header repeats the name, with an extra field of its own length: torch pads there to align the data.
  start = entry.header_offset + LOCAL_HEADER_BYTES + sum(struct.unpack("<HH", header[26:30]))
  if start + entry.file_size > math.prod(buffer.shape):
    raise WeightsError(f"{path}: the storage {name} is cut off; download the file again")
  return start, entry.file_size


def not_a_zip(path: Path) -> WeightsError:
  """Why a file is no zip archive, told from its first bytes."""
  with open(path, "rb") as file:
    start = file.read(64)
  if start.startswith(b"PK\x03\x04"):
    return WeightsError(
      f"{path} is cut off: its end, where a zip archive lists what it holds, is missing; download it again"
    )
  if start.startswith(b"\x80"):
    return WeightsError(
      f"{path} is in the format of torch before 1.6; save it again with a newer torch, "
      "`torch.save(torch.load(path, map_location='cpu', weights_only=True), path)`"
    )
  return WeightsError(f"{path} is no PyTorch file; {pointer_or(start, 'is it the right file?')}")


def pointer_or(start: bytes, otherwise: str) -> str:
  """A remedy for a file that starts so: a Git LFS pointer stands where the weights have not been fetched."""
  if start.startswith(b"version https://git-lfs"):
    return "it is a Git LFS pointer: fetch the weights themselves with `git lfs pull` or `hf download`"
  return otherwise
