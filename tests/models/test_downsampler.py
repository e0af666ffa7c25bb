"""The attention down-sampler of VDIM's pre-training against the released one, and against a slow float64 one."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm_jax.models import downsampler

GOLDENS = Path(__file__).parents[1] / "goldens" / "uhd"


def close(actual, expected, relative):
  """Within this share of the largest expected value."""
  np.testing.assert_allclose(actual, expected, rtol=0, atol=relative * np.abs(expected).max())


@pytest.fixture(scope="module")
def golden():
  with np.load(GOLDENS / "attn_downsampler_sq.npz") as file:
    return dict(file)


@pytest.fixture(scope="module")
def released(golden):
  module = downsampler.AttentionDownsampler(6, rngs=nnx.Rngs(0))
  module.tap_scale[...], module.tap_bias[...] = golden["w/w"], golden["w/b"]
  module.saliency.kernel[...] = golden["w/attention_net.1.weight"].T
  module.saliency.bias[...] = golden["w/attention_net.1.bias"]
  return module


def test_values_and_gradients_are_the_released_ones(golden, released):
  eye, graphdef_and_state = jnp.eye(112), nnx.split(released)
  x = golden["x"].transpose(1, 2, 0).astype(np.float32)
  cotangent = golden["cotangent"].transpose(1, 2, 0)

  @jax.jit
  def outcome(state, x):
    out = nnx.merge(graphdef_and_state[0], state)(x, eye, eye, golden["keep_mask"])
    return (out * cotangent).sum(), out

  (_, out), (gradient, grad_x) = jax.value_and_grad(outcome, (0, 1), has_aux=True)(graphdef_and_state[1], x)
  # Outputs to float32's rounding over sums of 196 and 25 terms; gradients go through the softmax as well.
  close(out.transpose(2, 0, 1), golden["out"], 1e-5)
  close(grad_x[golden["grad_rows"]].transpose(2, 0, 1), golden["grad_x"], 1e-4)
  close(gradient["tap_scale"][...], golden["g/w"], 1e-4)
  close(gradient["tap_bias"][...], golden["g/b"], 1e-4)
  close(gradient["saliency"]["kernel"][...].T, golden["g/attention_net.1.weight"], 1e-4)
  close(gradient["saliency"]["bias"][...], golden["g/attention_net.1.bias"], 1e-4)


def test_blur_and_saliency_are_the_released_ones(golden, released):
  x = golden["x"].transpose(1, 2, 0).astype(np.float32)
  blurred = downsampler.blur(downsampler.blur(jnp.asarray(x)).swapaxes(0, 1)).swapaxes(0, 1)
  close(blurred[:3].transpose(2, 0, 1), golden["blurred_rows"], 1e-6)
  # The released code's map for looking at is of the unblurred picture; what pools, and is tested above, sees the blur.
  close(released.saliency(x[:14])[..., 0], golden["saliency_rows"], 1e-5)


def slow(x, saliency, bias, scale, shift, keep):
  """Blur, logits and softmax of a picture-sized map [H, W, C], pixel by pixel in float64."""
  taps = np.exp(-0.5 * np.arange(-2.0, 3.0) ** 2)
  kernel = np.outer(taps, taps) / taps.sum() ** 2
  padded = np.pad(x.astype(np.float64), ((2, 2), (2, 2), (0, 0)), mode="reflect")
  height, width, size = *x.shape[:2], len(scale)
  blurred = sum(kernel[i, j] * padded[i : i + height, j : j + width] for i in range(5) for j in range(5))
  out = np.zeros((height // size, width // size, x.shape[2]))
  for row, column in np.ndindex(out.shape[:2]):
    patch = blurred[row * size : (row + 1) * size, column * size : (column + 1) * size]
    logits = (patch @ saliency + bias) * keep[row, column] * scale + shift
    weights = np.exp(logits - logits.max())
    out[row, column] = np.einsum("yx,yxc->c", weights / weights.sum(), patch)
  return out


@settings(deadline=None, max_examples=5)
@given(st.integers(1, 3), st.integers(1, 3), st.sampled_from([(3, 4), (5, 2)]), st.integers(0, 2**32 - 1))
def test_any_map_brought_to_pixels(rows, columns, cells, seed):
  """Rectangles too, and the matrices that bring a map to pixels."""
  rng = np.random.default_rng(seed)
  size = 4
  module = downsampler.AttentionDownsampler(5, size, rngs=nnx.Rngs(seed % 1000))
  maps = rng.normal(size=(*cells, 5)).astype(np.float32)
  to_rows, to_columns = rng.normal(size=(rows * size, cells[0])), rng.normal(size=(columns * size, cells[1]))
  keep = rng.integers(0, 2, (rows, columns)).astype(np.float32)
  found = module(maps, to_rows.astype(np.float32), to_columns.astype(np.float32), keep)
  parameters = [np.asarray(p, np.float64) for p in (module.saliency.kernel[..., 0], module.saliency.bias[0])]
  parameters += [np.asarray(p[...], np.float64) for p in (module.tap_scale, module.tap_bias)]
  picture = np.einsum("yh,xw,hwc->yxc", to_rows.astype(np.float32), to_columns.astype(np.float32), maps, dtype=float)
  close(found, slow(picture, *parameters, keep), 1e-5)


def test_dropout_touches_the_saliency_only():
  """On a constant map every weighting gives the constant; on another one the key, and nothing else, changes it."""
  module, eye, keep = downsampler.AttentionDownsampler(8, 4, rngs=nnx.Rngs(1)), jnp.eye(12), jnp.ones((3, 3))
  call = jax.jit(lambda maps, key: module(maps, eye, eye, keep, key))
  maps = 5 * jax.random.normal(jax.random.key(2), (12, 12, 8))
  first, again, other = (call(maps, jax.random.key(seed)) for seed in (3, 3, 4))
  np.testing.assert_array_equal(first, again)
  assert np.abs(first - other).max() > 0.01 and np.abs(first - module(maps, eye, eye, keep)).max() > 0.01
  np.testing.assert_allclose(call(jnp.full((12, 12, 8), 2.5), jax.random.key(3)), 2.5, rtol=1e-6)  # sums of weights


def test_a_patch_that_is_not_kept_forgets_its_saliency():
  module, eye = downsampler.AttentionDownsampler(3, 4, rngs=nnx.Rngs(1)), jnp.eye(8)
  maps = jax.random.normal(jax.random.key(2), (8, 8, 3))
  forgotten = module(maps, eye, eye, jnp.zeros((2, 2)))
  module.saliency.kernel[...] = 10 * module.saliency.kernel[...]
  np.testing.assert_array_equal(module(maps, eye, eye, jnp.zeros((2, 2))), forgotten)
  assert np.abs(module(maps, eye, eye, jnp.ones((2, 2))) - forgotten).max() > 0.01


def test_keep_is_drawn_with_the_released_probability():
  keep = np.asarray(downsampler.draw_keep(jax.random.key(0), (100, 100)))
  assert set(np.unique(keep)) == {0.0, 1.0} and keep.mean() == pytest.approx(0.8, abs=0.02)  # five standard deviations


def test_bilinear_matrix_is_numpy_interpolation():
  for target, source in [(336, 96), (336, 48), (7, 7), (5, 3), (4, 1)]:
    matrix = downsampler.bilinear_matrix(target, source)
    places = (np.arange(target) + 0.5) * source / target - 0.5
    expected = [np.interp(places, np.arange(source), cell) for cell in np.eye(source)]
    np.testing.assert_allclose(matrix, np.transpose(expected), atol=1e-7)  # float32's rounding


def test_partial_patches_are_refused():
  module = downsampler.AttentionDownsampler(3, 4, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="12 x 10 pixels are no whole patches of 4"):
    module(jnp.zeros((4, 4, 3)), jnp.zeros((12, 4)), jnp.zeros((10, 4)), jnp.ones((3, 2)))


def test_scale_net():
  net = downsampler.ScaleNet(4, rngs=nnx.Rngs(0))
  assert np.abs(net.linear.kernel[...]).max() <= 0.05
  net.linear.kernel[...], net.linear.bias[...] = jnp.array([[1.0], [2.0], [0.0], [0.0]]), jnp.array([0.5])
  found = net(jnp.array([[1.0, -1.0, 9.0, 9.0], [-20.0, 0.0, 0.0, 0.0]], jnp.bfloat16))
  np.testing.assert_allclose(found, [[np.exp(-0.4)], [1e-4]], rtol=1e-6)


def test_the_heads_have_one_of_each_kind_a_level():
  heads = downsampler.PretrainingHeads(4, 3, 2, rngs=nnx.Rngs(0))
  assert len(heads.downsamplers) == len(heads.scales) == 3 and heads.downsamplers[2].tap_scale.shape == (2, 2)
  assert not np.array_equal(heads.downsamplers[0].tap_scale[...], heads.downsamplers[1].tap_scale[...])
