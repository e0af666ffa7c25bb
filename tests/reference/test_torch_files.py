"""Files of PyTorch against PyTorch itself: what it writes is read, what is written here it reads."""

import collections
import zipfile

import ml_dtypes
import numpy as np
import pytest

from mllm_jax.weights.io import WeightsError, open_weights
from mllm_jax.weights.tensors import InMemory
from mllm_jax.weights.write import write_safetensors, write_torch_bin

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")

YOUNG = [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64]
OLD = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8]
OLD += [torch.uint8, torch.bool]


def values(tensor):
  """A tensor's bytes as numpy has them, without going through a type that numpy lacks."""
  return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(weights, state):
  assert weights.names() == sorted(state)
  for name, tensor in state.items():
    assert weights.shape(name) == tuple(tensor.shape), name
    assert weights.dtype(name).name == str(tensor.dtype).removeprefix("torch."), name
    assert np.ascontiguousarray(weights.read(name)).tobytes() == values(tensor), name
    weights.release(name)


def state_of_every_kind():
  generator = torch.Generator().manual_seed(0)
  draw = lambda *shape: torch.randn(*shape, generator=generator)
  shared = draw(6, 8)
  state = collections.OrderedDict(
    plain=draw(3, 4),
    turned=draw(5, 7).t(),
    permuted=draw(2, 3, 4).permute(2, 0, 1),
    rows=shared[1:4],
    columns=shared[:, 2:5],
    steps=shared[::2, ::3],
    tied=shared,
    parameter=torch.nn.Parameter(draw(4)),
    number=torch.tensor(3.5),
    empty=torch.zeros(0, 3),
    empty_slice=shared[6:],
    row_of_one=torch.arange(5).expand(1, -1),
  )
  for dtype in OLD:
    state[f"of_{dtype}"] = (draw(9) * 5).to(dtype)
  return state


@pytest.mark.parametrize("zip_format", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
def test_what_torch_saves(tmp_path, zip_format, protocol):
  state = state_of_every_kind()
  path = tmp_path / "pytorch_model.bin"
  torch.save(state, path, _use_new_zipfile_serialization=zip_format, pickle_protocol=protocol)
  assert_same(open_weights(path), state)


def test_files_without_checksums(tmp_path):
  torch.serialization.set_crc32_options(False)
  try:
    torch.save({"a": torch.arange(5.0)}, tmp_path / "model.bin")
  finally:
    torch.serialization.set_crc32_options(True)
  np.testing.assert_array_equal(open_weights(tmp_path).read("a"), np.arange(5.0))


@pytest.mark.parametrize("zip_format", [True, False])
def test_what_a_module_saves(tmp_path, zip_format):
  """Its dictionary carries `_metadata`, and its tensors are parameters and buffers."""
  module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Embedding(5, 3))
  torch.save(module.state_dict(), tmp_path / "model.bin", _use_new_zipfile_serialization=zip_format)
  assert_same(open_weights(tmp_path), module.state_dict())


@pytest.mark.parametrize("zip_format", [True, False])
def test_types_without_a_storage_of_their_own(tmp_path, zip_format):
  state = {str(dtype): torch.arange(6).reshape(2, 3).to(dtype).t() for dtype in YOUNG}
  torch.save(state, tmp_path / "model.bin", _use_new_zipfile_serialization=zip_format)
  assert_same(open_weights(tmp_path), state)


@pytest.mark.parametrize("zip_format", [True, False])
@pytest.mark.parametrize(
  "content, named",
  [
    (lambda: {"state_dict": {"a": torch.zeros(2)}, "epoch": 3, "loss": 0.5}, "'state_dict' is a dict"),
    (lambda: {"a": torch.zeros(1).expand(4)}, "'a' of shape .4. and strides .0. uses numbers .* several times"),
    (lambda: {"a": torch.zeros(2, dtype=torch.complex64)}, "torch.ComplexFloatStorage"),
    (lambda: {"a": torch.zeros(2, 2).to_sparse()}, "_rebuild_sparse_tensor"),
    (lambda: torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear|a whole model"),
  ],
)
def test_what_torch_saves_and_is_refused(tmp_path, zip_format, content, named):
  torch.save(content(), tmp_path / "model.bin", _use_new_zipfile_serialization=zip_format)
  with pytest.raises(WeightsError, match=named):
    open_weights(tmp_path)


def arrays_of_every_kind():
  generator = np.random.default_rng(0)
  arrays = {
    "number": np.array(2.5, np.float32),
    "empty": np.zeros((0, 4), np.float16),
    "ünï/code.w": np.ones(3, np.int8),
  }
  kinds = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.int32, np.int16, np.int8, np.uint8]
  kinds += [np.bool_, np.uint16, np.uint32, np.uint64, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]
  for dtype in kinds:
    arrays[np.dtype(dtype).name] = generator.normal(size=(3, 5), scale=4).astype(np.float32).__abs__().astype(dtype)
  return arrays


@pytest.mark.parametrize("wide", [True, False], ids=["64 bits", "32 bits"])
@pytest.mark.parametrize("mapped", [True, False], ids=["mapped", "read"])
def test_torch_reads_what_is_written(tmp_path, monkeypatch, mapped, wide):
  """`wide`: with the records that archives above 4 GB have."""
  if wide:
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 20)
  arrays = arrays_of_every_kind()
  write_torch_bin(tmp_path / "model.bin", InMemory(arrays))
  loaded = torch.load(tmp_path / "model.bin", weights_only=True, mmap=mapped)
  assert isinstance(loaded, collections.OrderedDict) and list(loaded) == list(arrays)
  for name, array in arrays.items():
    assert str(loaded[name].dtype) == f"torch.{array.dtype}" and tuple(loaded[name].shape) == array.shape
    assert values(loaded[name]) == array.tobytes(), name


def test_torch_reads_safetensors_as_written(tmp_path):
  from safetensors.torch import load_file

  arrays = arrays_of_every_kind()
  (path,) = write_safetensors(tmp_path, InMemory(arrays))
  loaded = load_file(path)
  assert {name: values(tensor) for name, tensor in loaded.items()} == {n: a.tobytes() for n, a in arrays.items()}
