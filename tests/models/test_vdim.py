"""VDIM on maps of any shape, alone and among others; its gradients, its memory and what it refuses."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from released import check_close, jit
from vdim_cases import from_flat

from mllm_jax.config import ConfigError
from mllm_jax.models import flat
from mllm_jax.models.adaptive_conv import adaptive_conv
from mllm_jax.models.projectors.vdim import Stage, Vdim, cell_weights, drop_channels, guidance

CHANNELS, PLACES = 4, 24
THIN = [(1, 7), (7, 1), (2, 2), (3, 5), (1, 1), (2, 12), (24, 1), (4, 6)]


def randomised(model: nnx.Module, seed: int = 0) -> nnx.Module:
  """With parameters large enough that every part of the model matters."""
  random = np.random.default_rng(seed)
  for _, parameter in nnx.iter_graph(model):
    if isinstance(parameter, nnx.Param):
      parameter[...] = parameter[...] + jnp.asarray(0.2 * random.standard_normal(parameter.shape), jnp.float32)
  return model


def case(grids, places: int = PLACES, channels: int = CHANNELS, seed: int = 0):
  """Random features and patches of these grids; what stands in the padding is not a number."""
  random = np.random.default_rng(seed)
  valid = np.arange(places) < np.prod(grids, axis=-1, keepdims=True)
  features = np.where(valid[..., None], random.standard_normal((*valid.shape, channels)), np.nan).astype(np.float32)
  patches = np.where(valid[..., None], random.standard_normal((*valid.shape, 588)), np.nan).astype(np.float32)
  return jnp.asarray(features), jnp.asarray(patches), jnp.asarray(grids, jnp.int32)


MODEL = randomised(Vdim(2, CHANNELS, rngs=nnx.Rngs(0)))
CALL = jit(lambda model, *case: model(*case))


# -- A slow reference in float64, after the description of the released code ------------------------------------------


def gelu(x):
  return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def linear(layer, x):
  return x @ np.asarray(layer.kernel[...], np.float64) + np.asarray(layer.bias[...], np.float64)


def pooled(image, height, width):
  out = np.empty((height, width, image.shape[-1]))
  rows, columns = image.shape[0] / height, image.shape[1] / width
  for y in range(height):
    for x in range(width):
      window = image[int(y * rows) : math.ceil((y + 1) * rows), int(x * columns) : math.ceil((x + 1) * columns)]
      out[y, x] = window.mean((0, 1))
  return out


def padded(x):
  """By 3 on each side: reflected, or along an axis too short for that the last pixel repeated."""
  for axis in range(2):
    widths = [(3, 3) if i == axis else (0, 0) for i in range(x.ndim)]
    x = np.pad(x, widths, mode="reflect" if x.shape[axis] > 3 else "edge")
  return x


def doubled(x):
  """Bicubic, a = -0.75, of twice the height and width."""
  a = -0.75
  near = lambda t: ((a + 2) * t - (a + 3)) * t * t + 1
  far = lambda t: ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
  for axis in range(2):
    x = np.moveaxis(x, axis, 0)
    length = len(x)
    out = np.zeros((2 * length, *x.shape[1:]))
    for i in range(2 * length):
      position = (i + 0.5) / 2 - 0.5
      for cell in range(math.floor(position) - 1, math.floor(position) + 3):
        distance = abs(position - cell)
        out[i] += (near if distance <= 1 else far)(distance) * x[min(max(cell, 0), length - 1)]
    x = np.moveaxis(out, 0, axis)
  return x


def reference_stage(stage, source, image):
  """source [h, w, C], image [14 h, 14 w, 3] -> [2 h, 2 w, C]."""
  height, width = 2 * source.shape[0], 2 * source.shape[1]
  colours = pooled(image, height, width)
  keys = linear(stage.range_proj[1], gelu(linear(stage.range_proj[0], colours)))
  padded_keys, padded_source = padded(keys), padded(doubled(source))
  square = np.linspace(-1, 1, 7) ** 2
  spatial = np.exp(-(square[:, None] + square) / (2 * float(stage.sigma_spatial[...]) ** 2))
  out = np.empty((height, width, source.shape[-1]))
  for y in range(height):
    for x in range(width):
      scores = padded_keys[y : y + 7, x : x + 7] @ keys[y, x] * math.exp(float(stage.range_temp[...]))
      kernel = np.exp(scores - scores.max())
      kernel = kernel / kernel.sum() * spatial
      kernel = kernel / max(kernel.sum(), 1e-7)
      hidden = gelu(linear(stage.fixup[0], np.concatenate([kernel.reshape(-1), colours[y, x]])))
      kernel = kernel + 0.1 * linear(stage.fixup[1], hidden).reshape(7, 7)
      out[y, x] = np.einsum("ij,ijc->c", kernel, padded_source[y : y + 7, x : x + 7])
  return out


@pytest.mark.parametrize("level", [1, 2])
def test_any_shape(level):
  """All thin shapes in one batch, each against the reference; nothing of one is in another."""
  features, patches, grids = case([*THIN, (0, 0)])
  maps = CALL(MODEL, features, patches, grids)[level]
  assert not maps[-1].any()
  for i, (h, w) in enumerate(THIN):
    source = np.asarray(features[i, : h * w], np.float64).reshape(h, w, -1)
    image = np.asarray(patches[i, : h * w], np.float64).reshape(h, w, 14, 14, 3)
    image = image.transpose(0, 2, 1, 3, 4).reshape(14 * h, 14 * w, 3)
    for stage in list(MODEL.stages)[:level]:
      source = reference_stage(stage, source, image)
    if level == 2:
      source = source + 0.1 * linear(MODEL.fixup_proj[1], source)
    found = from_flat(maps[i], h << level, w << level).transpose(1, 2, 0)
    # float32 against float64: two stages of some hundred operations
    check_close(f"{h} x {w}", found, source, relative=1e-5)
    assert not maps[i, 4**level * h * w :].any()


@settings(max_examples=15, deadline=None)
@given(
  st.lists(
    st.integers(0, 24).flatmap(lambda rows: st.tuples(st.just(rows), st.integers(0, min(24, PLACES // max(rows, 1))))),
    min_size=3,
    max_size=3,
  )
)
def test_alone_as_among_others(grids):
  features, patches, grids = case([(4, 6), *grids])
  together = CALL(MODEL, features, patches, grids)
  alone = CALL(MODEL, features, patches, jnp.zeros_like(grids).at[0].set(grids[0]))
  for level, x in together.items():
    np.testing.assert_array_equal(x[0], alone[level][0])
    assert np.isfinite(x).all()


def test_leading_axes():
  """Rows of crops give what the crops give."""
  features, patches, grids = case([(4, 6), (3, 5), (2, 2), (0, 0)])
  flat_maps = CALL(MODEL, features, patches, grids)
  rows = CALL(MODEL, *(x.reshape(2, 2, *x.shape[1:]) for x in (features, patches, grids)))
  for level, x in flat_maps.items():
    np.testing.assert_array_equal(rows[level].reshape(x.shape), x)


def test_compiles_once():
  traces = []

  @jax.jit
  def call(*case):
    traces.append(1)
    return MODEL(*case)[2].sum()

  for grids in ([(4, 6), (1, 24)], [(3, 3), (0, 0)]):
    assert np.isfinite(call(*case(grids)))
  assert len(traces) == 1


WEIGHTS = jnp.asarray(np.random.default_rng(1).standard_normal((3, 16 * PLACES, CHANNELS)), jnp.float32)
GRIDS = [(3, 5), (1, 7), (0, 0)]


@jit
@jax.value_and_grad
def value_and_gradients(inputs, grids):
  model, features, patches = inputs
  return (model(features, patches, grids)[2] * WEIGHTS).sum()


@pytest.mark.long
def test_gradient_is_the_slope():
  """Along a random direction through features, image and all parameters, against central differences."""
  features, patches, grids = case(GRIDS)
  inputs = (MODEL, jnp.nan_to_num(features), jnp.nan_to_num(patches))
  random = np.random.default_rng(2)
  direction = jax.tree.map(lambda x: jnp.asarray(random.standard_normal(x.shape), jnp.float32), inputs)
  step = 1e-3
  _, gradient = value_and_gradients(inputs, grids)
  slope = sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction)))
  moved = lambda by: float(value_and_gradients(jax.tree.map(lambda x, d: x + by * d, inputs, direction), grids)[0])
  # Rounding: 1e-7 of a sum of some 100 over a step of 1e-3; curvature: the step squared.
  np.testing.assert_allclose((moved(step) - moved(-step)) / (2 * step), slope, rtol=2e-3)


def test_padding_has_no_gradient():
  features, patches, grids = case(GRIDS)
  _, (of_model, of_features, of_patches) = value_and_gradients((MODEL, features, patches), grids)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(of_model))
  for gradient in (of_features, of_patches):
    for x, grid in zip(gradient, GRIDS):
      assert x[: math.prod(grid)].all() and not x[math.prod(grid) :].any()


def test_separate_levels():
  """A loss on level 2 trains the second stage only, one on level 1 the first."""
  features, patches, grids = case([(4, 6)])

  def loss(model, shares):
    maps = model.separate(features, patches, grids)
    return shares[0] * (maps[1] ** 2).sum() + shares[1] * (maps[2] ** 2).sum()

  gradient_of = jit(jax.grad(loss))
  for trained, shares in ((0, (1.0, 0.0)), (1, (0.0, 1.0))):
    for i, stage in enumerate(gradient_of(MODEL, shares).stages):
      moves = [bool(np.any(x)) for x in jax.tree.leaves(stage)]
      assert all(moves) if i == trained else not any(moves)


def test_dropout():
  """A key drops whole channels, by map; the same key the same ones."""
  features, patches, grids = case([(4, 6)] * 3)
  features, patches = (jnp.broadcast_to(x[:1], x.shape) for x in (features, patches))
  call = jit(lambda key: MODEL(features, patches, grids, key))
  first, again, other = call(jax.random.key(0)), call(jax.random.key(0)), call(jax.random.key(1))
  for level in (1, 2):
    np.testing.assert_array_equal(first[level], again[level])
    assert np.abs(first[level] - other[level]).max() > 1e-3
    assert np.abs(first[level][0] - first[level][1]).max() > 1e-3
  dropped = drop_channels(jnp.ones((2, 2, 1000, 3)), 0.1, jax.random.key(0), axis=-2)
  assert set(np.unique(dropped)) == {np.float32(0), np.float32(1 / 0.9)}
  assert (dropped == dropped[:1, :1, :, :1]).all()
  assert abs(float((dropped[0, 0, :, 0] == 0).mean()) - 0.1) < 0.03  # 3 standard deviations


@pytest.mark.long
def test_bfloat16():
  """Stages compute in float32: only what goes in and comes out is rounded, to 1 part in 256."""
  features, patches, grids = case([(4, 6)])
  features, patches = features.astype(jnp.bfloat16), patches.astype(jnp.bfloat16).astype(jnp.float32)
  exact = CALL(MODEL, features.astype(jnp.float32), patches, grids)
  rounded = CALL(MODEL, features, patches, grids)
  for level, x in rounded.items():
    assert x.dtype == jnp.bfloat16
    check_close(f"level {level}", np.asarray(x, np.float32), exact[level], relative=0.01)


def test_guidance_is_adaptive_pooling():
  random, (h, w) = np.random.default_rng(0), (3, 4)
  image = random.standard_normal((14 * h, 14 * w, 3))
  patches = image.reshape(h, 14, w, 14, 3).transpose(0, 2, 1, 3, 4).reshape(h * w, -1)
  for level in (1, 2, 3):
    cells = guidance(jnp.asarray(patches, jnp.float32), jnp.asarray([h, w], jnp.int32), level)
    n = 2**level
    found = np.asarray(cells).reshape(2, 2, 3, n // 2 * h, n // 2 * w).transpose(3, 0, 4, 1, 2).reshape(n * h, n * w, 3)
    np.testing.assert_allclose(found, pooled(image, n * h, n * w), atol=1e-6)


@pytest.mark.parametrize("length", [5, 300], ids=["less than a run", "several steps"])
def test_adaptive_conv_of_any_length(length):
  """Against a sum over taps, values and gradients, with 3 x 3 kernels and 3 x 3 pixels for each cell."""
  random, n, diameter = np.random.default_rng(0), 3, 3
  h, w = (1, 5) if length == 5 else (23, 13)
  grid = jnp.asarray([h, w], jnp.int32)
  source = jnp.asarray(random.standard_normal((length, 2)), jnp.float32)
  row, column, valid = flat.coordinates(grid, length)
  taps = jnp.arange(-1, 2)
  inside = lambda place, size: (place + taps[:, None] >= 0) & (place + taps[:, None] < size)
  used = inside(row, h)[:, None] & inside(column, w)[None] & valid
  weights = jnp.asarray(random.standard_normal((n, n, diameter, diameter, length)), jnp.float32) * used

  def plain(source, weights):
    image = jnp.pad(source[: h * w].reshape(h, w, -1), ((1, 1), (1, 1), (0, 0)))
    weights = weights[..., : h * w].reshape(n, n, 3, 3, h, w)
    out = sum(
      jnp.einsum("abyx,yxc->yaxbc", weights[:, :, i, j], image[i : i + h, j : j + w])
      for i in range(3)
      for j in range(3)
    )
    return jnp.pad(out.reshape(n * n * h * w, -1), ((0, n * n * (length - h * w)), (0, 0)))

  cotangent = jnp.asarray(random.standard_normal((n * n * length, 2)), jnp.float32)

  @functools.partial(jit, static_argnums=0)
  def both_ways(function, source, weights):
    out, pullback = jax.vjp(function, source, weights)
    return out, *pullback(cotangent)

  ours = both_ways(lambda *x: adaptive_conv(*x, grid), source, weights)
  for name, found, expected in zip(("out", "source", "weights"), ours, both_ways(plain, source, weights)):
    share = used if name == "weights" else 1  # those of taps beyond the map are no weights
    check_close(name, found * share, np.asarray(expected * share), relative=1e-6)


def test_bicubic_weights_sum_to_one():
  """At a size where the compiler works in parallel: kernels of sum 1 weigh cells with sum 1."""
  for height, width in ((48, 48), (40, 56), (1, 2304)):
    kernel = jnp.full((2, 2, 7, 7, 2304), 1 / 49)
    grid = jnp.asarray([height, width], jnp.int32)
    weights, pullback = jit(lambda x: jax.vjp(lambda x: cell_weights(x, grid), x))(kernel)
    valid = np.arange(2304) < height * width
    for x in (weights, jit(pullback)(jnp.ones_like(kernel))[0] / 49):
      np.testing.assert_allclose(x.sum((2, 3)), np.broadcast_to(valid, (2, 2, 2304)), atol=1e-5)


def test_memory():
  """24 x 24 patches of 1024 channels: all arrays of the compiled 4x stack are less than four times its result. Not even
  one has 49 numbers for each of the result's.
  """
  model = nnx.eval_shape(lambda: Vdim(2, 1024, rngs=nnx.Rngs(0)))
  shape = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)
  inputs = (shape(1, 576, 1024), shape(1, 576, 588), shape(1, 2, dtype=jnp.int32))
  memory = jit(lambda model, *inputs: model(*inputs)).lower(model, *inputs).compile().memory_analysis()
  assert memory.temp_size_in_bytes + memory.output_size_in_bytes < 4 * 96 * 96 * 1024 * 4


def test_sharded_crops_stay_where_they_are():
  """With crops over eight devices nothing of a map is sent, forward or backward: parameters' gradients are summed."""
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  put = lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
  inputs = [put(x.reshape(8, 2, *x.shape[1:])) for x in case([(4, 6)] * 16)]
  loss = lambda model, *inputs: (model(*inputs, jax.random.key(0))[1] ** 2).sum()
  model = Vdim(1, CHANNELS, rngs=nnx.Rngs(0))
  program = jit(jax.value_and_grad(loss, (0, 1))).lower(model, *inputs).compile().as_text()
  assert "all-reduce" in program
  assert not any(f" {name}(" in program for name in ("all-gather", "all-to-all", "collective-permute"))


