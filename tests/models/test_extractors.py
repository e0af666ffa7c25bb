"""Spatial tokens that nothing released computes, against the same sums in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import released
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm_jax import parameters, sharding
from mllm_jax.config import MeshConfig, ProjectorConfig
from mllm_jax.models.projectors import maps
from mllm_jax.models.projectors.spatial import EXTRACTORS, SpatialProjector

WIDTH, GRID = 6, 8


@pytest.fixture(scope="module")
def patch_map():
  return np.random.default_rng(0).normal(size=(2, GRID, GRID, WIDTH)).astype(np.float32)


def make(**fields):
  config = ProjectorConfig(conv_width=5, dfi_kernel=0, **fields)
  return config, EXTRACTORS[config.sfe](config, GRID, WIDTH, rngs=nnx.Rngs(0))


def number(x) -> np.ndarray:
  return np.asarray(x[...] if isinstance(x, nnx.Param) else x, np.float64)


@pytest.mark.parametrize("kind", ["cropping", "pooling"])
def test_factorised_kernels_are_kernels(kind, patch_map):
  """Each is a kernel over its whole map that is a sum of patterns by mixtures."""
  config, sfe = make(sfe="factorised", maps=kind, stride=2, depth_multiplier=3)
  found = released.jit(lambda sfe, x: sfe(x))(sfe, patch_map)
  assert found.shape == (2, 2, 5)
  for place, one_map in enumerate(maps.make(config, jnp.asarray(patch_map))):
    depthwise, pointwise = number(sfe.depthwise[place]), number(sfe.pointwise[place].kernel).reshape(WIDTH, 3, 5)
    kernel = np.einsum("hwcm,cme->hwce", depthwise, pointwise)
    expected = np.einsum("bhwc,hwce->be", number(one_map), kernel)
    np.testing.assert_allclose(found[:, place], expected, rtol=0, atol=1e-5)  # float32 sums of up to 64 products


def test_zeros_of_factorised_kernels_can_learn(patch_map):
  _, sfe = make(sfe="factorised", conv_init="zeros")
  assert not np.asarray(sfe(patch_map)).any()
  gradient = released.jit(jax.grad(lambda sfe, x: sfe(x).sum()))(sfe, patch_map)
  assert all(np.asarray(x).any() for path, x in parameters.flatten(gradient)[1].items() if "pointwise" in path)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.integers(1, GRID), st.integers(1, GRID), st.integers(1, GRID))
def test_windows_run_down_the_map_and_across_it(size, down, across):
  patch_map = np.random.default_rng(size).normal(size=(1, GRID, GRID, WIDTH)).astype(np.float32)
  config, sfe = make(sfe="windows", window=size, window_strides=(down, across))
  kernel = number(sfe.kernel)
  expected = [
    np.einsum("hwc,hwce->e", patch_map[0, i : i + size, j : j + size].astype(np.float64), kernel)
    for i in range(0, GRID - size + 1, down)
    for j in range(0, GRID - size + 1, across)
  ]
  found = np.asarray(sfe(jnp.asarray(patch_map)))[0]
  assert len(found) == len(expected) == maps.spatial_tokens(config, GRID)
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_details_go_with_every_convolution(patch_map):
  """Windows and factorised kernels make tokens of the width that DFI takes."""
  for sfe, tokens in (("windows", 3), ("factorised", 4)):
    config = ProjectorConfig(sfe=sfe, stride=1, window=4, window_strides=(2, 8), conv_width=5, dfi_kernel=4)
    projector = nnx.eval_shape(lambda: SpatialProjector(config, GRID, WIDTH, 7, rngs=nnx.Rngs(0)))
    found = jax.eval_shape(lambda projector, x: projector(x), projector, patch_map.reshape(2, GRID**2, WIDTH))
    assert found.shape == (2, tokens + GRID**2, 7)


@pytest.mark.parametrize(
  "fields",
  [
    dict(sfe="factorised", stride=2, dfi_kernel=0),
    dict(sfe="windows", window=4, window_strides=(2, 4), dfi_kernel=0),
    pytest.param(dict(sfe="transformer", stride=2, dfi_kernel=0), marks=pytest.mark.long),
  ],
  ids=lambda fields: fields["sfe"],
)
def test_eight_devices_give_the_gradients_of_one(fields):
  projector = SpatialProjector(ProjectorConfig(conv_width=8, **fields), GRID, 16, 32, rngs=nnx.Rngs(0))
  graphdef, flat = parameters.flatten(projector)
  flat = {f"projector/{path}": np.asarray(x) for path, x in flat.items()}
  draw = np.random.default_rng(0)
  features = draw.normal(size=(4, GRID**2, 16)).astype(np.float32)
  cotangent = draw.normal(size=(4, projector(features).shape[1], 32)).astype(np.float32)

  def loss(flat, features):
    module = parameters.unflatten(graphdef, {path.removeprefix("projector/"): x for path, x in flat.items()})
    return (module(features) * cotangent).sum()

  one = released.jit(jax.grad(loss))(flat, features)
  mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices())
  places = sharding.parameter_shardings(flat, mesh)
  with jax.set_mesh(mesh):
    placed = {path: jax.device_put(x, places[path]) for path, x in flat.items()}
    rows = jax.device_put(features, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(sharding.BATCH_AXES)))
    eight = jax.jit(jax.grad(loss), out_shardings=places)(placed, rows)
  for path, expected in one.items():
    # Sums in another order; a bias of DFI's keys has no gradient but rounding.
    np.testing.assert_allclose(eight[path], expected, atol=1e-4 * np.abs(expected).max() + 1e-5, err_msg=path)
