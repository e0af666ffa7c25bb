"""Spatial tokens by transformer blocks: the released numbers that are quick to compute, and the order of cells."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import released
from flax import nnx

from mllm_jax.config import ProjectorConfig
from mllm_jax.models.projectors import maps
from mllm_jax.models.projectors.sfe_transformer import TransformerExtractor
from mllm_jax.weights import spatial
from mllm_jax.weights.tables import Table

GRID = 24
GOLDENS = {"cropping": "sp_crop_tfm", "pooling": "sp_pool_tfm_official_scrambled"}
WIDTH = 16


def config_of(kind: str, **fields) -> ProjectorConfig:
  return ProjectorConfig(sfe="transformer", maps=kind, token_order="released", dfi_kernel=0, **fields)


@pytest.mark.parametrize("kind, size", [("cropping", 8), ("pooling", 24)])
def test_released_token_and_gradients_of_one_map(kind, size):
  """No map has a part in another's token, so one alone has the weights and gradients that it has among all six."""
  golden, config = released.read(GOLDENS[kind]), config_of(kind, sizes=(size,))
  width = json.loads(str(golden["meta_json"]))["C"]
  table = spatial.table(config, GRID)
  table = Table(tuple(row for row in table.rows if row.ours.startswith("projector/sfe/")))
  weights = {name: x for name, x in released.group(golden, "w.").items() if name.split(".")[0].endswith(f"_{size}")}
  make = lambda: TransformerExtractor(config, GRID, width, rngs=nnx.Rngs(0))
  sfe = released.fill(nnx.eval_shape(make), "projector/sfe/", table, weights)
  place = maps.map_sizes(config_of(kind), GRID).index(size)

  def loss(sfe, patch_map):
    token = sfe(patch_map)[:, 0]
    spatial_token = jax.nn.gelu(token, approximate=False) @ golden["w.tfm_linear.1.weight"].T
    return (spatial_token * golden["cotangent"][:, place]).sum(), token

  patch_map = golden["in.patch_features"].reshape(2, GRID, GRID, -1)
  gradient, token = released.jit(jax.grad(loss, has_aux=True))(sfe, patch_map)
  # Eight layers in float32; the released run's own rounding is a tenth of that.
  released.check_close(f"{kind} token", token, golden["mid.tokens_pre"][:, place], relative=0, floor=1e-5)
  found = released.to_foreign(gradient, "projector/sfe/", table)
  assert found.keys() == weights.keys()
  for name, gradient in found.items():
    whole = name not in released.group(golden, "sample.")
    expected = golden["g." + name].ravel() if whole else golden["sample." + name]
    largest = 0.0 if whole else golden["max." + name]
    flat = gradient.ravel()[:: 1 if whole else gradient.size // int(golden["sample_count"]) | 1]
    # The query sees itself alone, so that part of its attention has no gradient but rounding.
    released.check_close(f"{kind} {name}", flat, expected, relative=1e-4, floor=1e-6, size=largest)


@pytest.fixture(scope="module")
def patch_map():
  return jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, WIDTH)).astype(np.float32))


def extractor(grid: int = 8, **fields) -> TransformerExtractor:
  """With queries that are not all zero, and so a token that depends on its map."""
  config = ProjectorConfig(sfe="transformer", dfi_kernel=0, **fields)
  return TransformerExtractor(config, grid, WIDTH, rngs=nnx.Rngs(0))


def test_a_token_is_a_cell_of_its_map_unless_released(patch_map):
  """Blocks know no positions, so a map whose cells change places gives the same token, if a token is a cell."""
  run = released.jit(lambda sfe, x: sfe(x)[:, 0])
  whole, scrambled = (extractor(maps="pooling", sizes=(8,), token_order=order) for order in ("map", "released"))
  turned = patch_map[:, ::-1].swapaxes(1, 2)
  one, other = run(whole, patch_map), run(whole, turned)
  assert np.abs(one).max() > 0.01
  np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)  # sums of 64 cells in another order
  one, other = run(scrambled, patch_map), run(scrambled, turned)
  assert np.abs(one - other).max() > 0.01
  np.testing.assert_array_equal(run(extractor(maps="cropping", sizes=(8,)), patch_map), run(whole, patch_map))


def test_pooled_maps_are_cut_into_cells(patch_map):
  pooled = maps.pool(patch_map, 4)
  whole, scrambled = (extractor(maps="pooling", sizes=(4,), token_order=order) for order in ("map", "released"))
  np.testing.assert_array_equal(whole.cells(pooled)[1, 6], pooled[1, 1, 2])
  values = np.asarray(pooled[1]).transpose(2, 0, 1).ravel()  # channels, rows, columns
  np.testing.assert_array_equal(scrambled.cells(pooled)[1, 6], values[6 * WIDTH : 7 * WIDTH])


def test_bfloat16_in_and_out(patch_map):
  found = jax.eval_shape(extractor(stride=2), patch_map.astype(jnp.bfloat16))
  assert (found.shape, found.dtype) == ((2, 2, WIDTH), jnp.bfloat16)
