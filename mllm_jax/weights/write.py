"""Writing files of weights a piece at a time, so that a model larger than the host's memory can be written.

Everything is written beside its final name and renamed at the end: a file that is there is whole.
"""

import concurrent.futures
import errno
import json
import math
import os
import re
import shutil
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mllm_jax import places
from mllm_jax.places import Place
from mllm_jax.weights.buffers import Index, pieces, whole
from mllm_jax.weights.errors import WeightsError
from mllm_jax.weights.safetensors_file import DTYPES, HEADER_BYTES, METADATA
from mllm_jax.weights.tensors import Tensors
from mllm_jax.weights.torch_pickle import STORAGE_DTYPES, TENSOR_DTYPES

PIECE_BYTES = 128 * 2**20
SHARD_BYTES = 5 * 10**9  # what transformers cuts checkpoints into
PARTIAL = ".partial"
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SAFETENSORS_NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
STORAGE_NAMES = {np.dtype(dtype): name for name, dtype in STORAGE_DTYPES.items()}
TENSOR_NAMES = {np.dtype(dtype): name for name, dtype in TENSOR_DTYPES.items()}
TORCH_ALIGNMENT = 64
ENTRY_BYTES = 400  # of an archive for a tensor: two headers with its name, padding
LOCAL_HEADER_BYTES, ZIP64_BYTES, PADDING_HEADER_BYTES = 30, 20, 4
Progress = Callable[[int], None]


class Shard(NamedTuple):
  """One file to be written: its header, and its tensors by name with the byte at which each starts."""

  path: Path
  header: bytes
  starts: dict[str, int]
  size: int


class Piece(NamedTuple):
  """A part of a tensor that is contiguous in its file, and the byte of the file at which it starts."""

  file: int
  name: str
  index: Index
  start: int


def write_safetensors(
  folder: str | Path,
  tensors: Tensors,
  *,
  stem: str = "model",
  shard_bytes: int = SHARD_BYTES,
  metadata: dict[str, str] | None = None,
  progress: Progress | None = None,
  threads: int = 2,
) -> list[Path]:
  """Writes STEM.safetensors, or where the tensors exceed `shard_bytes`, STEM-00001-of-0000N.safetensors and so on with
  STEM.safetensors.index.json, as Hugging Face does. Returns the files of tensors.

  The tensors are read in their order, in pieces of at most 128 MiB; `threads` of them are in memory at a time, so
  `tensors` must allow reading from several threads. A tensor is released after its last piece. `progress` is called
  with the bytes of each piece that is written, from the calling thread. `metadata` goes into every file's header.

  Raises WeightsError, before anything is read, for a type that safetensors has not, a folder with other weights of the
  same stem, and a disk that has not the room: space is taken for all files at once. An error on the way is raised as
  it is, after removing what was written.
  """
  folder = local(folder)
  shards = plan(folder, tensors, stem, shard_bytes, {"format": "pt"} | (metadata or {}))
  index = folder / f"{stem}.safetensors.index.json"
  refuse_others(folder, stem, {shard.path.name for shard in shards} | ({index.name} if len(shards) > 1 else set()))
  folder.mkdir(parents=True, exist_ok=True)
  check_room(folder, sum(shard.size for shard in shards))
  files: list[int] = []
  try:
    for shard in shards:
      files.append(os.open(partial(shard.path), os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666))
      allocate(files[-1], folder, shard.size)
      write_at(files[-1], shard.header, 0)
    fill(
      tensors, [piece for file, shard in zip(files, shards) for piece in cut(tensors, shard, file)], progress, threads
    )
    for file in files:
      os.fsync(file)
    for shard in shards:
      os.replace(partial(shard.path), shard.path)
  finally:
    for file, shard in zip(files, shards):
      os.close(file)
      partial(shard.path).unlink(missing_ok=True)
  if len(shards) > 1:
    # Last, since it is what makes the shards a checkpoint.
    write_index(index, tensors, shards)
  sync_folder(folder)
  return [shard.path for shard in shards]


def local(path: Place) -> Path:
  """A local path. Raises WeightsError for a remote one."""
  path = places.place(path)
  if not isinstance(path, Path):
    raise WeightsError(
      f"{path} is remote; write to a local folder and copy that, for example with `gcloud storage cp -r`"
    )
  return path


def partial(path: Path) -> Path:
  """The name of a file while it is written."""
  return path.with_name(path.name + PARTIAL)


def plan(folder: Path, tensors: Tensors, stem: str, shard_bytes: int, metadata: dict[str, str]) -> list[Shard]:
  """Which tensor goes where. A tensor above `shard_bytes` has a file to itself."""
  groups: list[list[str]] = [[]]
  filled = 0
  for name in tensors.names():
    size = byte_count(tensors, name)
    if filled + size > shard_bytes and groups[-1]:
      groups.append([])
      filled = 0
    groups[-1].append(name)
    filled += size
  titles = [f"{stem}-{number:05}-of-{len(groups):05}.safetensors" for number in range(1, len(groups) + 1)]
  titles = titles if len(groups) > 1 else [f"{stem}.safetensors"]
  return [layout(folder / title, tensors, names, metadata) for title, names in zip(titles, groups)]


