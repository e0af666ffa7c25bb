"""Damaged and hostile files: each is read whole or refused with a WeightsError, and takes no more memory than it has.

The seeds are fixed, so a failure says its number and can be repeated: `mutant(kind, number)` is the file.
"""

import io
import json
import random
import re
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch_bytes
from safetensors.numpy import save

from mllm_jax.weights.io import WeightsError, open_weights

MUTANTS = {"safetensors": 2700, "zip": 3500, "legacy": 3000, "index": 1400}
# Of Python's own: the opened file, the parsed header or pickle, the message. The seeds are of one or two kilobytes.
MEMORY = 2**18
INTERESTING = (0, 1, 2, 7, 8, 64, 127, 128, 255, 256, 4095, 2**15, 2**16 - 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1)
INTERESTING += (2**32, 2**53, 2**60, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
JSON_VALUES = [
  "-1",
  "1.5",
  "1e400",
  "null",
  "true",
  '"12"',
  "[]",
  "{}",
  "[[[[1]]]]",
  "[" * 2000,
  "9" * 5000,
  '"\\ud800"',
]
JSON_VALUES += ['{"a":1,"a":2}', "[0,0]", "[0,8]", "[8,0]", "NaN", '"BF16"', '"F4"', '"../model"', '"/etc/passwd"']
JSON_VALUES += [str(n) for n in INTERESTING]
OPCODES = [
  b"r\xff\xff\xff\x7f",  # LONG_BINPUT of a huge index
  b"j\xff\xff\xff\x7f",
  b"\x8d" + struct.pack("<Q", 2**62),  # BINUNICODE8 of a huge length
  b"X\xff\xff\xff\x7f",
  b"B\xff\xff\xff\x7f",
  b"\x8b\xff\xff\xff\x7f",
  b"\x95" + struct.pack("<Q", 2**63),
  b"cos\nsystem\n",
  b"cbuiltins\neval\n",
  b"\x8c\x05posix\x8c\x06system\x93",
  b"ctorch\nFloatStorage\n",
  b"ctorch.storage\nUntypedStorage\n",
  b"ctorch._utils\n_rebuild_tensor_v3\n",
  b"ccollections\nOrderedDict\n",
  b"\x8a\xff" + b"\x7f" * 255,
  b"G\x7f\xf8\x00\x00\x00\x00\x00\x00",
  b"I" + b"9" * 3000 + b"\n",
  b"2\x86" * 60,  # pairs of the same pair: 2**60 leaves
  *[bytes([code]) for code in b"(.)N]}abetuslRQo012\x81\x85\x86\x87\x88\x89\x91\x93\x94"],
]


def seed(kind):
  """A small file of each kind that reads well."""
  if kind == "safetensors":
    arrays = {"a": np.arange(12, dtype=np.float32).reshape(3, 4), "b.weight": np.ones(3, np.float16)}
    return save(arrays | {"empty": np.zeros((0, 5), np.int8), "number": np.array(3, np.int64)}, {"format": "pt"})
  if kind == "index":
    weight_map = {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}
    return json.dumps({"metadata": {"total_size": 24}, "weight_map": weight_map}).encode()
  return torch_bytes.example(legacy=kind == "legacy")


def damaged(content, rng):
  """A few changes of bytes anywhere."""
  content = bytearray(content)
  for _ in range(rng.choice((1, 1, 1, 2, 4, 8))):
    start, length = rng.randrange(len(content) + 1), rng.choice((1, 1, 2, 4, 8, 16, 100))
    chunk = content[start : start + length]
    change = rng.randrange(9)
    if change == 0 and chunk:
      content[start] ^= 1 << rng.randrange(8)
    elif change == 1 and chunk:
      content[start] = rng.choice((0, 1, 0x28, 0x2E, 0x7F, 0x80, 0xFF))
    elif change == 2:
      del content[start:]
    elif change == 3:
      content[start:start] = rng.randbytes(length)
    elif change == 4:
      del content[start : start + length]
    elif change == 5:
      content[start:start] = chunk * rng.choice((1, 2, 50))
    elif change == 6:
      other = rng.randrange(len(content) + 1)
      content[start : start + length], content[other : other + length] = content[other : other + length], chunk
    elif change == 7:
      width = rng.choice((2, 4, 8))
      content[start : start + width] = (rng.choice(INTERESTING) % 2 ** (8 * width)).to_bytes(width, "little")
    elif change == 8:
      content[start:start] = rng.choice(OPCODES)
    if not content:
      break
  return bytes(content)


def edited_object(content, rng):
  """JSON that is still JSON, with values of it replaced, removed, or put elsewhere."""
  content = json.loads(content)
  for _ in range(rng.choice((1, 1, 2, 3))):
    places, stack = [], [content]
    while stack:
      part = stack.pop()
      for key in part if isinstance(part, dict) else range(len(part)):
        places.append((part, key))
        stack += [part[key]] if isinstance(part[key], dict | list) else []
    if not places:
      break
    part, key = rng.choice(places)
    other, place = rng.choice(places)
    change = rng.randrange(5)
    if change == 0 and isinstance(part, dict):
      part[rng.choice(("", "a", "dtype", "__metadata__", "\0", "x" * 3000))] = part.pop(key)
    elif change == 1:
      del part[key]
    elif change == 2 and not isinstance(other[place], dict | list):
      part[key] = other[place]
    elif type(part[key]) is int:
      part[key] = rng.choice((*INTERESTING, -1, part[key] + 1, part[key] - 1, part[key] * 2, part[key] * 1.0, True))
    else:
      part[key] = rng.choice(
        ([], {}, None, -1, 0, "F16", "F32", "BF16", "U8", [0, 0], [2**62, 4], [0, 2**64], [[]], 1.5)
      )
  return json.dumps(content)


def edited_text(text, rng):
  """JSON with a number, text, list or object of it replaced or doubled, whatever comes out."""
  for _ in range(rng.choice((1, 1, 2, 3))):
    parts = list(re.finditer(r'\d+|"[^"]*"|\[[^\[\]]*\]|\{[^{}]*\}', text))
    if not parts:
      return text
    part, change = rng.choice(parts), rng.randrange(6)
    new = rng.choice(JSON_VALUES)
    if change == 4:
      new = part[0] + "," + part[0]
    elif change == 5:
      new = rng.choice(parts)[0]
    text = text[: part.start()] + new + text[part.end() :]
  return text


def edited_header(content, rng):
  """A safetensors file with a header of the right length that says something else."""
  end = 8 + int.from_bytes(content[:8], "little")
  text = rng.choice((edited_text, edited_object))(content[8:end].decode(), rng).encode()
  return len(text).to_bytes(8, "little") + text + content[end:]


def edited_pickle(pickle, rng):
  """A pickle with opcodes put in, or with one of its numbers changed."""
  if rng.randrange(2):
    return damaged(pickle, rng)
  places = [match.start() for match in re.finditer(rb"\x8a.", pickle, re.DOTALL)]
  place = rng.choice(places)
  size = pickle[place + 1]
  value = rng.choice(INTERESTING + (-1, -(2**63), 3, 4, 5, 11, 12, 13, 2**200))
  return pickle[:place] + torch_bytes.number(value) + pickle[place + 2 + size :]


def edited_zip(content, rng):
  """An archive whose checksums are right and whose pickle, names or sizes are not; or one with a wrong directory."""
  if rng.randrange(2):
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
      entries = {name: archive.read(name) for name in archive.namelist()}
    pickle = edited_pickle(entries.pop("archive/data.pkl"), rng)
    storages = {name.removeprefix("archive/data/"): entry for name, entry in entries.items() if "/data/" in name}
    if not rng.randrange(4):
      key = rng.choice(list(storages))
      storages[key] = damaged(storages[key], rng)
    return torch_bytes.zip_file(pickle, storages, rng.choice((zipfile.ZIP_STORED,) * 9 + (zipfile.ZIP_DEFLATED,)))
  marks = [match.start() for match in re.finditer(rb"PK(\x01\x02|\x03\x04|\x05\x06)", content)]
  content = bytearray(content)
  for _ in range(rng.choice((1, 1, 2))):
    place, width = rng.choice(marks) + rng.randrange(4, 46), rng.choice((1, 2, 4))
    value = rng.choice(INTERESTING + (len(content), len(content) - 1, *marks)) % 2 ** (8 * width)
    content[place : place + width] = value.to_bytes(width, "little")
  return bytes(content)


def edited_legacy(content, rng):
  """The same of the older format, where nothing is to be put right."""
  end = content.index(b"e.") + 2
  return edited_pickle(content[:end], rng) + content[end:]


def mutant(kind, number):
  """The file of that number."""
  rng = random.Random(f"{kind} {number}")
  content = seed(kind)
  if number % 2:
    return damaged(content, rng)
  if kind == "index":
    return rng.choice((edited_text, edited_object))(content.decode(), rng).encode()
  return {"safetensors": edited_header, "zip": edited_zip, "legacy": edited_legacy}[kind](content, rng)


def read_all(path):
  """Reads every number of a file: True, or False where it is refused."""
  try:
    weights = open_weights(path)
  except WeightsError as error:
    assert len(str(error)) < 5000
    return False
  for name in weights.names():
    array = weights.read(name)
    assert array.shape == weights.shape(name) and array.dtype == weights.dtype(name)
    assert array.nbytes <= path.parent.joinpath(weights.file(name)).stat().st_size
    array.tobytes()
    weights.release(name)
  return True


@pytest.mark.parametrize("kind", MUTANTS)
def test_mutants_are_read_or_refused(tmp_path, kind):
  name = {"safetensors": "model.safetensors", "index": "model.safetensors.index.json"}.get(kind, "model.bin")
  path = tmp_path / name
  if kind == "index":
    for file, names in {"one": "a", "two": "bc"}.items():
      (tmp_path / f"{file}.safetensors").write_bytes(save({name: np.zeros(2, np.float32) for name in names}))
  path.write_bytes(seed(kind))
  assert read_all(path)
  read = 0
  tracemalloc.start()
  try:
    for number in range(MUTANTS[kind]):
      content = mutant(kind, number)
      path.write_bytes(content)
      tracemalloc.reset_peak()
      before = tracemalloc.get_traced_memory()[0]
      try:
        read += read_all(path)
      except Exception as error:
        raise AssertionError(f"mutant {number} of {kind}") from error
      peak = tracemalloc.get_traced_memory()[1] - before
      assert peak <= len(content) + MEMORY, f"mutant {number} of {kind}: {peak} bytes for {len(content)}"
  finally:
    tracemalloc.stop()
  # Neither is everything refused, which would hide what reading does, nor much of it let through.
  assert 0.01 < read / MUTANTS[kind] < 0.5, read
