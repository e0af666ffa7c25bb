"""The same numbers on every mesh, and everything where the table says."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from steps import CONFIG, Training, make_batch

from mllm_jax import parameters, sharding
from mllm_jax.config import ConfigError, MeshConfig
from mllm_jax.models.mllm import abstract

SHAPES = [
  MeshConfig(),
  MeshConfig(data=2, fsdp=2, tensor=2),
  MeshConfig(data=1, fsdp=2, tensor=4),
  MeshConfig(data=8, fsdp=1),
]


def first_gradient(training: Training) -> dict[str, np.ndarray]:
  """The gradient of the first step, out of Adam's first moment: (1 - 0.9) g."""
  return {path: np.asarray(moment) / 0.1 for path, moment in training.state.optimizer[0].mu.items()}


@pytest.fixture(scope="module")
def one_device():
  training = Training(steps=4)
  losses = [training.step(make_batch(8))["loss"]]
  gradient = first_gradient(training)
  return losses + [training.step(make_batch(8, seed))["loss"] for seed in range(1, 4)], gradient


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape.data}x{shape.fsdp}x{shape.tensor}")
def test_eight_devices_give_the_losses_and_gradients_of_one(shape, one_device):
  losses, gradient = one_device
  training = Training(shape, devices=8, steps=4)
  found = [training.step(make_batch(8))["loss"]]
  for path, value in first_gradient(training).items():
    # Gradients of DFI's key biases are zero but for rounding, hence the floor.
    np.testing.assert_allclose(value, gradient[path], atol=1e-4 * np.abs(gradient[path]).max() + 1e-7, err_msg=path)
  found += [training.step(make_batch(8, seed))["loss"] for seed in range(1, 4)]
  np.testing.assert_allclose(found, losses, rtol=1e-5)
  assert training.compiled._cache_size() == 1


def test_state_lies_where_the_table_says_before_and_after_a_step():
  training = Training(MeshConfig(data=1, fsdp=4, tensor=2), devices=8)
  expected = {
    "projector/sfe/kernels/3": P(None, None, ("fsdp", "tensor"), None),
    "projector/head/kernel": P("fsdp", "tensor"),
    "decoder/layers/q_proj/lora/a": P(None, "fsdp", None),
    "decoder/layers/down_proj/lora/b": P(None, None, "fsdp"),
    "projector/head/bias": P(None),
  }
  for _ in range(2):
    moments = training.state.optimizer[0].mu
    for path, spec in expected.items():
      assert training.state.trainable[path].sharding.is_equivalent_to(
        jax.sharding.NamedSharding(training.mesh, spec), training.state.trainable[path].ndim
      ), path
      assert moments[path].sharding.is_equivalent_to(training.state.trainable[path].sharding, moments[path].ndim), path
    training.step(make_batch(4))
  assert training.frozen["decoder/layers/o_proj/kernel"].sharding.spec == P(None, "tensor", "fsdp")
  assert training.frozen["decoder/embedding"].sharding.spec == P("tensor", "fsdp")


def test_every_parameter_has_a_rule_and_large_ones_are_sharded():
  mesh = sharding.make_mesh(MeshConfig(), jax.devices())
  _, shapes = parameters.flatten(abstract(CONFIG))
  for path, place in sharding.parameter_shardings(shapes, mesh).items():
    if path.endswith("kernel") and "/dfi/" not in path or "/kernels/" in path:
      assert "fsdp" in jax.tree.leaves(tuple(place.spec)), path
  with pytest.raises(ConfigError, match="no rule for the parameter somewhere/else"):
    sharding.partition_spec("somewhere/else", (3,), mesh)


def test_a_dimension_that_its_axis_does_not_divide_stays_whole():
  mesh = sharding.make_mesh(MeshConfig(), jax.devices())
  assert sharding.partition_spec("decoder/embedding", (7, 12), mesh) == P("tensor", None)


@pytest.mark.parametrize(
  "config", [MeshConfig(data=3), MeshConfig(data=-1, fsdp=-1), MeshConfig(fsdp=4), MeshConfig(data=0)]
)
def test_axes_that_do_not_make_up_the_devices(config):
  with pytest.raises(ConfigError, match=f"mesh.data={config.data}, mesh.fsdp={config.fsdp}"):
    sharding.make_mesh(config, jax.devices())


# ---- several slices --------------------------------------------------------------------------------------------------


@pytest.fixture
def two_slices(monkeypatch):
  """Devices with even numbers are one slice, the others another."""
  kind = type(jax.devices()[0])
  monkeypatch.setattr(kind, "slice_index", property(lambda device: device.id % 2), raising=False)


