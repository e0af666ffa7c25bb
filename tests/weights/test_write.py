"""Writing files of weights: read back by the safetensors package and by our reader, bit for bit."""

import json
import os
import shutil
import threading
import zipfile

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from mllm_jax.weights import write
from mllm_jax.weights.io import WeightsError, open_weights
from mllm_jax.weights.tensors import InMemory
from mllm_jax.weights.write import write_safetensors, write_torch_bin

BF16 = ml_dtypes.bfloat16
PACKAGE_DTYPES = [np.float64, np.float32, np.float16, BF16, np.int64, np.int32, np.int16, np.int8, np.uint64]
PACKAGE_DTYPES += [np.uint32, np.uint16, np.uint8, np.bool_]
ALL_DTYPES = [*PACKAGE_DTYPES, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]


def arrays_of(dtypes=ALL_DTYPES):
  generator = np.random.default_rng(0)
  draw = lambda shape, dtype: np.abs(generator.normal(size=shape, scale=5)).astype(np.float32).astype(dtype)
  arrays = {np.dtype(dtype).name: draw((3, 5), dtype) for dtype in dtypes}
  arrays |= {"number": np.array(2.5, np.float16), "empty": np.zeros((0, 4), BF16), "odd": draw(7, np.int8)}
  return arrays | {"ünï/code": draw((2, 3, 4), np.float32), "turned": draw((4, 6), np.float32).T}


def assert_reads_as(weights, arrays):
  assert weights.names() == sorted(arrays)
  for name, array in arrays.items():
    assert weights.dtype(name) == array.dtype and weights.shape(name) == array.shape
    assert np.ascontiguousarray(weights.read(name)).tobytes() == np.ascontiguousarray(array).tobytes(), name


class Watched(InMemory):
  """Arrays that remember how they were read."""

  def __init__(self, arrays):
    super().__init__(arrays)
    self.read_bytes, self.released = [], []
    self.lock = threading.Lock()

  def read(self, name, index=()):
    assert name not in self.released
    part = super().read(name, index)
    with self.lock:
      self.read_bytes.append(part.nbytes)
    return part

  def release(self, name):
    self.released.append(name)


def test_one_file(tmp_path):
  arrays = arrays_of()
  written = []
  paths = write_safetensors(tmp_path / "new", InMemory(arrays), metadata={"by": "mllm_jax"}, progress=written.append)
  assert paths == [tmp_path / "new" / "model.safetensors"] and os.listdir(tmp_path / "new") == ["model.safetensors"]
  assert_reads_as(open_weights(tmp_path / "new"), arrays)
  assert sum(written) == sum(array.nbytes for array in arrays.values())
  with safe_open(paths[0], framework="numpy") as file:
    assert file.metadata() == {"format": "pt", "by": "mllm_jax"}
  content = paths[0].read_bytes()
  length = int.from_bytes(content[:8], "little")
  assert length % 8 == 0
  for name, entry in json.loads(content[8 : 8 + length]).items():
    if name != "__metadata__":
      assert entry["data_offsets"][0] % arrays[name].itemsize == 0, "a tensor is aligned to its own items"


def test_the_package_reads_what_is_written(tmp_path):
  arrays = arrays_of(PACKAGE_DTYPES)
  (path,) = write_safetensors(tmp_path, InMemory(arrays))
  loaded = load_file(path)
  assert sorted(loaded) == sorted(arrays)
  for name, array in arrays.items():
    np.testing.assert_array_equal(loaded[name], array, strict=True)


