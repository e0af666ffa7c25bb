"""Hostile and damaged files of torch.save, each with one thing wrong; and the format before torch 1.6."""

import io
import struct
import zipfile

import numpy as np
import pytest
from torch_bytes import (
  EXPECTED,
  ORDERED_DICT,
  A,
  dictionary,
  example,
  legacy_file,
  number,
  storage,
  tensor,
  text,
  zip_file,
)

from mllm_jax.weights import torch_bin, torch_pickle, torch_zip
from mllm_jax.weights.io import WeightsError, open_weights

FORMATS = pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])


def file_of(pickle, legacy):
  """A file with the storage A, which the older format lists only where the pickle mentions it."""
  return legacy_file(pickle, {"0": A} if b"tQ" in pickle else {}) if legacy else zip_file(pickle, {"0": A.tobytes()})


@pytest.fixture
def refused(tmp_path, monkeypatch):
  """Says that a file is refused with a message, and that nothing was run."""
  monkeypatch.chdir(tmp_path)

  def check(content, match):
    (tmp_path / "model.bin").write_bytes(content)
    with pytest.raises(WeightsError, match=match):
      open_weights(tmp_path / "model.bin")
    assert [path.name for path in tmp_path.iterdir()] == ["model.bin"]

  return check


@FORMATS
def test_tensors_that_share_storages(tmp_path, legacy):
  (tmp_path / "model.bin").write_bytes(example(legacy))
  weights = open_weights(tmp_path)
  assert weights.names() == sorted(EXPECTED)
  for name, array in EXPECTED.items():
    assert weights.dtype(name) == array.dtype
    np.testing.assert_array_equal(weights.read(name), array, strict=True)
  np.testing.assert_array_equal(weights.read("turned", (slice(1, 3), slice(0, 2))), A.reshape(3, 4).T[1:3, :2])
  np.testing.assert_array_equal(weights.read("part", (slice(1, 2), slice(0, 1))), [[A[9]]])
  assert weights.read("a", (slice(2, 2), slice(0, 4))).shape == (0, 4)
  assert not weights.read("a").flags.writeable


SYSTEM = b"cos\nsystem\n" + text("touch owned") + b"\x85R"
EVAL = b"cbuiltins\neval\n" + text("open('owned', 'w')") + b"\x85R"


@FORMATS
@pytest.mark.parametrize(
  "pickle, named",
  [
    (dictionary(("a", SYSTEM)), "os.system"),
    (dictionary(("a", EVAL)), "builtins.eval"),
    (b"\x80\x02" + EVAL + b".", "builtins.eval"),
    (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "os.system"),
    (dictionary(("a", tensor(tail=SYSTEM))), "os.system"),  # among the arguments of what is allowed
    (b"\x80\x02" + ORDERED_DICT + b"}" + text("x") + EVAL + b"sb.", "builtins.eval"),  # in what BUILD sets
    (b"\x80\x02" + ORDERED_DICT + b"N}" + text("__class__") + text("x") + b"s\x86b.", "sets the state of a dict"),
    (dictionary(("a", tensor() + b"}" + text("dtype") + text("x") + b"sb")), "sets the state of a Tensor"),
    (b"\x80\x02" + ORDERED_DICT + b"R.", "takes a value where there is none"),
    (b"\x80\x02" + text("x") + b")R.", "calls 'x'"),
    (b"\x80\x02(ios\nsystem\n.", "uses INST"),
    (b"\x80\x02Pxyz\n.", "uses PERSID"),
    (b"\x80\x02ctorch._utils\n_rebuild_qtensor\n.", "torch._utils._rebuild_qtensor"),
    (b"\x80\x02ctorch\nFloatStorage.__init__\n.", "torch.FloatStorage.__init__"),
    (b"\x80\x02(" + text("module") + b"ctorch\nFloatStorage\nNNtQ.", "'module' instead of a storage"),
  ],
)
def test_code_is_refused_by_name(refused, legacy, pickle, named):
  pickle = pickle.replace(b"tQ", b"NtQ") if legacy else pickle  # the older format describes storages by six parts
  refused(file_of(pickle, legacy), f"model.bin is refused.*{named}.*torch.save")


