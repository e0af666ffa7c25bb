"""Reading files of weights: safetensors and PyTorch's .bin, which are written here by hand, without torch."""

import collections
import io
import json
import os
import pickle
import sys
import types
import zipfile

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import save_file

from mllm_jax.weights import torch_pickle
from mllm_jax.weights.io import WeightsError, open_weights

BF16 = ml_dtypes.bfloat16
STORAGES = {np.dtype(dtype): name for name, dtype in torch_pickle.STORAGE_DTYPES.items()}


class Stored:
  """A tensor as the pickler below writes it: a view of a storage, counted in elements."""

  def __init__(self, key, storage, offset, shape, strides, parameter=False):
    self.key, self.storage, self.offset, self.shape, self.strides = key, storage, offset, shape, strides
    self.parameter = parameter


def whole(key, array):
  strides = tuple(stride // array.itemsize for stride in array.strides)
  return Stored(key, array, 0, array.shape, strides)


def stand_in(module, name):
  """A function or class that a pickle names as `module.name`, as torch's pickles name torch's."""
  member = type(name, (), {}) if name.endswith("Storage") else lambda *args: None
  member.__module__, member.__qualname__, member.__name__ = module, name, name
  return member


NAMES = [("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter")]
NAMES += [("torch", name) for name in STORAGES.values()]
MEMBERS = {name: stand_in(*name) for name in NAMES}


class TorchPickler(pickle.Pickler):
  """Writes `Stored` tensors the way torch does."""

  def persistent_id(self, obj):
    if isinstance(obj, np.ndarray):
      key = next(key for key, array in self.storages.items() if array is obj)
      return ("storage", MEMBERS["torch", STORAGES[obj.dtype]], key, "cpu", obj.size)
    return None

  def reducer_override(self, obj):
    if not isinstance(obj, Stored):
      return NotImplemented
    self.storages[obj.key] = obj.storage
    args = (obj.storage, obj.offset, obj.shape, obj.strides, False, collections.OrderedDict())
    if obj.parameter:
      tensor = Stored(obj.key, obj.storage, obj.offset, obj.shape, obj.strides)
      return MEMBERS["torch._utils", "_rebuild_parameter"], (tensor, True, collections.OrderedDict())
    return MEMBERS["torch._utils", "_rebuild_tensor_v2"], args


@pytest.fixture
def torch_names(monkeypatch):
  """Lets the pickler find the names it writes."""
  modules = {module: types.ModuleType(module) for module, _ in NAMES}
  for (module, name), member in MEMBERS.items():
    setattr(modules[module], name, member)
  for module, content in modules.items():
    monkeypatch.setitem(sys.modules, module, content)


def save_bin(path, content, compression=zipfile.ZIP_STORED, byteorder="little"):
  """What torch.save(content, path) writes."""
  buffer = io.BytesIO()
  pickler = TorchPickler(buffer, 2)
  pickler.storages = {}
  pickler.dump(content)
  with zipfile.ZipFile(path, "w", compression) as archive:
    archive.writestr("archive/data.pkl", buffer.getvalue())
    archive.writestr("archive/byteorder", byteorder)
    for key, array in pickler.storages.items():
      archive.writestr(f"archive/data/{key}", array.tobytes())
    archive.writestr("archive/version", "3\n")


def numbers(shape, dtype, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def test_bin_tensors_of_every_kind(tmp_path, torch_names):
  """Whole, transposed, part of a storage that others share, a parameter, empty, and a single number."""
  a, shared = numbers((3, 4), np.float32), numbers(24, np.float16, 1)
  state = collections.OrderedDict(
    a=whole("0", a),
    b=whole("1", numbers((2, 5), BF16, 2)),
    turned=Stored("2", shared, 2, (4, 3), (1, 5)),
    part=Stored("2", shared, 7, (2, 2), (6, 1)),
    parameter=Stored("0", a, 4, (4,), (1,), parameter=True),
    empty=Stored("3", np.zeros(0, np.float32), 0, (0, 7), (7, 1)),
    number=Stored("4", np.array([41, 42]), 1, (), ()),
  )
  state._metadata = collections.OrderedDict(version=1)  # modules put it there, and it is pickled with the dictionary
  save_bin(tmp_path / "pytorch_model.bin", state)
  weights = open_weights(tmp_path)
  assert weights.names() == sorted(state)
  np.testing.assert_array_equal(weights.read("a"), a)
  np.testing.assert_array_equal(weights.read("a", (slice(1, 3), slice(0, 2))), a[1:3, :2])
  np.testing.assert_array_equal(weights.read("b"), numbers((2, 5), BF16, 2))
  assert weights.dtype("b") == BF16 and weights.dtype("turned") == np.float16
  expected = np.array([[shared[2 + i + 5 * j] for j in range(3)] for i in range(4)])
  np.testing.assert_array_equal(weights.read("turned"), expected)
  np.testing.assert_array_equal(weights.read("turned", (slice(1, 3), slice(2, 3))), expected[1:3, 2:3])
  np.testing.assert_array_equal(weights.read("part"), [[shared[7], shared[8]], [shared[13], shared[14]]])
  np.testing.assert_array_equal(weights.read("parameter"), a[1])
  assert weights.shape("empty") == (0, 7) and weights.read("empty").size == 0
  assert weights.shape("number") == () and weights.read("number") == 42


def test_bin_shards(tmp_path, torch_names):
  for number, name in enumerate("ab"):
    save_bin(tmp_path / f"pytorch_model-{number}.bin", {name: whole("0", numbers((2, 3), np.float16, number))})
  index = {"weight_map": {"a": "pytorch_model-0.bin", "b": "pytorch_model-1.bin"}}
  (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
  weights = open_weights(tmp_path)
  np.testing.assert_array_equal(weights.read("b"), numbers((2, 3), np.float16, 1))
  assert weights.file("b").name == "pytorch_model-1.bin"


class Hostile:
  def __init__(self, function, *args):
    self.function, self.args = function, args

  def __reduce__(self):
    return self.function, self.args


@pytest.mark.parametrize(
  "content, named",
  [
    ({"a": Hostile(os.system, "touch owned")}, "system"),
    ({"a": Hostile(eval, "open('owned', 'w')")}, "eval"),
    ({"a": Hostile(getattr, "", "join")}, "getattr"),
    ({"a": np.float64(1)}, "numpy"),
    (Hostile(os.mkdir, "owned"), "mkdir"),
  ],
)
def test_a_pickle_that_calls_anything_is_refused(tmp_path, torch_names, monkeypatch, content, named):
  monkeypatch.chdir(tmp_path)
  save_bin(tmp_path / "model.bin", content)
  with pytest.raises(WeightsError, match=f"model.bin is refused.*{named}"):
    open_weights(tmp_path / "model.bin")
  assert not (tmp_path / "owned").exists()


A = np.arange(12, dtype=np.float32)


@pytest.mark.parametrize(
  "tensor",
  [
    Stored("0", A, 0, (13,), (1,)),
    Stored("0", A, 1, (3, 4), (4, 1)),
    Stored("0", A, -1, (3,), (1,)),
    Stored("0", A, 11, (2,), (-1,)),
    Stored("0", A, 0, (2,), (10**12,)),
    Stored("0", A, 0, (2**62, 2**62), (0, 1)),
    Stored("0", A, 0, (3, 4), (4,)),
    Stored("0", A, 0, (2.0,), (1,)),
    Stored("0", A, 0, "33", (1, 1)),
    5,
    {"nested": 1},
  ],
)
def test_a_tensor_outside_its_storage_is_refused(tmp_path, torch_names, tensor):
  save_bin(tmp_path / "model.bin", {"a": tensor})
  with pytest.raises(WeightsError, match="model.bin.*a"):
    open_weights(tmp_path / "model.bin")


def test_bin_files_that_are_not_what_they_should_be(tmp_path, torch_names):
  path = tmp_path / "model.bin"

  def refused(match):
    with pytest.raises(WeightsError, match=match):
      open_weights(path)

  save_bin(path, {"a": whole("0", A)})
  content = path.read_bytes()
  path.write_bytes(content[:-40])
  refused("model.bin is damaged: it is cut off.*download it again")
  path.write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.")  # how torch.save began before 1.6
  refused("model.bin is refused: its pickle is damaged or cut off.*download it again")
  path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
  refused("Git LFS pointer")
  path.write_bytes(b"")
  refused("no PyTorch file")
  save_bin(path, {"a": whole("0", A)}, compression=zipfile.ZIP_DEFLATED)
  refused("compressed")
  save_bin(path, {"a": whole("0", A)}, byteorder="big")
  refused("big-endian")
  save_bin(path, [1, 2])
  refused("a list instead of a dictionary")
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("readme.txt", "")
  refused("without the data.pkl")


def test_safetensors_slices_of_every_type(tmp_path):
  arrays = {np.dtype(dtype).name: numbers((4, 6), dtype) for dtype in (np.float32, np.float16, BF16, np.int64)}
  save_file(arrays | {"number": np.array(3, np.float32)}, tmp_path / "anything.safetensors")
  weights = open_weights(tmp_path)
  for name, array in arrays.items():
    assert weights.dtype(name) == array.dtype and weights.shape(name) == (4, 6)
    np.testing.assert_array_equal(weights.read(name), array)
    part = weights.read(name, (slice(1, 3), slice(2, 6)))
    assert part.dtype == array.dtype
    np.testing.assert_array_equal(part, array[1:3, 2:6])
  assert weights.read("number") == 3
  with pytest.raises(ValueError, match="does not fit"):
    weights.read("float32", (slice(0, 1),))


@settings(max_examples=30, deadline=None)
@given(data=st.data(), shape=hnp.array_shapes(min_dims=1, max_dims=4, max_side=6))
def test_any_slice_equals_numpys(tmp_path_factory, data, shape):
  array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
  path = tmp_path_factory.mktemp("slices") / "model.safetensors"
  save_file({"a": array}, path)
  index = []
  for length in shape:
    start = data.draw(st.integers(0, length - 1))
    index.append(slice(start, data.draw(st.integers(start + 1, length))))
  np.testing.assert_array_equal(open_weights(path).read("a", tuple(index)), array[tuple(index)])


def shards(folder, weight_map, **files):
  for name, arrays in files.items():
    save_file({key: np.zeros(2, np.float32) for key in arrays}, folder / f"{name}.safetensors")
  text = weight_map if isinstance(weight_map, str) else json.dumps({"weight_map": weight_map})
  (folder / "model.safetensors.index.json").write_text(text)


def test_shards_and_what_can_be_wrong_with_them(tmp_path):
  both = {"a": "one.safetensors", "b": "two.safetensors"}
  shards(tmp_path, both, one=["a"], two=["b"])
  assert open_weights(tmp_path).names() == ["a", "b"]

  def refused(match, weight_map, **files):
    shards(tmp_path, weight_map, **files)
    with pytest.raises(WeightsError, match=match):
      open_weights(tmp_path)

  refused("a stands in both one.safetensors and two.safetensors", both, one=["a"], two=["a", "b"])
  refused("one.safetensors lacks 1 tensors.*first a", both, one=["c"], two=["b"])
  refused("files outside its folder: ../two.safetensors", both | {"b": "../two.safetensors"}, one=["a"])
  refused("three.safetensors does not exist.*hf download", both | {"c": "three.safetensors"}, one=["a"], two=["b"])
  refused("twice", '{"weight_map": {"a": "one.safetensors", "a": "two.safetensors"}}')
  refused("cannot be read as JSON", "{")
  refused("no weight_map", "{}")
  shards(tmp_path, both, one=["a"], two=["b"], model=["a", "b"])
  with pytest.raises(WeightsError, match="both model.safetensors and model.safetensors.index.json"):
    open_weights(tmp_path)


def test_folders_without_one_checkpoint(tmp_path):
  with pytest.raises(WeightsError, match="does not exist.*hf download openai/clip-vit-large-patch14-336 --local-dir"):
    open_weights(tmp_path / "clip-vit-large-patch14-336")
  with pytest.raises(WeightsError, match="model.safetensors, adapter_model.safetensors.*hf download REPOSITORY"):
    open_weights(tmp_path)
  for name in ("x.safetensors", "y.safetensors"):
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / name)
  with pytest.raises(WeightsError, match="x.safetensors, y.safetensors and no index"):
    open_weights(tmp_path)
  (tmp_path / "notes.txt").write_text("")
  with pytest.raises(WeightsError, match="neither .safetensors nor .bin"):
    open_weights(tmp_path / "notes.txt")
  (tmp_path / "x.safetensors").write_bytes((tmp_path / "y.safetensors").read_bytes()[:-3])
  with pytest.raises(WeightsError, match="x.safetensors cannot be read as safetensors.*download it again"):
    open_weights(tmp_path / "x.safetensors")
  with pytest.raises(WeightsError, match="has no tensor b"):
    open_weights(tmp_path / "y.safetensors").read("b")
