"""The loss of VDIM's pre-training against the released training step, and its parts against slow ones."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import slow_vdim
from flax import nnx
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mllm_jax import parameters
from mllm_jax.models.downsampler import PretrainingHeads, bilinear_matrix
from mllm_jax.training import vdim_loss

GOLDENS = Path(__file__).parents[1] / "goldens" / "uhd"
LEVELS = ("_2x", "")  # how the released names of the levels' heads end, level by level
HEADS = {  # our parameter -> the released one and how it is turned
  "downsamplers/{}/tap_scale": ("downsampler{}.w", lambda w: w),
  "downsamplers/{}/tap_bias": ("downsampler{}.b", lambda w: w),
  "downsamplers/{}/saliency/kernel": ("downsampler{}.attention_net.1.weight", np.transpose),
  "downsamplers/{}/saliency/bias": ("downsampler{}.attention_net.1.bias", lambda w: w),
  "scales/{}/linear/kernel": ("scale_net{}.net.weight", lambda w: w[:, :, 0, 0].T),
  "scales/{}/linear/bias": ("scale_net{}.net.bias", lambda w: w),
}


def close(actual, expected, relative, name=""):
  """Within this share of the largest expected value."""
  np.testing.assert_allclose(actual, expected, rtol=0, atol=relative * np.abs(expected).max(), err_msg=name)


def released_heads(golden, prefix="w/"):
  """{our path: array} of the released heads or of their gradients."""
  found = {}
  for level, ending in enumerate(LEVELS):
    for path, (name, turn) in HEADS.items():
      found[path.format(level)] = turn(golden[prefix + name.format(ending)])
  return found


def make_jitter(row, column, zoom, flip):
  return vdim_loss.Jitter(jnp.int32(row), jnp.int32(column), jnp.float32(zoom), jnp.bool_(flip))


def released_draws(golden, number):
  """What the released step had drawn for a jitter; it drew for the 4x level first."""
  projection = places = None
  if golden["proj_raw"].size:
    projection = golden["proj_raw"][number, 0]
    projection = jnp.asarray(projection / np.linalg.norm(projection, axis=0))
  if golden["crf_coords"].size and number == 0:
    places = jnp.asarray(golden["crf_coords"][::-1])
  keep = (golden["rand_uniform"][2 * number : 2 * number + 2][::-1, 0, ..., 0] > 0.2).astype(np.float32)
  jitter = make_jitter(*golden["transforms_x_y_zoom_flip"][number])
  return vdim_loss.Draws(jitter, projection, jnp.asarray(keep), places, None)


def tower(golden, image):
  """The goldens' stand-in for the vision tower: one convolution, 14 x 14 pixels a patch."""
  patches = image.reshape(8, 14, 8, 14, 3)
  return jnp.einsum("iyjxc,ocyx->ijo", patches, golden["feat_weight"]) + golden["feat_bias"]


@pytest.mark.parametrize("name", ["full", "noproj_nocrf"])
def test_values_and_gradients_are_the_released_ones(name):
  with np.load(GOLDENS / f"mlr_loss_{name}.npz") as file:
    golden = dict(file)
  image = jnp.asarray(golden["image_u8"][0].transpose(1, 2, 0) / np.float32(127.5) - 1)
  graphdef, initial = parameters.flatten(PretrainingHeads(16, rngs=nnx.Rngs(0)))
  heads = {path: jnp.asarray(weight) for path, weight in released_heads(golden).items()}
  assert jax.tree.map(jnp.shape, initial) == jax.tree.map(jnp.shape, heads)
  start = "w/upsampler."
  upsampler = {key[len(start) :]: jnp.asarray(golden[key]) for key in golden if key.startswith(start)}
  jitters = len(golden["loss_per_jitter"])
  draws = [released_draws(golden, number) for number in range(jitters)]

  @jax.jit
  def loss(upsampler, heads):
    merged, maps = parameters.unflatten(graphdef, heads), slow_vdim.levels(upsampler, tower(golden, image), image)
    parts = []
    for draw in draws:
      target = tower(golden, vdim_loss.jittered(image, draw.jitter))
      parts.append(vdim_loss.jitter_loss(maps, target, image, merged, draw, jitters))
    return sum(total for total, _ in parts), parts

  (_, parts), (upsampler_gradient, heads_gradient) = jax.value_and_grad(loss, (0, 1), has_aux=True)(upsampler, heads)
  # Sums of many float32 terms of both signs, and coordinates of a zoom in float32.
  close([total for total, _ in parts], golden["loss_per_jitter"], 1e-5)
  close(parts[-1][1]["reconstruction_0"], golden["log/loss_rec_2x"], 2e-5)
  close(parts[-1][1]["reconstruction_1"], golden["log/loss_rec_4x"], 2e-5)
  if name == "full":
    close(parts[0][1]["crf_0"] + parts[0][1]["crf_1"], golden["log/loss_crf_4x"], 1e-5)  # logged as the sum of both
  for path, expected in released_heads(golden, "g/").items():
    close(heads_gradient[path], expected, 1e-4, path)
  for key in upsampler if name == "full" else ():
    # The stages' own gradients are noisier in float32, the width of the spatial kernel most.
    close(upsampler_gradient[key], golden[f"g/upsampler.{key}"], 5e-4 if key.endswith("spatial") else 1e-4, key)


