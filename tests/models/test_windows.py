"""Windows and their pooling: the released tables and RoI-align, maps of any shape, gradients, one compilation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import slow_windows
import uhd_draws
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm_jax.config import ConfigError
from mllm_jax.models.projectors import windows
from mllm_jax.models.projectors.windows import Pooling, make_pooling, pool, pooling_grid

PATCHES = 350
SELECTIVE, QUADRUPLE = Pooling(12, 1, 0), Pooling(12, 4, 0)
# One row, one column, fewer cells than windows, windows that end on a sample, and bands of several chunks.
THIN = [
  (1, 1),
  (1, 7),
  (1, 350),
  (350, 1),
  (5, 70),
  (70, 5),
  (2, 2),
  (2, 3),
  (3, 10),
  (6, 6),
  (10, 10),
  (9, 2),
  (18, 19),
]
# Weights are sums of a few float32 numbers of at most 1, and add up to 1.
ROUNDING = 2e-6


def flat_maps(maps: list[np.ndarray], length: int, seed: int = 0) -> np.ndarray:
  """Maps [H, W, C] on one padded length, float32 [N, length, C]; the padding is large, to be noticed."""
  out = 1e3 * np.random.default_rng(seed).normal(size=(len(maps), length, maps[0].shape[-1])).astype(np.float32)
  for row, patch_map in zip(out, maps):
    row[: patch_map.shape[0] * patch_map.shape[1]] = patch_map.reshape(-1, patch_map.shape[-1])
  return out


def draw_maps(grids, scale=1, channels=2, seed=1) -> list[np.ndarray]:
  draw = np.random.default_rng(seed)
  return [draw.normal(size=(scale * h, scale * w, channels)).astype(np.float32) for h, w in grids]


def pooled(pooling: Pooling, maps: list[np.ndarray], grids, patches: int = PATCHES) -> np.ndarray:
  features = flat_maps(maps, pooling.scale**2 * patches)
  tokens, _ = jax.jit(pool, static_argnums=0)(
    pooling, features, np.ones(features.shape[:2], np.float32), np.asarray(grids, np.int32)
  )
  return np.asarray(tokens)


def test_bins_are_chosen_as_released_for_every_grid_and_for_ratios():
  golden = np.load(uhd_draws.FOLDER / "grid_select.npz")
  sizes = golden["feat_hw"].astype(np.int32)
  assert len(sizes) == 1293
  np.testing.assert_array_equal(np.stack(pooling_grid(*sizes.T), 1), golden["sel_for_feat_hw"])
  ratios = golden["ratios"]
  np.testing.assert_array_equal(np.stack(pooling_grid(np.ones_like(ratios), ratios), 1), golden["sel_for_ratio_hw"])


@pytest.mark.parametrize("height, width", [(24, 24), (48, 48), (96, 96), (20, 28), (40, 56), (80, 112), (13, 43)])
def test_windows_are_pooled_as_released(height, width):
  golden = uhd_draws.read("roi_align")
  prefix = f"win_{height}x{width}"
  patch_map, (rows, columns) = golden[f"{prefix}/x"][0].transpose(1, 2, 0), golden[f"{prefix}/out_hw"]
  tokens = pooled(SELECTIVE, [patch_map], [(height, width)], patches=height * width + 5)[0]
  expected = golden[f"{prefix}/out"].reshape(12, 12, 3, -1).transpose(0, 1, 3, 2)
  np.testing.assert_allclose(tokens[:, :, : rows * columns], expected, atol=ROUNDING * 4)
  assert not tokens[:, :, rows * columns :].any()


@pytest.mark.parametrize("name, side", [("whole_1x1", 1), ("whole_3x3", 3), ("whole_3x4", 0)])
def test_one_window_can_be_the_whole_map(name, side):
  golden = uhd_draws.read("roi_align")
  patch_map = golden["x"][0].transpose(1, 2, 0)
  tokens = pooled(Pooling(1, 1, side), [patch_map], [patch_map.shape[:2]], patches=600)[0, 0, 0]
  expected = golden[name].reshape(4, -1).T
  assert expected.shape == tokens.shape
  np.testing.assert_allclose(tokens, expected, atol=ROUNDING * 4)


@pytest.mark.parametrize("pooling", [SELECTIVE, QUADRUPLE, Pooling(8, 2, 3)])
def test_maps_of_any_shape_in_one_batch_against_loops(pooling):
  maps = draw_maps(THIN, pooling.scale)
  tokens = pooled(pooling, maps, THIN)
  for (height, width), patch_map, row in zip(THIN, maps, tokens):
    rows, columns = (pooling.side,) * 2 if pooling.side else slow_windows.best_bins(height, width)
    expected = slow_windows.pool_windows(patch_map, pooling.windows, rows, columns)
    np.testing.assert_allclose(row[:, :, : rows * columns], expected, atol=ROUNDING * 4, err_msg=f"{height}x{width}")
    assert not row[:, :, rows * columns :].any()


@settings(max_examples=20, deadline=None)
@given(st.integers(1, PATCHES).flatmap(lambda h: st.tuples(st.just(h), st.integers(1, PATCHES // h))))
def test_a_map_of_ones_pools_to_the_coverage(grid):
  grids = jnp.asarray([grid], jnp.int32)
  tokens = pooled(SELECTIVE, [np.ones((*grid, 2), np.float32)], [grid])[0, ..., 0]
  covered = np.asarray(windows.coverage(SELECTIVE, grids))[0]
  np.testing.assert_allclose(tokens, covered, atol=ROUNDING)
  if min(grid) >= 12:
    valid = np.asarray(SELECTIVE.valid(grids))[0]
    np.testing.assert_allclose(covered, np.broadcast_to(valid, covered.shape), atol=ROUNDING)


@pytest.mark.long
def test_gradients_are_the_adjoint():
  """Pooling is linear in the maps and in the scales: both gradients times what they belong to give the same number."""
  draw = np.random.default_rng(3)
  features = flat_maps(draw_maps(THIN, 2), 4 * PATCHES) / 100
  scale = draw.uniform(0.5, 2, features.shape[:2]).astype(np.float32)
  grids = np.asarray(THIN, np.int32)
  run = jax.jit(lambda f, s: pool(Pooling(12, 2, 0), f, s, grids))
  (tokens, scales), vjp = jax.vjp(run, features, scale)
  d_tokens, d_scales = (draw.normal(size=x.shape).astype(np.float32) for x in (tokens, scales))
  product = lambda a, b: np.einsum("nk,nk->n", *(np.asarray(x, np.float64).reshape(len(THIN), -1) for x in (a, b)))
  # One number is the sum of thousands with either sign.
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-3)
  d_features, d_scale = vjp((d_tokens, np.zeros_like(d_scales)))
  close(product(d_features, features), product(d_tokens, tokens))
  close(product(d_scale, scale), product(d_tokens, tokens))
  d_features, d_scale = vjp((np.zeros_like(d_tokens), d_scales))
  assert not np.any(d_features)
  close(product(d_scale, scale), product(d_scales, scales))
  padding = np.arange(features.shape[1]) >= 4 * grids[:, :1] * grids[:, 1:]
  assert not np.any(np.asarray(d_scale)[padding])


@pytest.mark.long
def test_tables_are_resized_and_pooled_as_if_step_by_step():
  grids = [(1, 7), (24, 14), (5, 70), (12, 12), (3, 3), (30, 2)]
  pooling = Pooling(8, 2, 0)
  weights = np.asarray(windows.table_weights(pooling, jnp.asarray(grids, jnp.int32), 8, PATCHES))
  for (height, width), row in zip(grids, weights):
    by_row, by_column = (slow_windows.cubic_axis(2 * length, 8) for length in (height, width))
    table = np.einsum("hy,wx->hwyx", by_row, by_column).reshape(2 * height, 2 * width, 64)
    rows, columns = slow_windows.best_bins(height, width)
    expected = slow_windows.pool_windows(table, 8, rows, columns)
    np.testing.assert_allclose(row[:, :, : rows * columns], expected, atol=ROUNDING)
    assert not row[:, :, rows * columns :].any()


def test_all_shapes_share_one_compilation():
  traces = []

  @jax.jit
  def run(features, grids):
    traces.append(None)
    return pool(SELECTIVE, features, jnp.ones(features.shape[:2]), grids)

  for grid in THIN:
    run(flat_maps(draw_maps([grid]), PATCHES), jnp.asarray([grid], jnp.int32))
  assert len(traces) == 1


def test_kinds_of_pooling():
  assert [make_pooling("selective", 12, level).tokens for level in (0, 2)] == [12, 12]
  assert [make_pooling("fixed", 12, level).tokens for level in (0, 2)] == [9, 9]
  assert [make_pooling("pyramid", 12, level).tokens for level in (0, 1, 2)] == [9, 36, 144]
  with pytest.raises(ConfigError, match="projector.pooling='mean' is unknown; known: selective, fixed, pyramid"):
    make_pooling("mean", 12, 0)