@FORMATS
@pytest.mark.parametrize(
  "parts, message",
  [
    (dict(shape=(13,), strides=(1,)), r"tensor 'a' of shape \(13\).*beyond its storage of 48 bytes"),
    (dict(offset=1), r"tensor 'a' of shape \(3, 4\).*offset 1 reaches beyond its storage of 48 bytes"),
    (dict(shape=(2**40, 2**19), strides=(2**19, 1)), "beyond its storage of 48 bytes"),
    (dict(shape=(2**62, 2**62), strides=(1, 1)), "'a' is described by shape"),
    (dict(shape=(2**62, 0, 2**62), strides=(1, 1, 1)), "'a' is described by shape"),
    (dict(shape=(-3, 4)), r"'a' is described by shape \(-3, 4\)"),
    (dict(offset=-1), "offset -1"),
    (dict(strides=(4, 2**200)), "a number of 201 bits"),
    (dict(shape=(1,) * 65, strides=(1,) * 65), "a tuple of 65"),
    (dict(shape=(3,)), "'a' is described by shape"),
    (dict(shape=(4, 4), strides=(0, 1)), "'a' of shape .* several times; save it again after `.contiguous"),
    (dict(shape=(10, 3), strides=(1, 1)), "several times"),
    (dict(shape=(4, 3), strides=(2, 1)), "several times"),
    (dict(numel=13), "storage '0' should have (52 bytes|13 elements)|is cut off: its storage '0'"),
    (dict(numel=2**59), "storage '0'.* (2305843009213693952|[0-9]{19})"),
    (dict(numel=-1), "'0' of a StorageType with -1 elements"),
    (dict(key="7"), "storage '7' is missing|the storage '0' is described by no tensor"),
    (dict(tail=b"}" + text("conj") + b"\x88s"), "metadata, which changes what its numbers mean"),
  ],
)
def test_tensors_that_do_not_fit_their_storage(refused, legacy, parts, message):
  refused(file_of(dictionary(("a", tensor(legacy=legacy, **parts))), legacy), message)


def test_lengths_of_one_do_not_overlap(tmp_path):
  """transformers keeps position ids as arange(n).expand(1, -1), whose first stride means nothing."""
  (tmp_path / "model.bin").write_bytes(zip_file(dictionary(("a", tensor((1, 12), (0, 1)))), {"0": A.tobytes()}))
  np.testing.assert_array_equal(open_weights(tmp_path).read("a"), A[None])


@FORMATS
def test_names_and_storages_that_stand_twice(refused, legacy):
  one = tensor(legacy=legacy)
  refused(file_of(dictionary(("a", one), ("a", one)), legacy), "the name 'a' stands twice")
  half = tensor((12,), (1,), kind="HalfStorage", legacy=legacy)
  refused(file_of(dictionary(("a", one), ("b", half)), legacy), "describes the storage '0' twice, differently")


@FORMATS
def test_what_would_take_memory_or_time(refused, legacy, monkeypatch):
  """Indices and lengths out of the file, and structures that are small only while nobody writes them out."""
  pair = b"\x80\x02N" + b"q\x00h\x00\x86" * 70  # 2**70 leaves
  refused(file_of(b"\x80\x02N" + b"r\xff\xff\xff\x7f" + b"j\xff\xff\xff\x7f0.", legacy), "uses POP")
  refused(file_of(b"\x80\x02j\xff\xff\xff\x7f.", legacy), "fetches value 2147483647")
  refused(file_of(b"\x80\x02\x8d" + struct.pack("<Q", 2**40) + b"x.", legacy), "damaged or cut off")
  refused(file_of(b"\x80\x02X\xff\xff\xff\x7fx.", legacy), "damaged or cut off")
  refused(file_of(pair + b".", legacy), "holds a tuple instead of a dictionary")
  refused(file_of(pair[:2] + b"}" + pair[2:] + b"Ns.", legacy), "a tuple of 2 as a key")
  refused(file_of(dictionary(("a", pair[2:])), legacy), "'a' is a tuple of 2, not a tensor")
  refused(file_of(b"\x80\x02" + b"]" + b"q\x00h\x00a" + b".", legacy), "holds a list")  # a list in itself
  refused(file_of(b"\x80\x02N" + b"\x85" * 200_000 + b".", legacy), "holds a tuple")
  monkeypatch.setattr(torch_pickle, "OPCODES", 5000)
  refused(file_of(b"\x80\x02" + b"}" * 5000 + b".", legacy), "more than 5000 opcodes")
  monkeypatch.setattr(torch_pickle, "PICKLE_BYTES", 5000)
  monkeypatch.setattr(torch_bin, "PICKLE_BYTES", 5000)
  long = b"\x80\x02X" + struct.pack("<I", 5000) + b"x" * 5000 + b"."
  refused(file_of(long, legacy), "damaged or cut off" if legacy else "its data.pkl has 5008 bytes; 5000 are the most")