def test_refusals():
  with pytest.raises(ConfigError, match="1 to 3 levels above the features, not 4"):
    Vdim(4, CHANNELS, rngs=nnx.Rngs(0))
  with pytest.raises(ConfigError, match=r"has no levels \(0, 3\); it has 0 to 2"):
    Vdim(2, CHANNELS, rngs=nnx.Rngs(0), keep=(0, 3))
  with pytest.raises(ConfigError, match="patches of 587 numbers are no squares of 3 colours"):
    guidance(jnp.zeros((4, 587)), jnp.asarray([2, 2]), 1)


def test_temperature_and_sums_are_bounded():
  stage, random = randomised(Stage(rngs=nnx.Rngs(0))), np.random.default_rng(1)
  colours, grid = jnp.asarray(random.standard_normal((2, 2, 3, 6)), jnp.float32), jnp.array([2, 3], jnp.int32)
  kernels = jit(lambda stage: (stage.range_kernel(colours, grid), stage.bilateral_kernel(colours, grid)))

  def at(temperature, sigma):
    stage.range_temp[...], stage.sigma_spatial[...] = jnp.float32(temperature), jnp.float32(sigma)
    return (np.asarray(x, np.float64) for x in kernels(stage))

  ranges = {temperature: next(at(temperature, 1.0)) for temperature in (-20, math.log(1e-4), 0, math.log(1e4), 20)}
  cold, coldest, _, hot, hottest = (ranges[key] for key in (math.log(1e-4), -20, 0, math.log(1e4), 20))
  np.testing.assert_allclose(coldest, cold, rtol=1e-5)
  np.testing.assert_allclose(hottest, hot, atol=1e-2)  # scores of 10,000 times a few, in float32
  assert np.abs(ranges[0] - cold).max() > 0.01 and np.abs(ranges[0] - hot).max() > 0.1
  # The best tap is far off for so narrow a spatial kernel: the sum of some pixels is below the bound.
  range_kernel, bilateral = at(20, 0.05)
  weights = range_kernel * np.asarray(stage.spatial_kernel(), np.float64)[..., None]
  sums = weights.sum((2, 3), keepdims=True)
  assert (sums < 1e-8).any() and (sums > 0.1).any()
  np.testing.assert_allclose(bilateral, weights / np.maximum(sums, 1e-7), rtol=1e-4, atol=1e-12)


def test_initial_values():
  """As the released code begins: temperature 1, sigma 1, and 1 x 1 convolutions as PyTorch draws them."""
  stage = Stage(rngs=nnx.Rngs(0))
  assert float(stage.range_temp[...]) == 0 and float(stage.sigma_spatial[...]) == 1
  for layer, bound in ((stage.range_proj[0], 3**-0.5), (stage.range_proj[1], 32**-0.5), (stage.fixup[0], 52**-0.5)):
    for x in (layer.kernel[...], layer.bias[...]):
      assert 0.7 * bound < np.abs(x).max() <= bound
  assert sum(x.size for x in jax.tree.leaves(stage)) == 6233