def byte_count(tensors: Tensors, name: str) -> int:
  return math.prod(tensors.shape(name)) * np.dtype(tensors.dtype(name)).itemsize


def layout(path: Path, tensors: Tensors, names: list[str], metadata: dict[str, str]) -> Shard:
  """The header of one file. Wider types come first, so that every tensor starts at a multiple of its item's size."""
  header: dict = {METADATA: metadata}
  ends: dict[str, tuple[int, int]] = {}
  end = 0
  for name in sorted(names, key=lambda name: -np.dtype(tensors.dtype(name)).itemsize):
    dtype = np.dtype(tensors.dtype(name))
    if dtype not in SAFETENSORS_NAMES or name == METADATA:
      raise WeightsError(f"{path}: tensor {name} of type {dtype} cannot be written as safetensors; cast or rename it")
    ends[name] = (end, end + byte_count(tensors, name))
    end = ends[name][1]
    shape = [int(n) for n in tensors.shape(name)]
    header[name] = {"dtype": SAFETENSORS_NAMES[dtype], "shape": shape, "data_offsets": list(ends[name])}
  text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
  text += b" " * (-len(text) % 8)
  if len(text) > HEADER_BYTES:
    raise WeightsError(f"{path}: its header would have {len(text)} bytes, and the format allows {HEADER_BYTES}")
  start = 8 + len(text)
  starts = {name: start + begin for name, (begin, _) in ends.items()}
  return Shard(path, len(text).to_bytes(8, "little") + text, starts, start + end)