def test_views_are_the_released_ones():
  with np.load(GOLDENS / "jitter.npz") as golden:
    for number, parameters_of_view in enumerate(golden["params"]):
      found = jax.jit(vdim_loss.jittered)(golden["image"][..., None], make_jitter(*parameters_of_view))[..., 0]
      # Without a zoom pixels are only moved; with one, coordinates up to 116 in float32 are off by 1e-5.
      tolerance = 5e-5 if parameters_of_view[2] > 1 else 0
      np.testing.assert_allclose(found, golden[f"out{number}"], rtol=0, atol=tolerance)


def slow_view(image, row, column, zoom, flip):
  """The view made step by step in float64: extended, enlarged as a whole, cropped, flipped."""
  size, pad = len(image), vdim_loss.PAD
  extended = np.pad(image.astype(float), ((pad, pad), (pad, pad), (0, 0)), mode="reflect")
  cells = np.arange(len(extended))
  enlarged = int(len(extended) * zoom)
  places = (np.arange(enlarged) + 0.5) / zoom - 0.5
  matrix = np.array([np.interp(places, cells, cell) for cell in np.eye(len(cells))]).T
  whole = np.einsum("yh,xw,hwc->yxc", matrix, matrix, extended, optimize=True)
  cropped = whole[row : row + size, column : column + size]
  assert cropped.shape == image.shape
  return cropped[:, ::-1] if flip else cropped


@settings(deadline=None, max_examples=15)
@given(st.one_of(st.just(1.0), st.floats(1, 2, width=32)), st.floats(0, 1), st.floats(0, 1), st.booleans())
@example(1.5, 1.0, 0.0, True)
@example(1.9999, 1.0, 1.0, False)
@example(1.0, 0.0, 1.0, False)
def test_views_are_the_slow_ones(zoom, down, right, flip):
  image = np.random.default_rng(0).normal(size=(40, 40, 2)).astype(np.float32)
  last = int(100 * zoom) - 40  # the last place a crop can start at
  row, column = int(down * last), int(right * last)
  found = compiled_view(image, make_jitter(row, column, zoom, flip))
  # Coordinates up to 100 in float32, between pixels that differ by up to about 6.
  np.testing.assert_allclose(found, slow_view(image, row, column, zoom, flip), rtol=0, atol=1e-4)


compiled_view = jax.jit(vdim_loss.jittered)


@pytest.mark.parametrize("flip", [False, True])
def test_axis_matrices_are_a_resized_map_jittered(flip):
  features, jitter = jax.random.normal(jax.random.key(0), (12, 12, 3)), make_jitter(50, 7, 1.3, flip)
  resize = bilinear_matrix(84, 12)
  expected = vdim_loss.jittered(jnp.einsum("yh,xw,hwc->yxc", resize, resize, features), jitter)
  to_rows, to_columns = vdim_loss.axis_matrices(jitter, 84, 12)
  np.testing.assert_allclose(jnp.einsum("yh,xw,hwc->yxc", to_rows, to_columns, features), expected, atol=1e-5)
  np.testing.assert_allclose(to_rows.sum(1), 1, atol=1e-6)


def test_pictures_too_small_to_be_extended_are_refused():
  with pytest.raises(ValueError, match="30 pixels cannot be extended by 30 by reflection"):
    vdim_loss.jittered(jnp.zeros((30, 30, 3)), make_jitter(0, 0, 1, False))


