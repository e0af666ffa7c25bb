"""Reading what `torch.save` wrote, in both of its formats, without torch and without running anything the file says.

Since torch 1.6 a file is an uncompressed zip archive: `<root>/data.pkl` describes the tensors, `<root>/data/<key>` are
the bytes of their storages. Before, and on request since, it is five pickles one after the other (a magic number, the
version, the machine's number format, the tensors, the keys of their storages) and then each storage in the order of the
keys: 8 bytes with its number of elements, and the elements.
"""

import zlib
from collections.abc import Callable

from mllm_jax.places import Bytes, Place
from mllm_jax.weights.errors import WeightsError, brief, pointer_or
from mllm_jax.weights.stored import Stored, is_shape
from mllm_jax.weights.torch_pickle import ONLY_TENSORS, PICKLE_BYTES, Machine, Refused, Storage, Stream, Tensor
from mllm_jax.weights.torch_zip import Entry, ZipError, entries

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_VERSION = 1001
ZIP_START, PICKLE_START = b"PK\x03\x04", b"\x80"
TAR_MARK = slice(257, 262)  # "ustar"
DAMAGED = "download it again"
Locate = Callable[[Storage], int]  # the byte at which a storage starts, after checking its size


def parse(path: Place, source: Bytes, within: str = "") -> dict[str, Stored]:
  """The tensors of a file that `torch.save` wrote of a flat dictionary.

  within: the entry of that dictionary that may hold the tensors instead, whatever the others are ("": none).

  Raises WeightsError for a damaged file, a pickle that asks for anything but tensors, names that stand twice, storages
  whose size is not what the pickle says or that overlap, tensors that reach beyond their storage or overlap themselves.
  Several tensors may share a storage, as tied weights do. Whatever the file says, reading its description takes less
  than 512 MiB of memory beyond the file's own size.
  """
  start = source.view(0, min(512, source.size)).tobytes()
  try:
    if start.startswith(ZIP_START):
      content, locate = parse_zip(path, source)
    elif start.startswith(PICKLE_START):
      content, locate = parse_legacy(path, source)
    elif start[TAR_MARK] == b"ustar":
      raise WeightsError(
        f"{path} is a tar archive, as torch wrote before 2017; load it with a torch that still can, and save it "
        "again as safetensors"
      )
    else:
      raise WeightsError(f"{path} is no PyTorch file; {pointer_or(start, 'is it the right file?')}")
  except ZipError as error:
    raise WeightsError(f"{path} is damaged: {error}; {DAMAGED}") from error
  except Refused as error:
    raise WeightsError(f"{path} is refused: {error}; {error.remedy}") from error
  if not isinstance(content, dict):
    raise WeightsError(f"{path} holds a {type(content).__name__} instead of a dictionary of tensors; {ONLY_TENSORS}")
  if within and isinstance(content.get(within), dict):
    content = content[within]
  return {checked_name(path, name, tensor): stored(path, name, tensor, locate) for name, tensor in content.items()}


def parse_lightning(path: Place, source: Bytes) -> dict[str, Stored]:
  """The weights in a checkpoint that PyTorch Lightning saved, beside which stand counters and the optimizer's state; or
  those of a flat dictionary. Raises as `parse`."""
  return parse(path, source, within="state_dict")


def parse_zip(path: Place, source: Bytes) -> tuple[object, Locate]:
  """The content of data.pkl, and where storages are."""
  found = entries(source)
  described = [name for name in found if name.endswith("data.pkl") and name.count("/") <= 1]
  if len(described) != 1:
    raise WeightsError(f"{path} is a zip archive without the data.pkl of a PyTorch file; is it the right file?")
  root, entry = described[0].removesuffix("data.pkl"), found[described[0]]
  order = found.get(root + "byteorder")
  if order is not None and source.view(order.start, min(order.stop, order.start + 16)).tobytes() != b"little":
    raise WeightsError(f"{path} holds big-endian numbers; save it again on a little-endian machine")
  if entry.stop - entry.start > PICKLE_BYTES:
    raise WeightsError(f"{path}: its data.pkl has {entry.stop - entry.start} bytes; {PICKLE_BYTES} are the most read")
  check_sum(path, source, entry)
  stream = Stream(source, entry.start, entry.stop)
  content = Machine(id_parts=5).run(stream)
  if stream.position != entry.stop:
    raise Refused(f"its data.pkl goes on after its end, at byte {stream.position}")

  def locate(storage: Storage) -> int:
    entry = found.get(f"{root}data/{storage.key}")
    if entry is None:
      raise WeightsError(f"{path}: the storage {brief(storage.key)} is missing from the archive; {DAMAGED}")
    needed = storage.numel * storage.type.dtype.itemsize
    if entry.stop - entry.start != needed:
      raise WeightsError(
        f"{path}: the storage {brief(storage.key)} should have {needed} bytes ({storage.numel} x "
        f"{storage.type.dtype}) and has {entry.stop - entry.start}; {DAMAGED}"
      )
    return entry.start

  return content, locate


