"""The pyramids that VDIM is compared with, and the choice among them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from released import check_close, jit

from mllm_jax.config import ConfigError
from mllm_jax.models.projectors import pyramid

GRIDS = [(4, 6), (3, 5), (1, 9), (2, 1), (0, 0)]
CHANNELS, PLACES = 3, 24


def inputs(dtype=jnp.float32):
  random = np.random.default_rng(0)
  valid = np.arange(PLACES) < np.prod(GRIDS, axis=-1, keepdims=True)
  features = np.where(valid[..., None], random.standard_normal((*valid.shape, CHANNELS)), np.nan)
  patches = random.standard_normal((*valid.shape, 588))
  return jnp.asarray(features, dtype), jnp.asarray(patches, jnp.float32), jnp.asarray(GRIDS, jnp.int32)


def bilinear(x: np.ndarray, n: int) -> np.ndarray:
  """[h, w, C] -> [n h, n w, C], align_corners False, in float64."""
  for axis in range(2):
    length = x.shape[axis]
    position = np.clip((np.arange(n * length) + 0.5) / n - 0.5, 0, length - 1)
    first = np.minimum(position.astype(int), max(length - 2, 0))
    second = np.minimum(first + 1, length - 1)
    share = (position - first).reshape([-1 if i == axis else 1 for i in range(3)])
    x = np.take(x, first, axis) * (1 - share) + np.take(x, second, axis) * share
  return x


def check_maps(maps, level, expected):
  """Every map against expected(h x w features) [n h, n w, C], and zeros beyond it."""
  features = np.asarray(inputs()[0], np.float64)
  for x, source, (h, w) in zip(np.asarray(maps[level]), features, GRIDS):
    places = 4**level * h * w
    assert x.shape == (4**level * PLACES, CHANNELS) and not x[places:].any()
    if places:
      found = x[:places].reshape(h << level, w << level, CHANNELS)
      check_close(f"{h} x {w}", found, expected(source[: h * w].reshape(h, w, CHANNELS)), relative=1e-5)


def test_none():
  maps = pyramid.make("none", (0,), CHANNELS, nnx.Rngs(0))(*inputs())
  assert maps.keys() == {0}
  check_maps(maps, 0, lambda x: x)


@pytest.mark.parametrize("levels", [(0, 2), (1, 3), (0,)])
def test_bilinear(levels):
  maps = jit(pyramid.make("bilinear", levels, CHANNELS, nnx.Rngs(0)))(*inputs())
  assert tuple(maps) == levels
  for level in levels:
    check_maps(maps, level, lambda x: bilinear(x, 2**level))


def test_bilinear_backwards():
  """Weights of a pixel sum to 1: the gradient of the sum of all pixels sums to their number."""
  features, patches, grids = inputs()
  module = pyramid.make("bilinear", (2,), CHANNELS, nnx.Rngs(0))
  gradient = jit(jax.grad(lambda features: module(features, patches, grids)[2].sum()))(features)
  np.testing.assert_allclose(gradient.sum((1, 2)), [16 * h * w * CHANNELS for h, w in GRIDS], rtol=1e-5)


def test_deconvolution():
  module = pyramid.make("deconv", (0, 1, 2), CHANNELS, nnx.Rngs(0))

  def transposed(x, stage):
    kernel = np.asarray(stage.kernel[...], np.float64).reshape(CHANNELS, 2, 2, CHANNELS)
    out = np.zeros((2 * x.shape[0], 2 * x.shape[1], CHANNELS))
    for (y, x_), cell in zip(np.ndindex(*x.shape[:2]), x.reshape(-1, CHANNELS)):
      out[2 * y : 2 * y + 2, 2 * x_ : 2 * x_ + 2] = np.einsum("c,cabk->abk", cell, kernel)
    return out + np.tile(np.asarray(stage.bias[...]).reshape(2, 2, CHANNELS), (*x.shape[:2], 1))

  for stage in module.stages:
    stage.bias[...] = jnp.asarray(np.random.default_rng(1).standard_normal(4 * CHANNELS), jnp.float32)
  maps = jit(module)(*inputs())
  first, second = module.stages
  check_maps(maps, 1, lambda x: transposed(x, first))
  check_maps(maps, 2, lambda x: transposed(transposed(x, first), second))


@pytest.mark.parametrize("kind", ["vdim", "bilinear", "deconv"])
def test_same_call(kind):
  """Leading axes, types, a key, and only the levels asked for."""
  module = pyramid.make(kind, (0, 2), CHANNELS, nnx.Rngs(0))
  features, patches, grids = inputs(jnp.bfloat16)
  rows = jit(module)(features[None], patches[None], grids[None], jax.random.key(0))
  assert {level: (x.shape, x.dtype) for level, x in rows.items()} == {
    level: ((1, len(GRIDS), 4**level * PLACES, CHANNELS), jnp.bfloat16) for level in (0, 2)
  }
  assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in rows.values())


@pytest.mark.parametrize(
  "kind, levels, message",
  [
    ("sapa", (0, 2), "'sapa' is unknown; known: vdim, bilinear, deconv, convnext, none"),
    ("vdim", (0, 4), r"\(0, 4\) must name some of 0 to 3"),
    ("vdim", (2, 0), r"\(2, 0\) must name some of 0 to 3, in order"),
    ("bilinear", (), r"\(\) must name some of 0 to 3"),
    ("none", (0, 2), r"\(0, 2\) needs a pyramid"),
    ("deconv", (0,), r"'deconv' has nothing to do"),
  ],
)
def test_refusals(kind, levels, message):
  with pytest.raises(ConfigError, match=message):
    pyramid.make(kind, levels, CHANNELS, nnx.Rngs(0))