@pytest.mark.parametrize("threads", [1, 4])
def test_shards_and_pieces(tmp_path, monkeypatch, threads):
  monkeypatch.setattr(write, "PIECE_BYTES", 100)
  arrays = {f"layer.{i}": np.random.default_rng(i).normal(size=(7, 5, 3)).astype(np.float32) for i in range(5)}
  arrays["small"] = np.arange(4, dtype=np.int8)
  source, written = Watched(arrays), []
  paths = write_safetensors(
    tmp_path, source, stem="adapter_model", shard_bytes=900, progress=written.append, threads=threads
  )
  titles = [f"adapter_model-{number:05}-of-00003.safetensors" for number in (1, 2, 3)]
  assert [path.name for path in paths] == titles
  assert sorted(os.listdir(tmp_path)) == [*titles, "adapter_model.safetensors.index.json"]
  index = json.loads((tmp_path / "adapter_model.safetensors.index.json").read_text())
  assert index["metadata"] == {"total_size": 5 * 420 + 4}
  assert [index["weight_map"][name] for name in arrays] == [titles[i] for i in (0, 0, 1, 1, 2, 2)]
  assert_reads_as(open_weights(tmp_path), arrays)
  assert {name: tuple(array.shape) for path in paths for name, array in load_file(path).items()} == {
    name: array.shape for name, array in arrays.items()
  }
  assert max(source.read_bytes) <= 100 and sum(source.read_bytes) == 5 * 420 + 4
  assert sorted(source.released) == sorted(arrays)
  assert len(written) == len(source.read_bytes) and sum(written) == sum(source.read_bytes)


def test_a_tensor_above_the_shards_size(tmp_path):
  arrays = {"a": np.zeros(10, np.int8), "big": np.zeros(100, np.int8), "z": np.zeros(10, np.int8)}
  assert len(write_safetensors(tmp_path, InMemory(arrays), shard_bytes=50)) == 3
  assert_reads_as(open_weights(tmp_path), arrays)


def test_nothing_to_write(tmp_path):
  (path,) = write_safetensors(tmp_path, InMemory({}))
  assert load_file(path) == {} and open_weights(path).names() == []


def test_few_pieces_are_in_memory_at_a_time(tmp_path, monkeypatch):
  monkeypatch.setattr(write, "PIECE_BYTES", 64)
  held, most, lock = 0, 0, threading.Lock()
  real_read, real_write = write.read_piece, write.write_at

  def read(*args):
    nonlocal held, most
    with lock:
      held += 1
      most = max(most, held)
    return real_read(*args)

  def written(*args):
    nonlocal held
    real_write(*args)
    with lock:
      held -= args[2] != 0  # the header is no piece

  monkeypatch.setattr(write, "read_piece", read)
  monkeypatch.setattr(write, "write_at", written)
  write_safetensors(tmp_path, InMemory({"a": np.arange(5000, dtype=np.int32)}), threads=3)
  assert held == 0 and 1 <= most <= 3


class Broken(Watched):
  def read(self, name, index=()):
    if len(self.read_bytes) >= 3:
      raise RuntimeError("the source broke")
    return super().read(name, index)


@pytest.mark.parametrize("to", ["safetensors", "bin"])
def test_an_error_leaves_what_was_there_before(tmp_path, monkeypatch, to):
  monkeypatch.setattr(write, "PIECE_BYTES", 64)
  save = lambda source: (
    write_safetensors(tmp_path, source) if to == "safetensors" else write_torch_bin(tmp_path / "model.bin", source)
  )
  save(InMemory({"a": np.arange(3)}))
  before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
  source = Broken({"a": np.arange(100_000)})
  with pytest.raises(RuntimeError, match="the source broke"):
    save(source)
  assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
  assert len(source.read_bytes) == 3, "the rest is not read"
  save(InMemory({"a": np.arange(5)}))
  assert open_weights(tmp_path).shape("a") == (5,)


def test_a_source_that_does_not_keep_its_word(tmp_path):
  class Liar(InMemory):
    def dtype(self, name):
      return np.dtype(np.float16)

  with pytest.raises(WeightsError, match=r"tensor a came as float32 \(3,\) where float16 \(3,\) was announced"):
    write_safetensors(tmp_path, Liar({"a": np.zeros(3, np.float32)}))