def refuse_others(folder: Path, stem: str, ours: set[str]) -> None:
  """Raises WeightsError for files that would be taken for a part of what is written."""
  pattern = re.compile(re.escape(stem) + r"(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
  there = os.listdir(folder) if folder.is_dir() else []
  others = sorted(name for name in there if pattern.fullmatch(name) and name not in ours)
  if others:
    raise WeightsError(
      f"{folder} holds {', '.join(others[:5])}{' and more' if others[5:] else ''} of another checkpoint; remove them "
      "or write to another folder"
    )


def check_room(folder: Path, needed: int) -> None:
  """Raises WeightsError where a folder's disk has less than `needed` bytes left."""
  if needed > shutil.disk_usage(folder).free:
    raise no_room(folder, needed)


def no_room(folder: Path, needed: int) -> WeightsError:
  """The error for a disk without room for `needed` bytes more."""
  free = shutil.disk_usage(folder).free
  return WeightsError(
    f"{folder}: {needed / 1e9:.3f} GB are needed and {free / 1e9:.3f} GB are free; make room or choose another disk"
  )


def allocate(file: int, folder: Path, size: int) -> None:
  """Takes the space of a whole file, so that a full disk is found before hours are spent on filling it."""
  try:
    if hasattr(os, "posix_fallocate"):
      os.posix_fallocate(file, 0, size)
    else:
      os.ftruncate(file, size)
  except OSError as error:
    if error.errno in FULL_DISK:
      raise no_room(folder, size) from error
    if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
      raise
    os.ftruncate(file, size)  # this file system cannot take space ahead


def cut(tensors: Tensors, shard: Shard, file: int) -> list[Piece]:
  """The pieces of one file's tensors."""
  found = []
  for name, start in shard.starts.items():
    itemsize = np.dtype(tensors.dtype(name)).itemsize
    for index in pieces(whole(tensors.shape(name)), itemsize, PIECE_BYTES):
      found.append(Piece(file, name, index, start))
      start += math.prod(part.stop - part.start for part in index) * itemsize
  return found


def fill(tensors: Tensors, todo: list[Piece], progress: Progress | None, threads: int) -> None:
  """Copies the pieces into their files. The first error stops the rest and is raised."""
  left: dict[str, int] = {}
  for piece in todo:
    left[piece.name] = left.get(piece.name, 0) + 1
  lock = threading.Lock()

  def copy(piece: Piece) -> int:
    content = read_piece(tensors, piece.name, piece.index)
    write_at(piece.file, content, piece.start)
    with lock:
      left[piece.name] -= 1
      last = left[piece.name] == 0
    if last:
      tensors.release(piece.name)
    return len(content)

  pool = concurrent.futures.ThreadPoolExecutor(threads)
  try:
    for future in concurrent.futures.as_completed([pool.submit(copy, piece) for piece in todo]):
      written = future.result()
      if progress is not None:
        progress(written)
  finally:
    pool.shutdown(cancel_futures=True)


def read_piece(tensors: Tensors, name: str, index: Index) -> np.ndarray:
  """A part of a tensor as contiguous bytes. Raises WeightsError where it is not what the source announced."""
  array = np.asarray(tensors.read(name, index))
  shape, dtype = tuple(part.stop - part.start for part in index), np.dtype(tensors.dtype(name))
  if array.shape != shape or array.dtype != dtype:
    raise WeightsError(
      f"tensor {name} came as {array.dtype} {array.shape} where {dtype} {shape} was announced; this is a fault of its "
      "source, please report it"
    )
  return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def write_at(file: int, content, start: int) -> None:
  """Writes all of `content` at byte `start`; the system may take it in parts."""
  rest = memoryview(content)
  while rest:
    count = os.pwrite(file, rest, start)
    rest, start = rest[count:], start + count


def write_index(path: Path, tensors: Tensors, shards: list[Shard]) -> None:
  """The index of shards, as transformers writes it."""
  weight_map = {name: shard.path.name for shard in shards for name in shard.starts}
  total = sum(byte_count(tensors, name) for name in weight_map)
  content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
  with open(partial(path), "w", encoding="utf-8") as file:
    file.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    file.flush()
    os.fsync(file.fileno())
  os.replace(partial(path), path)


def sync_folder(folder: Path) -> None:
  """Makes renamed files survive a crash of the machine."""
  file = os.open(folder, os.O_RDONLY)
  try:
    os.fsync(file)
  finally:
    os.close(file)


def write_torch_bin(path: str | Path, tensors: Tensors, *, progress: Progress | None = None) -> None:
  """Writes what `torch.load(path, weights_only=True)` reads as an OrderedDict of contiguous tensors.

  The tensors are read in their order, in pieces of at most 128 MiB. `progress` is called with the bytes of each.
  Raises WeightsError for a type that torch has not, and for a disk that has not the room.
  """
  path = local(path)
  names = tensors.names()
  described = pickle_of(path, tensors, names)
  path.parent.mkdir(parents=True, exist_ok=True)
  needed = sum(byte_count(tensors, name) for name in names) + len(described) + ENTRY_BYTES * (len(names) + 4)
  check_room(path.parent, needed)
  root = path.stem
  try:
    with open(partial(path), "wb") as file:
      with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(entry(f"{root}/data.pkl", archive), described)
        archive.writestr(entry(f"{root}/byteorder", archive), b"little")
        for key, name in enumerate(names):
          with archive.open(entry(f"{root}/data/{key}", archive), "w", force_zip64=True) as storage:
            for index in pieces(whole(tensors.shape(name)), np.dtype(tensors.dtype(name)).itemsize, PIECE_BYTES):
              written = storage.write(read_piece(tensors, name, index))
              if progress is not None:
                progress(written)
          tensors.release(name)
        archive.writestr(entry(f"{root}/version", archive), b"3\n")
      file.flush()
      os.fsync(file.fileno())
    os.replace(partial(path), path)
  except OSError as error:
    if error.errno in FULL_DISK:  # something else took the room meanwhile
      raise no_room(path.parent, needed) from error
    raise
  finally:
    partial(path).unlink(missing_ok=True)
  sync_folder(path.parent)


def entry(name: str, archive: zipfile.ZipFile) -> zipfile.ZipInfo:
  """The next entry of an archive, padded so that its bytes start at a multiple of 64, as torch's do."""
  info = zipfile.ZipInfo(name)
  start = archive.fp.tell() + LOCAL_HEADER_BYTES + len(info.filename.encode()) + ZIP64_BYTES + PADDING_HEADER_BYTES
  padding = -start % TORCH_ALIGNMENT
  info.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding  # the field that torch itself pads with
  return info


def pickle_of(path: Path, tensors: Tensors, names: list[str]) -> bytes:
  """The pickle, in protocol 2, of an OrderedDict of tensors whose storages are numbered in order."""
  out = [b"\x80\x02ccollections\nOrderedDict\n)R("]
  for key, name in enumerate(names):
    shape, dtype = tensors.shape(name), np.dtype(tensors.dtype(name))
    count = math.prod(shape)
    if dtype in STORAGE_NAMES:
      function, storage, last = b"_rebuild_tensor_v2", b"ctorch\n" + STORAGE_NAMES[dtype].encode(), b""
    elif dtype in TENSOR_NAMES:
      function, storage = b"_rebuild_tensor_v3", b"ctorch.storage\nUntypedStorage"
      last, count = b"ctorch\n" + TENSOR_NAMES[dtype].encode() + b"\n", count * dtype.itemsize
    else:
      raise WeightsError(f"{path}: tensor {name} of type {dtype} cannot be written for torch; cast it")
    strides = [math.prod(max(n, 1) for n in shape[axis + 1 :]) for axis in range(len(shape))]
    out += [text(name), b"ctorch._utils\n", function, b"\n(("]
    out += [text("storage"), storage, b"\n", text(str(key)), text("cpu"), number(count), b"tQ"]
    out += [number(0), numbers(shape), numbers(strides), b"\x89ccollections\nOrderedDict\n)R", last, b"tR"]
  return b"".join(out) + b"u."


def text(value: str) -> bytes:
  content = value.encode()
  return b"X" + len(content).to_bytes(4, "little") + content


def number(value: int) -> bytes:
  if value < 2**31:
    return b"J" + int(value).to_bytes(4, "little")
  return b"\x8a\x08" + int(value).to_bytes(8, "little")


def numbers(values) -> bytes:
  return b"(" + b"".join(number(value) for value in values) + b"t"
