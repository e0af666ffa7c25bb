"""Files of torch.save, made by hand from opcodes, so that tests can say things in them that torch would not."""

import io
import struct
import zipfile

import numpy as np

ORDERED_DICT = b"ccollections\nOrderedDict\n)R"
MAGIC, VERSION = 0x1950A86A20F9469CFC6C, 1001
LITTLE = b"\x80\x02}X\x0d\x00\x00\x00little_endian\x88s."


def text(value):
  content = value.encode()
  return b"X" + struct.pack("<I", len(content)) + content


def number(value):
  """A whole number of up to 127 bytes."""
  content = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
  return b"\x8a" + bytes([len(content)]) + content


def numbers(values):
  return b"(" + b"".join(map(number, values)) + b"t"


def storage(key="0", kind="FloatStorage", numel=12, legacy=False):
  """A reference to a storage."""
  return (
    b"("
    + text("storage")
    + f"ctorch\n{kind}\n".encode()
    + text(key)
    + text("cpu")
    + number(numel)
    + (b"N" if legacy else b"")
    + b"tQ"
  )


def tensor(shape=(3, 4), strides=(4, 1), offset=0, legacy=False, tail=b"", **of_storage):
  """A call that builds a tensor; `tail`: more arguments."""
  return (
    b"ctorch._utils\n_rebuild_tensor_v2\n("
    + storage(legacy=legacy, **of_storage)
    + number(offset)
    + numbers(shape)
    + numbers(strides)
    + b"\x89"
    + ORDERED_DICT
    + tail
    + b"tR"
  )


def dictionary(*items):
  """The pickle of a dictionary: (name, value's opcodes)."""
  return b"\x80\x02" + ORDERED_DICT + b"(" + b"".join(text(name) + value for name, value in items) + b"u."


def zip_file(pickle, storages, compression=zipfile.ZIP_STORED):
  """A file of torch 1.6 and later."""
  buffer = io.BytesIO()
  with zipfile.ZipFile(buffer, "w") as archive:
    archive.writestr("archive/data.pkl", pickle, compression)
    for key, content in storages.items():
      archive.writestr(f"archive/data/{key}", content)
    archive.writestr("archive/version", "3\n")
  return buffer.getvalue()


def legacy_file(pickle, storages, keys=None, magic=MAGIC, version=VERSION, machine=LITTLE):
  """A file of torch before 1.6; `storages`: arrays by key."""
  listed = b"\x80\x02](" + b"".join(map(text, storages if keys is None else keys)) + b"e."
  head = b"\x80\x02" + number(magic) + b"." + b"\x80\x02" + number(version) + b"." + machine + pickle + listed
  return head + b"".join(struct.pack("<Q", array.size) + array.tobytes() for array in storages.values())


A = np.arange(12, dtype=np.float32)
HALF = np.arange(6, dtype=np.float16)
EXAMPLE = (
  ("a", dict(shape=(3, 4), strides=(4, 1))),
  ("turned", dict(shape=(4, 3), strides=(1, 4))),
  ("part", dict(shape=(2, 2), strides=(4, 1), offset=5)),
  ("half", dict(shape=(6,), strides=(1,), key="1", kind="HalfStorage", numel=6)),
  ("empty", dict(shape=(0, 7), strides=(7, 1))),
  ("number", dict(shape=(), strides=(), offset=11)),
)
EXPECTED = {
  "a": A.reshape(3, 4),
  "turned": A.reshape(3, 4).T,
  "part": A.reshape(3, 4)[1:, 1:3],
  "half": HALF,
  "empty": np.zeros((0, 7), np.float32),
  "number": np.float32(11),
}


def example(legacy=False):
  """A file of either format with the tensors of EXPECTED, some of which share a storage."""
  pickle = dictionary(*((name, tensor(legacy=legacy, **parts)) for name, parts in EXAMPLE))
  if legacy:
    return legacy_file(pickle, {"0": A, "1": HALF})
  return zip_file(pickle, {"0": A.tobytes(), "1": HALF.tobytes()})