@pytest.mark.parametrize(
  "config, sizes, within",
  [
    (MeshConfig(), (2, 4, 1), ("fsdp",)),  # replicas over the slices, parameters gathered within one
    (MeshConfig(data=2, fsdp=1, tensor=-1), (4, 1, 2), ("tensor",)),
    (MeshConfig(fsdp=2, tensor=2), (2, 2, 2), ("fsdp", "tensor")),
    (MeshConfig(dcn_data=1, dcn_fsdp=2), (1, 8, 1), ()),
    (MeshConfig(tensor=2, dcn_data=1, dcn_tensor=-1), (1, 2, 4), ("fsdp",)),
  ],
)
def test_axes_over_slices(two_slices, config, sizes, within):
  mesh = sharding.make_mesh(config)
  assert tuple(mesh.shape.values()) == sizes
  slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
  for axis, name in enumerate(sharding.AXES):
    crosses = (slices != np.take(slices, [0], axis)).any()
    # A slice's part of an axis lies side by side.
    assert not crosses or (np.diff(slices, axis=axis) != 0).any(axis=tuple({0, 1, 2} - {axis})).sum() == 1, name
    assert not (crosses and name in within), name
  assert sharding.batch_shards(mesh) == sizes[0] * sizes[1]


def test_the_rows_of_a_batch_and_parameters_over_slices(two_slices):
  mesh = sharding.make_mesh(MeshConfig(tensor=2))
  rows = {0: set(), 1: set()}
  for shard in sharding.to_device(make_batch(8), mesh).tokens.addressable_shards:
    rows[shard.device.slice_index] |= set(range(8)[shard.index[0]])
  assert rows == {0: {0, 1, 2, 3}, 1: {4, 5, 6, 7}}
  # An axis has its size over all slices: 16 divides by 8, 4 only by a slice's share of it.
  wide = sharding.make_mesh(MeshConfig(dcn_data=1, dcn_fsdp=2))
  assert sharding.partition_spec("decoder/head", (16, 12), wide) == P("fsdp", "tensor")
  assert sharding.partition_spec("decoder/head", (4, 12), wide) == P(None, "tensor")


@pytest.mark.parametrize(
  "config, words",
  [
    (MeshConfig(fsdp=8), "mesh.fsdp=8, mesh.tensor=1 does not make up the 4 devices of a slice"),
    (MeshConfig(dcn_data=3), "mesh.dcn_data=3, mesh.dcn_fsdp=1, mesh.dcn_tensor=1 does not make up the 2 slices"),
    (MeshConfig(dcn_fsdp=-1), "at most one of them -1"),
  ],
)
def test_axes_that_do_not_make_up_the_slices(two_slices, config, words):
  with pytest.raises(ConfigError, match=words):
    sharding.make_mesh(config)


def test_one_slice_has_no_axis_over_slices():
  with pytest.raises(ConfigError, match="mesh.dcn_data=2, .* does not make up the 1 slices"):
    sharding.make_mesh(MeshConfig(dcn_data=2))


@pytest.mark.parametrize(
  "config, shares",
  [
    (MeshConfig(), [(0, 4), (1, 4), (2, 4), (3, 4)]),
    (MeshConfig(tensor=2), [(0, 4), (1, 4), (2, 4), (3, 4)]),
    (MeshConfig(tensor=4), [(0, 2), (0, 2), (1, 2), (1, 2)]),
    (MeshConfig(tensor=8), [(0, 1)] * 4),
  ],
)
def test_processes_that_an_axis_tensor_runs_through_make_the_same_rows(monkeypatch, config, shares):
  mesh = sharding.make_mesh(config)
  monkeypatch.setattr(type(jax.devices()[0]), "process_index", property(lambda device: device.id // 2))
  assert [sharding.row_share(mesh, process) for process in range(4)] == shares
  firsts = [shares.index(share) == process for process, share in enumerate(shares)]
  assert [sharding.first_of_share(mesh, process) for process in range(4)] == firsts


def test_rows_that_are_shared_in_part(monkeypatch):
  mesh = sharding.make_mesh(MeshConfig(tensor=2))
  owners = [0, 0, 0, 1, 1, 1, 2, 2]
  monkeypatch.setattr(type(jax.devices()[0]), "process_index", property(lambda device: owners[device.id]))
  with pytest.raises(ConfigError, match="data 1, fsdp 4, tensor 2 the processes share some rows of a batch"):
    sharding.row_share(mesh, 0)