def test_crf_is_the_mean_over_all_pairs():
  rng = np.random.default_rng(0)
  features, colours, places = rng.normal(size=(20, 4)) + 30, rng.normal(size=(20, 3)), rng.random((20, 2))
  pairs = []
  for i, j in np.ndindex(20, 20):
    apart, other = ((places[i] - places[j]) ** 2).sum(), ((colours[i] - colours[j]) ** 2).sum()
    kernel = 10 * np.exp(-apart / 0.2 - other / 0.3) + 3 * np.exp(-apart / 0.01)
    pairs.append(kernel * ((features[i] - features[j]) ** 2).sum())
  arrays = [jnp.asarray(array, jnp.float32) for array in (features, colours, places)]
  assert float(vdim_loss.crf(*arrays)) == pytest.approx(np.mean(pairs), rel=1e-5)  # features near 30 in float32


def test_draws():
  draw = jax.vmap(lambda key: vdim_loss.draw(key, 336, 24, 64, crf_samples=50))
  draws = jax.jit(draw)(jax.random.split(jax.random.key(0), 400))
  zoomed = np.asarray(draws.jitter.zoom) > 1
  # Five standard deviations of 400 draws.
  assert zoomed.mean() == pytest.approx(0.5, abs=0.125) and draws.jitter.flip.mean() == pytest.approx(0.5, abs=0.125)
  assert draws.jitter.zoom[zoomed].mean() == pytest.approx(1.5, abs=0.1) and draws.jitter.zoom.max() < 2
  last = np.floor(396 * np.asarray(draws.jitter.zoom)) - 336
  for start in (draws.jitter.row, draws.jitter.column):
    assert start.dtype == jnp.int32 and start.min() >= 0 and (start <= last).all()
    assert (start / last).mean() == pytest.approx(0.5, abs=0.08)
  assert np.corrcoef(draws.jitter.row / last, draws.jitter.column / last)[0, 1] == pytest.approx(0, abs=0.25)
  assert draws.projection.shape == (400, 64, 30) and draws.keep.shape == (400, 2, 24, 24)
  np.testing.assert_allclose(jnp.linalg.norm(draws.projection, axis=1), 1, rtol=1e-5)
  assert draws.places.shape == (400, 2, 2, 50) and draws.places.min() >= 0 and draws.places.max() == 335
  assert draws.dropout.shape == (400, 2)
  bare = vdim_loss.draw(jax.random.key(0), 336, 24, 64, projected=0, crf_samples=0)
  assert bare.projection is None and bare.places is None


def make_loss(size, cells, width, **drawn):
  """(loss of (maps, heads), its arguments' shapes) for pictures and maps of these sizes, with a draw's dropout."""
  graphdef, heads = parameters.flatten(PretrainingHeads(width, rngs=nnx.Rngs(0)))

  def loss(maps, heads, target, image, key):
    draws = vdim_loss.draw(key, size, size // 14, width, **drawn)
    return vdim_loss.jitter_loss(maps, target, image, parameters.unflatten(graphdef, heads), draws)[0]

  maps = [jnp.ones((n, n, width), jnp.bfloat16) for n in cells]
  return loss, maps, heads, jnp.ones((size // 14, size // 14, width), jnp.bfloat16), jnp.ones((size, size, 3))


@pytest.mark.long
def test_a_batch_is_its_pictures_one_by_one():
  loss, maps, heads, target, image = make_loss(42, (6, 12), 8, projected=4, crf_samples=10)
  keys = jax.random.split(jax.random.key(1), 3)
  noise = lambda like: jax.random.normal(keys[0], (3, *like.shape), jnp.float32).astype(like.dtype)
  batch = jax.tree.map(noise, (maps, target, image))
  one = jax.jit(jax.value_and_grad(loss, (0, 1)))
  together = jax.jit(jax.vmap(jax.value_and_grad(loss, (0, 1)), (0, None, 0, 0, 0)))(batch[0], heads, *batch[1:], keys)
  for number, key in enumerate(keys):
    maps_of_one, *rest = jax.tree.map(lambda x: x[number], batch)
    alone = one(maps_of_one, heads, *rest, key)
    for found, expected in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
      found, expected = np.asarray(found[number], np.float32), np.asarray(expected, np.float32)
      # The maps' gradients are in bfloat16; the gradient of a saliency's bias is next to nothing, as a softmax does not
      # change with what is added everywhere, and float32 leaves 1e-8 of the terms it is summed from.
      rounding = 1e-2 if found.ndim == 3 else 1e-5
      np.testing.assert_allclose(found, expected, rtol=0, atol=rounding * np.abs(expected).max() + 1e-7)
  assert len({float(value) for value in together[0]}) == 3


def test_no_map_is_made_at_the_size_of_the_picture():
  """Nor kept for the backward pass: the compiler's own count of what it allocates at 336 pixels."""
  loss, *arguments = make_loss(336, (48, 96), 128)
  compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*arguments, jax.random.key(0)).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 336 * 336 * 128 * 4