def test_a_full_disk_is_found_before_anything_is_read(tmp_path, monkeypatch):
  source = Watched({"a": np.zeros(10**6, np.float32)})
  usage = shutil.disk_usage(tmp_path)._replace(free=10**3)
  with monkeypatch.context() as patch:
    patch.setattr(shutil, "disk_usage", lambda path: usage)
    for save in (lambda: write_safetensors(tmp_path, source), lambda: write_torch_bin(tmp_path / "x.bin", source)):
      with pytest.raises(WeightsError, match=r"0.00. GB are needed and 0.000 GB are free; make room"):
        save()

  def full(file, start, size):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(os, "posix_fallocate", full)
  with pytest.raises(WeightsError, match="0.004 GB are needed and .* GB are free; make room"):
    write_safetensors(tmp_path, source)
  assert source.read_bytes == [] and os.listdir(tmp_path) == []


def test_a_file_system_that_cannot_take_space_ahead(tmp_path, monkeypatch):
  def unsupported(file, start, size):
    raise OSError(95, "Operation not supported")

  monkeypatch.setattr(os, "posix_fallocate", unsupported)
  write_safetensors(tmp_path, InMemory(arrays_of()))
  assert_reads_as(open_weights(tmp_path), arrays_of())


def test_what_cannot_be_written(tmp_path):
  complex_ = InMemory({"a": np.zeros(3, np.complex64)})
  with pytest.raises(WeightsError, match="tensor a of type complex64 cannot be written as safetensors"):
    write_safetensors(tmp_path, complex_)
  with pytest.raises(WeightsError, match="tensor a of type complex64 cannot be written for torch"):
    write_torch_bin(tmp_path / "model.bin", complex_)
  with pytest.raises(WeightsError, match="__metadata__"):
    write_safetensors(tmp_path, InMemory({"__metadata__": np.zeros(3)}))
  with pytest.raises(WeightsError, match="gs://bucket/model is remote; write to a local folder"):
    write_safetensors("gs://bucket/model", InMemory({}))
  write_safetensors(tmp_path, InMemory({"a": np.zeros(10), "b": np.zeros(10)}), shard_bytes=80)
  with pytest.raises(WeightsError, match="model-00001-of-00002.safetensors, .* of another checkpoint; remove them"):
    write_safetensors(tmp_path, InMemory({"a": np.zeros(10)}))
  write_safetensors(tmp_path, InMemory({"a": np.ones(10), "b": np.zeros(10)}), shard_bytes=80)  # the same names
  assert open_weights(tmp_path).read("a")[0] == 1


def test_torch_files(tmp_path, monkeypatch):
  monkeypatch.setattr(write, "PIECE_BYTES", 24)
  arrays, written = arrays_of(), []
  source = Watched(arrays)
  write_torch_bin(tmp_path / "new" / "pytorch_model.bin", source, progress=written.append)
  assert os.listdir(tmp_path / "new") == ["pytorch_model.bin"]
  weights = open_weights(tmp_path / "new")
  assert_reads_as(weights, arrays)
  assert sum(written) == sum(array.nbytes for array in arrays.values())
  assert source.released == list(arrays) and max(source.read_bytes) <= 24
  content = (tmp_path / "new" / "pytorch_model.bin").read_bytes()
  for name in ("float32", "turned", "odd"):
    place = content.index(np.ascontiguousarray(arrays[name]).tobytes())
    assert place % 64 == 0, "torch maps storages that start at multiples of 64"


def test_torch_files_above_four_gigabytes(tmp_path, monkeypatch):
  """The 64-bit records of zip archives, brought about by a limit of 50 bytes instead of 4 GB."""
  monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 50)
  write_torch_bin(tmp_path / "model.bin", InMemory(arrays_of()))
  assert (tmp_path / "model.bin").read_bytes().count(b"\xff\xff\xff\xff") > 20
  assert_reads_as(open_weights(tmp_path), arrays_of())
