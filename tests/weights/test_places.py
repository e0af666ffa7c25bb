"""Files wherever they are: local, in fsspec's memory, and in a bucket that is another memory."""

import collections
import importlib
import json
import mmap
import sys
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch_bytes
from buckets import Bucket
from safetensors.numpy import save

from mllm_jax import places
from mllm_jax.places import PlaceError
from mllm_jax.weights.io import WeightsError, open_weights
from mllm_jax.weights.known import read_json

ARRAYS = {"a": np.arange(600, dtype=np.float32).reshape(20, 30), "b": np.arange(5, dtype=np.float16)}


@pytest.fixture(params=["memory", "gs"])
def remote(request, monkeypatch):
  """A folder with a sharded checkpoint, one in a .bin file, and a configuration."""
  if request.param == "gs":
    fsspec.register_implementation("gs", Bucket, clobber=True)
    monkeypatch.setattr(Bucket, "fetched", [])
  system = fsspec.filesystem(request.param)
  shards = {"model-1.safetensors": save({"a": ARRAYS["a"]}), "model-2.safetensors": save({"b": ARRAYS["b"]})}
  index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
  files = shards | {"model.safetensors.index.json": json.dumps(index).encode(), "config.json": b'{"width": 3}'}
  for name, content in files.items():
    system.pipe_file(f"/models/llama/{name}", content)
  system.pipe_file("/models/old/pytorch_model.bin", torch_bytes.example())
  system.pipe_file("/models/older/pytorch_model.bin", torch_bytes.example(legacy=True))
  yield f"{request.param}://models"
  system.rm("/models", recursive=True)
  if request.param == "gs":
    del sys.modules["fsspec.registry"]._registry["gs"]


def test_checkpoints_are_read_from_afar(remote):
  weights = open_weights(f"{remote}/llama")
  assert weights.names() == ["a", "b"] and weights.file("a") == f"{remote}/llama/model-1.safetensors"
  for name, array in ARRAYS.items():
    np.testing.assert_array_equal(weights.read(name), array, strict=True)
    weights.release(name)
  for name in ("old", "older", "old/pytorch_model.bin"):
    weights = open_weights(f"{remote}/{name}")
    for tensor, array in torch_bytes.EXPECTED.items():
      np.testing.assert_array_equal(weights.read(tensor), array, strict=True)


@pytest.mark.parametrize("remote", ["gs"], indirect=True)
def test_only_the_rows_of_a_slice_are_fetched_and_only_once(remote):
  weights = open_weights(f"{remote}/llama")
  Bucket.fetched.clear()
  for columns in (slice(0, 10), slice(10, 30)):
    part = weights.read("a", (slice(5, 9), columns))
    np.testing.assert_array_equal(part, ARRAYS["a"][5:9, columns])
    assert not part.flags.writeable
  assert Bucket.fetched == [4 * 30 * 4]
  weights.release("a")
  weights.read("a", (slice(5, 6), slice(0, 1)))
  assert Bucket.fetched == [4 * 30 * 4, 30 * 4]


def test_paths(remote):
  folder = f"{remote}/llama"
  assert places.is_remote(folder) and places.is_remote(Path(folder)) and not places.is_remote("models/llama")
  assert places.place(Path(folder)) == folder and places.place("file:///x/y") == Path("/x/y")
  assert places.join(folder + "/", "config.json") == f"{folder}/config.json"
  assert places.parent(f"{folder}/config.json") == folder and places.base_name(folder + "/") == "llama"
  assert places.is_dir(folder) and not places.is_file(folder) and places.exists(folder)
  assert places.is_file(f"{folder}/config.json") and not places.exists(f"{folder}/nothing")
  expected = ["config.json", "model-1.safetensors", "model-2.safetensors", "model.safetensors.index.json"]
  assert places.names(folder) == places.names(folder + "/") == expected
  assert places.size(f"{folder}/config.json") == 12
  assert places.read_text(f"{folder}/config.json") == '{"width": 3}'
  assert read_json(f"{folder}/config.json", "a configuration") == {"width": 3}
  with pytest.raises(PlaceError, match="config.json has 12 bytes, and at most 11"):
    places.read_bytes(f"{folder}/config.json", 11)
  for absent in (f"{remote}/nothing", f"{folder}/x.safetensors"):
    with pytest.raises(WeightsError, match=f"{absent}.* does not exist: looked for .* check the path"):
      open_weights(absent)


