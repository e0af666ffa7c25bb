"""Reading the header of a .safetensors file.

The format: 8 bytes with the length of the header (little-endian), the header as a JSON object, the tensors' bytes. The
header has {"dtype", "shape", "data_offsets": [first, one past the last]} for each name, counted from its own end, and
optionally "__metadata__", texts by name. https://huggingface.co/docs/safetensors
"""

import json
import math

import ml_dtypes
import numpy as np

from mllm_jax.places import Bytes, Place
from mllm_jax.weights.errors import WeightsError, brief, pointer_or
from mllm_jax.weights.known import unique
from mllm_jax.weights.stored import Stored, contiguous, is_shape

DTYPES = {
  "F64": np.float64,
  "F32": np.float32,
  "F16": np.float16,
  "BF16": ml_dtypes.bfloat16,
  "F8_E4M3": ml_dtypes.float8_e4m3fn,
  "F8_E5M2": ml_dtypes.float8_e5m2,
  "I64": np.int64,
  "I32": np.int32,
  "I16": np.int16,
  "I8": np.int8,
  "U64": np.uint64,
  "U32": np.uint32,
  "U16": np.uint16,
  "U8": np.uint8,
  "BOOL": np.bool_,
}
HEADER_BYTES = 100_000_000  # the format's own limit
HEADER_VALUES = 4_000_000  # of the JSON: 100 MB of empty lists would take gigabytes once parsed
METADATA = "__metadata__"


def parse(path: Place, source: Bytes) -> dict[str, Stored]:
  """The tensors of a .safetensors file.

  Raises WeightsError for anything the format does not allow: a header beyond the end of the file or above 100 MB, a
  name that stands twice, a tensor whose bytes do not match its shape and type, gaps or overlaps between tensors, bytes
  that no tensor claims. A type that is not read here, such as the 4-bit ones, is refused too, since the extents of its
  tensors could not be checked. Whatever the file says, reading its header takes less than 1 GiB of memory beyond the
  file's own size.
  """
  try:
    start, header = read_header(source)
    return tensors(header, start, source.size)
  except HeaderError as error:
    remedy = pointer_or(source.view(0, min(64, source.size)).tobytes(), error.remedy)
    raise WeightsError(f"{path} cannot be read as safetensors ({error}); {remedy}") from error


class HeaderError(Exception):
  """What is wrong with a header."""

  def __init__(self, message: str, remedy: str = "it is damaged or cut off, download it again"):
    super().__init__(message)
    self.remedy = remedy


def read_header(source: Bytes) -> tuple[int, dict]:
  """Where the tensors' bytes start, and the header."""
  if source.size < 8:
    raise HeaderError(f"it has {source.size} bytes, too few for a header")
  length = int.from_bytes(source.view(0, 8).tobytes(), "little")
  if length > min(HEADER_BYTES, source.size - 8):
    raise HeaderError(f"its header should have {length} bytes; the file has {source.size}, the format allows 100 MB")
  content = source.view(8, 8 + length).tobytes()
  source.release(8, 8 + length)
  values = sum(content.count(mark) for mark in (b",", b"[", b"{"))
  if values > HEADER_VALUES:
    raise HeaderError(f"its header has {values} values, and {HEADER_VALUES} are the most that is read")
  try:
    header = json.loads(content.decode("utf-8"), object_pairs_hook=unique)
  except RecursionError:
    raise HeaderError("its header is nested too deeply") from None
  except ValueError as error:
    raise HeaderError(f"its header is not JSON: {str(error)[:200]}") from error
  if not isinstance(header, dict):
    raise HeaderError(f"its header is {brief(header)} instead of an object")
  metadata = header.pop(METADATA, {})
  if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
    raise HeaderError(f"{METADATA} is not an object of texts")
  return 8 + length, header


def tensors(header: dict, start: int, size: int) -> dict[str, Stored]:
  """The tensors that a header describes, checked to fill the bytes from `start` to `size` without gap or overlap."""
  found = {name: tensor(name, entry, start) for name, entry in header.items()}
  end, before = start, ""
  for name, stored in sorted(found.items(), key=lambda item: (item[1].start, item[1].stop)):
    if stored.start != end:
      what = "overlaps" if stored.start < end else "leaves a gap after"
      raise HeaderError(
        f"tensor {brief(name)} starts at byte {brief(stored.start - start)} of the data and {what} "
        f"{brief(before) if before else 'the header'}, which ends at {brief(end - start)}"
      )
    end, before = stored.stop, name
  if end != size:
    raise HeaderError(f"its tensors need {brief(end)} bytes with the header, and the file has {size}")
  return found


def tensor(name: str, entry, start: int) -> Stored:
  """One entry of a header."""
  if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
    raise HeaderError(f"the entry {brief(name)} has not exactly dtype, shape and data_offsets")
  check_name(name)
  shape, offsets, stored = entry["shape"], entry["data_offsets"], entry["dtype"]
  if not isinstance(stored, str) or stored not in DTYPES:
    raise HeaderError(
      f"tensor {brief(name)} is stored as {brief(stored)}, which is not read here",
      "use a checkpoint in float16, bfloat16 or float32",
    )
  if not isinstance(shape, list) or not is_shape(shape):
    raise HeaderError(f"tensor {brief(name)} has the shape {brief(shape)}")
  if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int and 0 <= n < 2**63 for n in offsets):
    raise HeaderError(f"tensor {brief(name)} has the data_offsets {brief(offsets)}")
  dtype = np.dtype(DTYPES[stored])
  needed = math.prod(shape) * dtype.itemsize
  if offsets[1] - offsets[0] != needed:
    raise HeaderError(
      f"tensor {brief(name)} of shape {brief(shape)} in {stored} needs {needed} bytes, and its data_offsets are "
      f"{brief(offsets)}"
    )
  return Stored(dtype, tuple(shape), contiguous(shape, dtype.itemsize), start + offsets[0])


def check_name(name: str) -> None:
  """JSON can escape half a character, which nothing can write again."""
  try:
    name.encode("utf-8")
  except UnicodeEncodeError:
    raise HeaderError(f"the name {ascii(name[:80])} is not valid text") from None
