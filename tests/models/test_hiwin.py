"""Hiwin attention beyond the released numbers: every pooling and query grid, batches, chips, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import slow_windows
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from test_windows import draw_maps, flat_maps

from mllm_jax import parameters
from mllm_jax.config import ConfigError
from mllm_jax.models.projectors import hiwin
from mllm_jax.models.projectors.hiwin import HiwinAttention

PATCHES, CHANNELS = 70, 8
GRIDS = [(5, 14), (8, 8), (1, 70), (14, 3)]


def module(levels=(0, 1), query_grid=8, **options) -> HiwinAttention:
  """A small module, all of whose arrays are random: none is where it starts."""
  made = HiwinAttention(levels, CHANNELS, 16, query_grid=query_grid, head_width=8, rngs=nnx.Rngs(0), **options)
  draw = np.random.default_rng(1)
  graphdef, flat = parameters.flatten(made)
  shaken = {path: x + 0.3 * draw.normal(size=x.shape).astype(np.float32) for path, x in flat.items()}
  return parameters.unflatten(graphdef, shaken)


def inputs(levels=(0, 1), grids=GRIDS) -> tuple[dict[int, np.ndarray], np.ndarray]:
  maps = {level: draw_maps(grids, 2**level, CHANNELS, seed=level) for level in levels}
  return {l: flat_maps(m, 4**l * PATCHES) / np.float32(10) for l, m in maps.items()}, np.asarray(grids, np.int32)


run = jax.jit(lambda made, maps, grids: made(maps, grids))


@pytest.mark.long
@pytest.mark.parametrize("pooling, query_grid", [("selective", 8), ("selective", 16), ("fixed", 12), ("pyramid", 8)])
def test_against_the_plain_way(pooling, query_grid):
  """Step by step as the authors' code goes, in float64, with loops."""
  grids = GRIDS[:2] if query_grid == 8 else GRIDS[3:]
  made, (maps, _) = module(query_grid=query_grid, pooling=pooling), inputs(grids=grids)
  tokens = run(made, maps, np.asarray(grids, np.int32))
  _, weights = parameters.flatten(made)
  weights = {path: np.asarray(x) for path, x in weights.items()}
  for (height, width), row, *images in zip(grids, tokens, *maps.values()):
    shapes = [(2**level * height, 2**level * width, CHANNELS) for level in maps]
    images = {level: x[: shape[0] * shape[1]].reshape(shape) for level, x, shape in zip(maps, images, shapes)}
    bins = {
      "selective": [slow_windows.best_bins(height, width)] * 2, "fixed": [(3, 3)] * 2, "pyramid": [(3, 3), (6, 6)]
    }[pooling]  # fmt: skip
    expected = slow_windows.hiwin(weights, images, 2, query_grid, dict(enumerate(bins)))
    # float32 against float64; the largest number is about 4
    np.testing.assert_allclose(row, expected, atol=3e-5)


def test_a_batch_of_shapes_is_each_alone_and_compiles_once():
  traces = []

  @jax.jit
  def run(made, maps, grids):
    traces.append(None)
    return made(maps, grids)

  made, (maps, grids) = module(), inputs()
  together = run(made, maps, grids)
  for index in range(len(grids)):
    first = np.roll(np.arange(len(grids)), -index)
    others = np.where(np.arange(len(grids))[:, None] == 0, grids[first], 0)
    alone = run(made, {level: x[first] for level, x in maps.items()}, others.astype(np.int32))
    np.testing.assert_allclose(alone[0], together[index], atol=2e-6)
    assert np.isfinite(alone).all()  # of (0, 0) too
  assert len(traces) == 1


def test_padding_is_not_looked_at():
  made, (maps, grids) = module(), inputs()
  expected = run(made, maps, grids)
  for level, x in maps.items():
    padding = np.arange(x.shape[1]) >= 4**level * grids[:, :1] * grids[:, 1:]
    maps[level] = np.where(padding[..., None], np.float32(1e4), x)
  np.testing.assert_array_equal(run(made, maps, grids), expected)


def test_unused_crops_have_finite_gradients():
  made, (maps, _) = module(), inputs()
  graphdef, flat = parameters.flatten(made)
  zero = jnp.zeros((len(GRIDS), 2), jnp.int32)
  loss = lambda flat, maps: parameters.unflatten(graphdef, flat)(maps, zero).sum()
  gradients = jax.jit(jax.grad(loss, (0, 1)))(flat, maps)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))
  assert not any(np.any(x) for x in jax.tree.leaves(gradients[1]))