@FORMATS
def test_dictionaries_in_dictionaries(refused, legacy):
  inner = b"}" + text("a") + tensor(legacy=legacy) + b"s"
  refused(file_of(dictionary(("state_dict", inner)), legacy), "'state_dict' is a dict, not a tensor.*state_dict()")
  refused(file_of(dictionary(("a", tensor(legacy=legacy)), ("epoch", b"K\x05")), legacy), "'epoch' is 5, not a tensor")


PICKLE = dictionary(("a", tensor()))


def test_compressed_entries(refused):
  content = zip_file(PICKLE + b"\0" * 50_000_000, {"0": A.tobytes()}, zipfile.ZIP_DEFLATED)
  assert len(content) < 100_000
  refused(content, "model.bin is damaged: the entry 'archive/data.pkl' is compressed")


def test_entries_that_overlap(refused):
  """Both storages list the same bytes; and the directory's entry lies about where it is."""
  pickle = dictionary(("a", tensor()), ("b", tensor(key="1")))
  content = bytearray(zip_file(pickle, {"0": A.tobytes(), "1": A.tobytes()}))
  places = [content.index(b"archive/data/" + key, content.index(b"PK\x01\x02")) - 46 for key in (b"0", b"1")]
  first = content[places[0] + 42 : places[0] + 46]
  content[places[1] + 42 : places[1] + 46] = first
  refused(content, "'archive/data/1' has another name, size or form in its own header")
  # With a header of its own inside the first one's bytes.
  inner = bytearray(zip_file(b"", {"1": A[:2].tobytes()}))
  inner = inner[inner.index(b"PK", 10) : inner.index(b"PK", inner.index(b"archive/data/1"))]
  outer = zip_file(dictionary(("a", tensor((2,), (1,), key="1", numel=2))), {"0": bytes(inner), "1": A[:2].tobytes()})
  outer = bytearray(outer)
  place = outer.index(b"archive/data/1", outer.index(b"PK\x01\x02")) - 46
  outer[place + 42 : place + 46] = struct.pack("<I", outer.index(inner))
  refused(outer, "'archive/data/0' and 'archive/data/1' overlap")


def test_entries_that_stand_twice(refused):
  buffer = io.BytesIO(zip_file(PICKLE, {"0": A.tobytes()}))
  with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(buffer, "a") as archive:
    archive.writestr("archive/data/0", A.tobytes())
  refused(buffer.getvalue(), "'archive/data/0' stands there twice")


def test_a_directory_without_end(refused, monkeypatch):
  content = zip_file(PICKLE, {str(number): b"" for number in range(100)})
  monkeypatch.setattr(torch_zip, "ENTRIES", 101)
  refused(content, "it lists 102 entries in [0-9]+ bytes, and 101 in")
  monkeypatch.setattr(torch_zip, "ENTRIES", 102)
  monkeypatch.setattr(torch_zip, "DIRECTORY_BYTES", 5000)
  refused(content, "and 102 in 5000 are the most that is read")


def test_a_changed_pickle(refused):
  content = zip_file(PICKLE, {"0": A.tobytes()})
  refused(content.replace(number(12) + b"tQ", number(11) + b"tQ"), "checksum of its data.pkl")


def test_legacy_files_with_one_thing_wrong(refused):
  pickle = dictionary(("a", tensor(legacy=True)))
  content = legacy_file(pickle, {"0": A})
  refused(content[:-1], "is cut off: its storage '0' ends at byte")
  refused(content + b"\0", "goes on after its last storage")
  refused(content[:60], "damaged or cut off")
  refused(content[: -A.nbytes - 8] + struct.pack("<Q", 11) + A.tobytes(), "should have 12 elements and says 11")
  refused(legacy_file(pickle, {"0": A}, magic=7), "a pickle, but not one of torch.save")
  refused(legacy_file(pickle, {"0": A}, version=1002), "of version 1002")
  big = b"\x80\x02}" + text("little_endian") + b"\x89s."
  refused(legacy_file(pickle, {"0": A}, machine=big), "big-endian")
  refused(legacy_file(pickle, {"0": A}, keys=["0", "0"]), "storage '0' is listed twice")
  refused(legacy_file(pickle, {"0": A}, keys=["1"]), "storage '1' is described by no tensor")
  refused(legacy_file(pickle, {}), "storage '0' is missing from the file's list")
  view = storage(legacy=True).removesuffix(b"NtQ") + b"(" + text("0") + number(0) + number(4) + b"ttQ"
  refused(legacy_file(b"\x80\x02" + view + b".", {"0": A}), "is a view of another")
  refused(zip_file(dictionary(("a", tensor(legacy=True))), {"0": A.tobytes()}), "described by 6 parts")
  refused(b"storages".ljust(257, b"\0") + b"ustar\x0000" + b"\0" * 248, "is a tar archive.*save it again")
