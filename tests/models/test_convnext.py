"""The ConvNeXt pyramid: on images of any shape as on the one that a plain convolution sees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from released import check_close, jit

from mllm_jax import parameters
from mllm_jax.config import ConfigError
from mllm_jax.models.projectors import convnext, pyramid

GRIDS = [(2, 3), (1, 5), (3, 1), (0, 0)]
PLACES = 6
WIDTHS, DEPTHS = (8, 12, 16, 20), (2, 1, 2, 1)


def images() -> jax.Array:
  """Patches float32 [N, P, 588], NaN for padding."""
  patches = np.random.default_rng(0).standard_normal((len(GRIDS), PLACES, 588)).astype(np.float32)
  valid = np.arange(PLACES) < np.prod(GRIDS, axis=-1, keepdims=True)
  return jnp.asarray(np.where(valid[..., None], patches, np.nan))


def drawn(module: nnx.Module, seed: int = 0) -> nnx.Module:
  """The module with every array drawn, so that no layer is nearly the identity."""
  random = np.random.default_rng(seed)
  graphdef, flat = parameters.flatten(module)
  draw = lambda path, x: (0.2 * random.standard_normal(x.shape) + path.endswith(("scale", "gamma"))).astype(np.float32)
  return parameters.unflatten(graphdef, {path: jnp.asarray(draw(path, x)) for path, x in flat.items()})


def test_a_flat_depthwise_convolution_is_the_plain_one():
  module = drawn(convnext.Depthwise(3, rngs=nnx.Rngs(0)))
  random, length = np.random.default_rng(1), 40
  for h, w in ((4, 6), (5, 8), (1, 9), (9, 1), (2, 2)):
    x = np.full((length, 3), 7.0, np.float32)  # what stands beyond the map must not come in
    x[: h * w] = random.standard_normal((h * w, 3))
    found = jit(lambda x, grid: module(x, grid))(x, jnp.array([h, w]))
    image = np.pad(x[: h * w].reshape(h, w, 3).astype(np.float64), ((3, 3), (3, 3), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(image, (7, 7), (0, 1))
    expected = np.einsum("hwcij,ijc->hwc", windows, np.asarray(module.kernel[...], np.float64))
    expected += np.asarray(module.bias[...])
    check_close(f"{h} x {w}", np.asarray(found)[: h * w], expected.reshape(-1, 3), relative=1e-6)


def test_levels_their_padding_and_gradients():
  """Leading axes, zeros beyond each map whatever stood in the patches there, and a gradient for every parameter."""
  module = drawn(pyramid.make("convnext", (0, 3), 5, nnx.Rngs(0), WIDTHS, DEPTHS))
  graphdef, flat = parameters.flatten(module)
  inputs = jnp.zeros((2, 2, PLACES, 5)), images().reshape(2, 2, PLACES, -1), jnp.asarray(GRIDS, jnp.int32)

  def total(flat):
    maps = parameters.unflatten(graphdef, flat)(*inputs[:2], inputs[2].reshape(2, 2, 2))
    return sum(jnp.sin(x).sum() for x in maps.values()), maps

  gradients, maps = jit(jax.grad(total, has_aux=True))(flat)
  assert {level: x.shape for level, x in maps.items()} == {0: (2, 2, 6, 5), 3: (2, 2, 384, 5)}
  for level, x in maps.items():
    for one, (h, w) in zip(np.asarray(x).reshape(4, -1, 5), GRIDS):
      assert np.isfinite(one).all() and not one[4**level * h * w :].any()
      assert not h * w or one[: 4**level * h * w].std() > 0.1
  for path, x in gradients.items():
    assert np.isfinite(x).all() and np.abs(x).max() > 1e-4, path


@pytest.mark.parametrize("widths, depths", [((8, 8), (1, 1)), ((8, 8, 8, 0), (1, 1, 1, 1)), ((), ())])
def test_sizes_that_are_none(widths, depths):
  with pytest.raises(ConfigError, match="must be 4 positive numbers each"):
    pyramid.make("convnext", (0, 1), 5, nnx.Rngs(0), widths, depths)
