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