def test_local_copies(remote, tmp_path):
  copy = places.local_copy(f"{remote}/llama", ["config.json", "tokenizer.json"])
  assert copy.name == "llama" and [path.name for path in copy.iterdir()] == ["config.json"]
  assert (copy / "config.json").read_text() == '{"width": 3}'
  assert places.local_copy(f"{remote}/llama/", ["config.json"]) == copy
  assert places.local_copy(tmp_path, ["anything"]) == tmp_path
  with pytest.raises(ValueError, match="not the name of a file"):
    places.local_copy(f"{remote}/llama", ["../old/pytorch_model.bin"])


def test_a_file_that_changes_while_it_is_read(remote):
  weights = open_weights(f"{remote}/llama")
  system = fsspec.filesystem(remote.split(":")[0])
  system.pipe_file("/models/llama/model-1.safetensors", b"short")
  with pytest.raises(PlaceError, match="model-1.safetensors: 0 bytes came instead of 2400.*start again"):
    weights.read("a")


def test_protocols_without_their_package(monkeypatch):
  real = importlib.import_module

  def without(name, *rest):
    if name in ("gcsfs", "s3fs"):
      raise ImportError(f"No module named {name!r}")
    return real(name, *rest)

  for protocol in ("gs", "s3"):
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, protocol, raising=False)
  monkeypatch.setattr(importlib, "import_module", without)
  with pytest.raises(PlaceError, match="gs://bucket/model: the package that reads gs://.*pip install gcsfs"):
    open_weights("gs://bucket/model")
  with pytest.raises(PlaceError, match="pip install s3fs"):
    open_weights("s3://bucket/model")
  with pytest.raises(PlaceError, match="nothing is known that reads nonsense://"):
    open_weights("nonsense://bucket/model")


def test_errors_of_a_service_name_the_path(remote, monkeypatch):
  def broken(*args, **options):
    raise RuntimeError("401 Anonymous caller")

  system = type(fsspec.filesystem(remote.split(":")[0]))
  weights = open_weights(f"{remote}/llama")
  with monkeypatch.context() as patch:
    patch.setattr(system, "cat_file", broken)
    with pytest.raises(PlaceError, match="model-1.safetensors cannot be read .RuntimeError: 401.*credentials"):
      weights.read("a")
    patch.setattr(system, "isdir", broken)
    with pytest.raises(PlaceError, match="/llama cannot be read .RuntimeError: 401"):
      open_weights(f"{remote}/llama")


def resident(path):
  """Bytes of a mapped file that are in this process's memory."""
  found, inside = collections.Counter(), ""
  for line in Path("/proc/self/smaps").read_text().splitlines():
    first, *rest = line.split()
    if "-" in first and not first.endswith(":"):
      inside = rest[-1] if rest else ""
    elif first == "Rss:":
      found[inside] += int(rest[0]) * 1024
  return found[str(path)]


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux says what is resident")
def test_released_pages_leave_memory(tmp_path):
  arrays = {name: np.ones((2**20, 2), np.float32) for name in "abcd"}  # 8 MiB each
  (tmp_path / "model.safetensors").write_bytes(save(arrays))
  weights = open_weights(tmp_path)
  for name in arrays:
    assert weights.read(name).sum() == 2**21
    assert resident(tmp_path / "model.safetensors") >= 2**23
    weights.release(name)
    assert resident(tmp_path / "model.safetensors") <= 64 * mmap.PAGESIZE
  assert weights.read("a")[5, 1] == 1  # and come back


def test_bytes_stay_within_the_file(tmp_path):
  (tmp_path / "x").write_bytes(b"abc")
  source = places.open_bytes(tmp_path / "x")
  assert source.size == 3 and source.view(1, 3).tobytes() == b"bc" and not source.view(0, 1).flags.writeable
  for start, stop in ((-1, 2), (0, 4), (2, 1)):
    with pytest.raises(ValueError, match="do not lie within 3 bytes"):
      source.view(start, stop)
  (tmp_path / "empty").write_bytes(b"")
  assert places.open_bytes(tmp_path / "empty").view(0, 0).size == 0
