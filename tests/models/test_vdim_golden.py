"""VDIM against the released definitions' numbers: results, what lies between, and every gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from released import check_close, jit
from vdim_cases import draw, fill, from_cells, from_flat, gradients, read, to_cells, to_flat, to_patches

from mllm_jax.models.adaptive_conv import adaptive_conv
from mllm_jax.models.projectors.vdim import Stage, Vdim

# Both sides sum float32 products in their own order: some 1e-7 of the largest value, more where many pixels are summed.
VALUES, GRADIENTS = 1e-5, 1e-4
SIGMA = (
  5e-4  # the gradient of sigma_spatial is a small difference of large sums: the released code's own is off by 1e-4
)


def check_gradients(module: nnx.Module, arrays: dict[str, np.ndarray]):
  found = gradients(module)
  assert found.keys() == {name for name in arrays if name.startswith("g/")}
  for name, gradient in found.items():
    check_close(name, gradient, arrays[name], relative=SIGMA if name.endswith("sigma_spatial") else GRADIENTS)


def test_stage():
  arrays, (height, width), channels = read("vdim_stage_20x28"), (20, 28), 32
  grid = jnp.asarray([height, width], jnp.int32)
  stage, guidance = fill(Stage(rngs=nnx.Rngs(0)), arrays), to_cells(arrays["guidance"])
  source = to_flat(draw(200, 0, channels, height, width))
  cotangent = to_flat(draw(200, 347200, channels, 2 * height, 2 * width))

  def loss(stage, source, guidance):
    out = stage(source, guidance, grid)
    return (out * cotangent).sum(), out

  (_, out), (of_stage, of_source, of_guidance) = jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(
    stage, source, guidance
  )
  check_close("out", from_flat(out, 2 * height, 2 * width)[:4], arrays["out"], relative=VALUES)
  check_close("source", from_flat(of_source, height, width)[:4], arrays["grad_source"], relative=GRADIENTS)
  check_close("guidance", from_cells(of_guidance, height, width), arrays["grad_guidance"], relative=GRADIENTS)
  check_gradients(of_stage, arrays)


def test_kernels():
  arrays, grid = read("vdim_stage_20x28"), jnp.asarray([20, 28], jnp.int32)
  stage, guidance = fill(Stage(rngs=nnx.Rngs(0)), arrays), to_cells(arrays["guidance"])
  kernels = jit(lambda stage: [stage.range_kernel(guidance, grid), stage.bilateral_kernel(guidance, grid)])(stage)
  kernels.append(jit(lambda stage: stage.kernel(guidance, grid))(stage))
  for name, kernel in zip(("range", "norm", "fixed"), kernels):
    first_row = from_cells(kernel.reshape(2, 2, 49, -1), 20, 28)[:, 0]
    check_close(name, first_row, arrays[f"{name}_kernel"], relative=VALUES)
  check_close("spatial", stage.spatial_kernel().reshape(-1), arrays["spatial_kernel"], relative=VALUES)


def test_stack_of_two():
  """Both methods give the released values; the gradients are those of the losses on separate levels."""
  arrays, (height, width), channels = read("vdim_stack4x_20x28"), (20, 28), 8
  model = fill(Vdim(2, channels, rngs=nnx.Rngs(0)), arrays)
  image_numbers = arrays["image_u8"].size
  features = to_flat(draw(310, image_numbers, channels, height, width))
  cotangents, drawn = {}, image_numbers + features.size
  for level in (1, 2):
    shape = (channels, height << level, width << level)
    cotangents[level] = to_flat(draw(310, drawn, *shape).astype(np.float16).astype(np.float32))
    drawn += cotangents[level].size
  patches, grids = to_patches(arrays["image_u8"]), jnp.asarray([[height, width]], jnp.int32)

  def loss(model, features):
    maps = model.separate(features[None], patches[None], grids)
    return sum((maps[level][0] * cotangents[level]).sum() for level in (1, 2)), maps

  (_, separate), (of_model, of_features) = jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(model, features)
  called = jit(lambda model: model(features[None], patches[None], grids))(model)
  for maps in (separate, called):
    check_close("level 1", from_flat(maps[1][0], 40, 56)[:2], arrays["feat2x"], relative=VALUES)
    check_close("level 2", from_flat(maps[2][0], 80, 112)[:1], arrays["feat4x"], relative=VALUES)
  check_close("features", from_flat(of_features, height, width), arrays["grad_source"], relative=GRADIENTS)
  check_gradients(of_model, arrays)


@pytest.mark.long
@pytest.mark.parametrize("length", [120, 150], ids=["full", "padded"])
def test_stack_of_three(length):
  arrays, (height, width), channels = read("vdim_stack8x_12x10"), (12, 10), 8
  model = fill(Vdim(3, channels, rngs=nnx.Rngs(0)), arrays)
  pad = lambda x: jnp.pad(x, ((0, length - height * width), (0, 0)), constant_values=jnp.nan)[None]
  features = pad(to_flat(draw(330, arrays["image_u8"].size, channels, height, width)))
  patches, grids = pad(to_patches(arrays["image_u8"])), jnp.asarray([[height, width]], jnp.int32)
  maps = jit(lambda model: model(features, patches, grids))(model)
  assert maps.keys() == {0, 1, 2, 3}
  np.testing.assert_array_equal(maps[0][0, : height * width], features[0, : height * width])
  for level in (1, 2, 3):
    expected = arrays[f"feat{2**level}x"]
    found = from_flat(maps[level][0], height << level, width << level)[: len(expected)]
    check_close(f"level {level}", found, expected, relative=VALUES)
    assert maps[level].shape[1] == 4**level * length
  for level, x in maps.items():
    assert not x[0, 4**level * height * width :].any()


def test_adaptive_conv():
  """The released C++ code convolves a padded map; here that is a map whose outer cells have no weights."""
  arrays = read("adaptive_conv")
  count, channels, height, width = arrays["input"].shape
  grids = jnp.full((count, 2), jnp.asarray([height, width], jnp.int32))
  flat_maps = lambda x: jnp.asarray(x.reshape(count, channels, -1).swapaxes(1, 2))
  inner = lambda x, axes: np.pad(x, [(3, 3) if axis in axes else (0, 0) for axis in range(x.ndim)])
  weights = inner(arrays["filters"], (1, 2)).reshape(count, height * width, 7, 7).transpose(0, 2, 3, 1)
  weights = jnp.asarray(weights)[:, None, None]

  @jit
  def both_ways(x, weights, cotangent):
    out, pullback = jax.vjp(lambda x, weights: jax.vmap(adaptive_conv)(x, weights, grids), x, weights)
    return out, *pullback(cotangent)

  cotangent = flat_maps(inner(arrays["cotangent"], (2, 3)))
  out, of_input, of_weights = both_ways(flat_maps(arrays["input"]), weights, cotangent)
  back = lambda x: np.asarray(x).swapaxes(1, 2).reshape(count, channels, height, width)
  check_close("out", back(out)[:, :, 3:-3, 3:-3], arrays["out"], relative=VALUES)
  check_close("input", back(of_input), arrays["grad_input"], relative=VALUES)
  of_filters = np.asarray(of_weights)[:, 0, 0].transpose(0, 3, 1, 2).reshape(count, height, width, 7, 7)
  check_close("filters", of_filters[:, 3:-3, 3:-3], arrays["grad_filters"], relative=VALUES)