def check_sum(path: Place, source: Bytes, entry: Entry) -> None:
  """Raises WeightsError where the pickle's checksum is wrong: a changed stride would go unnoticed otherwise. It is 0
  where torch was told to leave it out (torch.serialization.set_crc32_options)."""
  if not entry.crc:
    return
  crc = 0
  for start in range(entry.start, entry.stop, 2**20):
    crc = zlib.crc32(source.view(start, min(start + 2**20, entry.stop)), crc)
  if crc != entry.crc:
    raise WeightsError(
      f"{path} is damaged: the checksum of its data.pkl is {crc:08x} instead of {entry.crc:08x}; {DAMAGED}"
    )


def parse_legacy(path: Place, source: Bytes) -> tuple[object, Locate]:
  """The fourth pickle of a file in the format before 1.6, and where storages are."""
  stream = Stream(source, 0, source.size)
  if Machine(6).run(stream) != LEGACY_MAGIC:
    raise WeightsError(f"{path} is a pickle, but not one of torch.save; {ONLY_TENSORS}")
  version = Machine(6).run(stream)
  if version != LEGACY_VERSION:
    raise WeightsError(f"{path} is of version {brief(version)} of torch's format before 1.6; {LEGACY_VERSION} is read")
  machine_info = Machine(6).run(stream)
  if not isinstance(machine_info, dict) or machine_info.get("little_endian") is not True:
    raise WeightsError(f"{path} holds big-endian numbers; save it again on a little-endian machine")
  tensors = Machine(6)
  content = tensors.run(stream)
  keys = Machine(6).run(stream)
  if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
    raise Refused(f"the list of its storages is {brief(keys)}")
  starts = lay_out(path, source, stream.position, keys, tensors.storages)

  def locate(storage: Storage) -> int:
    if storage.key not in starts:
      raise WeightsError(f"{path}: the storage {brief(storage.key)} is missing from the file's list; {DAMAGED}")
    return starts[storage.key]

  return content, locate


def lay_out(path: Place, source: Bytes, position: int, keys: list[str], storages: dict[str, Storage]) -> dict[str, int]:
  """The byte at which each storage of the older format starts. The last one must end with the file."""
  starts: dict[str, int] = {}
  for key in keys:
    if key in starts or key not in storages:
      raise Refused(f"the storage {brief(key)} is {'listed twice' if key in starts else 'described by no tensor'}")
    storage = storages[key]
    starts[key] = position + 8
    position += 8 + storage.numel * storage.type.dtype.itemsize
    if position > source.size:
      raise WeightsError(
        f"{path} is cut off: its storage {brief(key)} ends at byte {position}, and the file has {source.size}; "
        f"{DAMAGED}"
      )
    count = int.from_bytes(source.view(starts[key] - 8, starts[key]).tobytes(), "little")
    if count != storage.numel:
      raise WeightsError(
        f"{path}: the storage {brief(key)} should have {storage.numel} elements and says {count}; {DAMAGED}"
      )
  if position != source.size:
    raise WeightsError(f"{path} goes on after its last storage, from byte {position} to {source.size}; {DAMAGED}")
  return starts


def checked_name(path: Place, name, tensor) -> str:
  """The name of a tensor, after checking that it is one."""
  if not isinstance(name, str) or not isinstance(tensor, Tensor):
    raise WeightsError(
      f"{path}: the entry {brief(name)} is {brief(tensor)}, not a tensor; save the weights alone, as "
      "`torch.save(model.state_dict(), path)`"
    )
  try:
    name.encode("utf-8")
  except UnicodeEncodeError:
    raise WeightsError(f"{path}: the name {ascii(name[:80])} is not valid text; {DAMAGED}") from None
  return name


def stored(path: Place, name: str, tensor: Tensor, locate: Locate) -> Stored:
  """Where a tensor lies in the file, after checking that it lies within its storage and not over itself."""
  offset, shape, strides, dtype = tensor.offset, tensor.shape, tensor.strides, tensor.dtype
  lists = isinstance(shape, tuple) and isinstance(strides, tuple) and is_shape(shape) and len(shape) == len(strides)
  numbers = (offset, *strides) if lists else (None,)
  if not all(type(n) is int and 0 <= n < 2**60 for n in numbers):
    raise WeightsError(
      f"{path}: tensor {brief(name)} is described by shape {brief(shape)}, strides {brief(strides)}, offset "
      f"{brief(offset)}; {DAMAGED}"
    )
  start, itemsize = locate(tensor.storage), dtype.itemsize
  size = tensor.storage.numel * tensor.storage.type.dtype.itemsize
  found = Stored(dtype, shape, tuple(stride * itemsize for stride in strides), start + offset * itemsize)
  if found.stop > start + size:
    raise WeightsError(
      f"{path}: tensor {brief(name)} of shape {brief(shape)}, strides {brief(strides)}, offset {offset} reaches beyond "
      f"its storage of {size} bytes; {DAMAGED}"
    )
  if 0 not in shape and overlaps_itself(shape, strides):
    raise WeightsError(
      f"{path}: tensor {brief(name)} of shape {brief(shape)} and strides {brief(strides)} uses numbers of its storage "
      "several times; save it again after `.contiguous()`"
    )
  return found


def overlaps_itself(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
  """Whether a step along some axis is not longer than all that the shorter steps can reach."""
  reach = 0
  for stride, length in sorted((stride, length) for stride, length in zip(strides, shape) if length > 1):
    if stride <= reach:
      return True
    reach += stride * (length - 1)
  return False