@pytest.mark.long
def test_gradients_by_finite_differences():
  """Every kind of parameter and the maps, each along a random direction."""
  made, (maps, grids) = module(), inputs()
  graphdef, flat = parameters.flatten(made)
  draw = np.random.default_rng(5)
  cotangent = draw.normal(size=(len(GRIDS), 64, 16)).astype(np.float32)
  arrays = flat | {f"map {level}": x for level, x in maps.items()}

  @jax.jit
  def loss(arrays):
    maps = {level: arrays[f"map {level}"] for level in (0, 1)}
    tokens = parameters.unflatten(graphdef, {path: arrays[path] for path in flat})(maps, grids)
    return (tokens * cotangent).sum()

  gradients = jax.jit(jax.grad(loss))(arrays)
  step = 1e-2
  for name, array in arrays.items():
    direction = draw.normal(size=array.shape).astype(np.float32)
    if name.startswith("map"):
      level = int(name[-1])
      direction[np.arange(array.shape[1]) >= 4**level * grids[:, :1] * grids[:, 1:]] = 0
    direction /= np.linalg.norm(direction)
    moved = [float(loss(arrays | {name: array + sign * step * direction})) for sign in (1, -1)]
    expected = (moved[0] - moved[1]) / (2 * step)
    # The loss is about 60, so float32 leaves 1e-3 of such a quotient open, and the curve of the function some percent.
    np.testing.assert_allclose(float((gradients[name] * direction).sum()), expected, rtol=0.02, atol=0.02, err_msg=name)
  # A bias of the keys adds the same to all scores of a query.
  assert not np.any(gradients["attention/k_proj/bias"])


@pytest.mark.long
def test_folding_once_for_many_crops_changes_nothing():
  """Neither the tokens nor the gradients, of a scan over crops whose inner values are made again."""
  made, (maps, grids) = module(levels=(1,)), inputs(levels=(1,))
  graphdef, flat = parameters.flatten(made)

  def one_after_another(flat, maps):
    made = parameters.unflatten(graphdef, flat)
    folded = made.fold(jnp.float32)
    body = jax.checkpoint(lambda maps, grid, folded: made(maps, grid, folded))
    crops = jax.tree.map(lambda x: x[:, None], (maps, grids))
    return jax.lax.scan(lambda _, crop: (None, body(*crop, folded)), None, crops)[1][:, 0]

  def at_once(flat, maps):
    return parameters.unflatten(graphdef, flat)(maps, grids)

  step = lambda form: jax.jit(jax.grad(lambda *x: (form(*x) ** 3).sum(), (0, 1)))(flat, maps)
  np.testing.assert_allclose(jax.jit(one_after_another)(flat, maps), jax.jit(at_once)(flat, maps), atol=2e-6)
  for actual, expected in zip(*(jax.tree.leaves(step(form)) for form in (one_after_another, at_once))):
    np.testing.assert_allclose(actual, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.long
def test_crops_stay_on_their_chips():
  """Split over eight devices no map moves: only how long the longest band is, is told round."""
  made, (maps, grids) = module(levels=(1,)), inputs(levels=(1,), grids=GRIDS * 2)
  mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  put = lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
  graphdef, flat = parameters.flatten(made)
  flat = jax.device_put(flat, NamedSharding(mesh, PartitionSpec()))
  loss = lambda flat, maps, grids: (parameters.unflatten(graphdef, flat)(maps, grids) ** 2).sum()
  step = jax.jit(jax.grad(loss, (0, 1)))
  compiled = step.lower(flat, jax.tree.map(put, maps), put(grids)).compile()
  text = compiled.as_text()
  assert not [name for name in ("all-gather", "all-to-all", "collective-permute") if f" {name}(" in text]
  gradients = compiled(flat, jax.tree.map(put, maps), put(grids))
  assert gradients[1][1].sharding.spec == PartitionSpec("data")
  expected = step(*jax.tree.map(np.asarray, (flat, maps, grids)))
  np.testing.assert_allclose(gradients[1][1], expected[1][1], atol=1e-4 * np.abs(expected[1][1]).max())


@pytest.mark.parametrize(
  "options, message",
  [
    (dict(width=20), "width 20 must be a multiple of its head width 8"),
    (dict(width=16, pooling="mean"), "projector.pooling='mean' is unknown"),
    (dict(width=16, levels=()), r"projector.levels=\(\) must be levels from 0 on"),
    (dict(width=16, levels=(2, 0)), r"projector.levels=\(2, 0\) must be"),
    (dict(width=16, levels=(0, 0)), r"projector.levels=\(0, 0\) must be"),
    (dict(width=16, levels=(-1, 0)), r"projector.levels=\(-1, 0\) must be"),
  ],
)
def test_bad_options(options, message):
  options = dict(levels=(0, 2)) | options
  with pytest.raises(ConfigError, match=message):
    HiwinAttention(options.pop("levels"), CHANNELS, options.pop("width"), head_width=8, rngs=nnx.Rngs(0), **options)


def test_bad_table_and_missing_level():
  with pytest.raises(ConfigError, match="width 18 must be a multiple of 4"):
    hiwin.sincos_table(18, 12)
  maps, grids = inputs((0,))
  with pytest.raises(ConfigError, match=r"needs level 1, and the pyramid has the levels \[0\]"):
    module()(maps, grids)
