"""The step of VDIM's own training: its optimizer, what it adds up, what it leaves alone, and that it compiles once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mllm_jax import parameters, sharding
from mllm_jax.config import ConfigError, MeshConfig, ProjectorConfig, VdimStage, VisionConfig
from mllm_jax.data.image_batches import ImageBatch
from mllm_jax.training import nadam, vdim_loss, vdim_step
from mllm_jax.training import step as step_lib

VISION = VisionConfig(image_size=42, width=8, layers=2, heads=2, mlp_width=16)
PROJECTOR = ProjectorConfig(kind="hiwin", levels=(0, 2))
ONE_LEVEL = ProjectorConfig(kind="hiwin", levels=(0, 1))  # compiles in half of the time
STAGE = VdimStage(projected=4, crf_samples=10, batch_size=4)


def test_nadam_is_pytorchs():
  """Of torch.optim.NAdam(lr=1e-3) in float64, after steps 1, 2 and 12."""
  expected = {
    1: [0.998943548244, -1.998943548219, 0.501056451580],
    2: [0.997980600911, -1.998419624924, 0.500361940933],
    12: [0.986938494811, -1.995038890976, 0.500515614312],
  }
  optimizer = nadam.scale_by_nadam()
  value = np.array([1.0, -2.0, 0.5])
  state = optimizer.init(jnp.zeros(3))
  for i in range(1, 13):
    updates, state = optimizer.update(jnp.array([0.3 * i, -1.0 / i, (-1.0) ** i * 0.05]), state)
    value = value - 1e-3 * np.asarray(updates, np.float64)
    if i in expected:
      # Each update of up to about 1e-3 is computed in float32.
      np.testing.assert_allclose(value, expected[i], rtol=0, atol=2e-9)
  optax_value, state = np.array([1.0]), optax.nadam(1e-3).init(jnp.zeros(1))
  updates, _ = optax.nadam(1e-3).update(jnp.array([0.3]), state)
  assert abs(optax_value + np.asarray(updates) - expected[1][0]) > 1e-4  # which is why it is written here


def images(count, seed=0):
  """uint8 patches [count, 9, 588]."""
  return np.random.default_rng(seed).integers(0, 256, (count, 9, 588)).astype(np.uint8)


class Training:
  """The stage on a mesh; `step(patches, weights)` gives the metrics as floats."""

  def __init__(self, devices=1, projector=PROJECTOR, **changes):
    self.stage = dataclasses.replace(STAGE, **changes)
    self.mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:devices])
    model = vdim_step.make_model(VISION, projector, self.stage, "float32", nnx.Rngs(0))
    self.graphdef, flat = parameters.flatten(model)
    # Larger, so that the tower's features are not all the same and no draw is lost in rounding.
    flat = {path: value * (8 if path.startswith("vision/") else 1) for path, value in flat.items()}
    places = sharding.parameter_shardings(flat, self.mesh)
    flat = {path: jax.device_put(np.asarray(value), places[path]) for path, value in flat.items()}
    trainable = {path: value for path, value in flat.items() if vdim_step.is_trained(path)}
    self.frozen = {path: value for path, value in flat.items() if not vdim_step.is_trained(path)}
    self.optimizer = vdim_step.make_optimizer(self.stage)
    shardings = step_lib.state_shardings(self.optimizer, trainable, self.mesh)
    self.start = lambda: step_lib.initial_state(self.optimizer, trainable, self.mesh)
    self.state = self.start()
    self.compiled = vdim_step.make_step(self.graphdef, self.stage, 0, self.mesh, self.optimizer, shardings)

  def step(self, patches, weights=None):
    weights = np.ones(len(patches), np.float32) if weights is None else np.asarray(weights, np.float32)
    shape = (self.stage.accumulation, -1)
    batch = ImageBatch(patches.reshape(*shape, *patches.shape[1:]), weights.reshape(shape))
    with jax.set_mesh(self.mesh):
      self.state, metrics = self.compiled(self.state, self.frozen, sharding.to_device(batch, self.mesh, leading=1))
      return {key: value.item() for key, value in jax.device_get(metrics).items()}

  def first_moments(self):
    """The gradients that a first step has seen: mu = 0.1 g."""
    return {path: 10 * np.asarray(value, np.float64) for path, value in self.state.optimizer.mu.items()}


@pytest.fixture(scope="module")
def trained():
  """(Training after three steps, of which the first is clipped, their metrics, the first moments after each)."""
  training = Training(clip_steps=1)
  steps = [(training.step(images(4, seed)), training.first_moments()) for seed in range(3)]
  return training, *zip(*steps)


def test_the_step_compiles_once_and_reports(trained):
  training, metrics, _ = trained
  assert training.compiled._cache_size() == 1
  assert set(metrics[0]) == {
    *("loss", "rec_2x", "rec_4x", "crf_2x", "crf_4x", "grad_norm"),
    *("learning_rate", "tokens", "skipped", "skipped_in_row"),
  }
  for row in metrics:
    assert row["learning_rate"] == pytest.approx(1e-3) and row["tokens"] == 4 * 9 and row["skipped"] == 0
    parts = row["rec_2x"] + row["rec_4x"] + vdim_loss.CRF_WEIGHT * (row["crf_2x"] + row["crf_4x"])
    assert row["loss"] == pytest.approx(parts, rel=1e-5)
  assert int(training.state.step) == 3 and metrics[1]["loss"] != metrics[0]["loss"]


def test_a_loss_is_that_of_each_image_and_view_by_itself(trained):
  """Image by image and view by view, through the functions of `vdim_loss` alone."""
  training, stage = Training(), STAGE
  flat = {**training.frozen, **training.state.trainable}
  model = parameters.unflatten(training.graphdef, flat)
  found = trained[1][0]
  patches, total = images(4), 0.0
  keys = jax.random.split(jax.random.fold_in(jax.random.key(0), 0), (1, 4))[0]
  mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])

  def features(pixels):  # [42, 42, 3] -> [9, 8]
    cells = pixels.reshape(3, 14, 3, 14, 3).swapaxes(1, 2).reshape(9, 588)
    x = model.vision(cells[None])[0]
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5), cells

  @jax.jit
  def one(image, key, crf):
    draw_key, dropout_key = jax.random.split(key)
    draws = vdim_loss.draw(draw_key, 42, 3, 8, 2, stage.projected, stage.crf_samples)
    clean, cells = features(image)
    target, _ = features(vdim_loss.jittered(image, draws.jitter))
    maps = model.projector.pyramid.separate(clean, cells, jnp.array([3, 3]), dropout_key)
    maps = [maps[1].reshape(6, 6, 8), maps[2].reshape(12, 12, 8)]
    loss, parts = vdim_loss.jitter_loss(maps, target.reshape(3, 3, 8), image, model.heads, draws, stage.jitters)
    return loss - jnp.where(crf, 0, vdim_loss.CRF_WEIGHT * (parts["crf_0"] + parts["crf_1"]))

  for image, key in zip(patches, keys):
    pixels = image.reshape(3, 3, 14, 14, 3).swapaxes(1, 2).reshape(42, 42, 3)
    image = jnp.asarray((pixels / 255 - mean) / std, jnp.float32)
    total += sum(float(one(image, jax.random.fold_in(key, view), view == 0)) for view in range(2))
  assert found["loss"] == pytest.approx(total / 4, rel=2e-5)  # sums in another order


def test_only_the_first_steps_are_clipped(trained):
  _, metrics, moments = trained
  norm = lambda gradient: np.sqrt(sum((x**2).sum() for x in gradient.values()))
  assert metrics[0]["grad_norm"] > 1e-3 and norm(moments[0]) == pytest.approx(1e-4, rel=2e-2)  # of norm + 1e-6
  second = {path: x - 0.9 * moments[0][path] for path, x in moments[1].items()}
  assert norm(second) == pytest.approx(metrics[1]["grad_norm"], rel=1e-3)


def close_gradients(found, expected):
  for path in expected:
    # Float32 sums in another order; a saliency's bias has no gradient but rounding.
    scale = np.abs(expected[path]).max()
    np.testing.assert_allclose(found[path], expected[path], rtol=0, atol=3e-4 * scale + 1e-7, err_msg=path)


@pytest.mark.long
def test_neither_micro_batches_nor_devices_change_a_step():
  small = dict(projector=ONE_LEVEL, clip_steps=0, jitters=1, crf_samples=5)
  whole = Training(**small)
  expected, gradients = whole.step(images(4)), whole.first_moments()
  for other in (Training(**small, accumulation=2), Training(**small, devices=2)):
    metrics = other.step(images(4))
    for name, value in expected.items():
      assert metrics[name] == pytest.approx(value, rel=1e-4), name
    close_gradients(other.first_moments(), gradients)

  # Rows that only fill up count for nothing, whatever stands in them.
  found = []
  for filling in (images(2, 7), np.zeros((2, 9, 588), np.uint8)):
    whole.state = whole.start()
    assert whole.step(np.concatenate([images(2), filling]), [1, 1, 0, 0])["tokens"] == 2 * 9
    found.append(whole.first_moments())
  for path, value in found[0].items():
    np.testing.assert_array_equal(found[1][path], value)


def test_a_step_that_is_not_finite_is_counted_and_changes_nothing(trained):
  training, _, _ = trained
  good = jax.tree.map(np.asarray, (training.state.trainable, training.state.optimizer))
  frozen = training.frozen
  training.frozen = {path: value * (np.nan if path.endswith("kernel") else 1) for path, value in frozen.items()}
  metrics = [training.step(images(4)), training.step(images(4))]
  assert [row["skipped_in_row"] for row in metrics] == [1, 2] and not np.isfinite(metrics[0]["loss"])
  kept = jax.tree.map(np.asarray, (training.state.trainable, training.state.optimizer))
  assert all((a == b).all() for a, b in zip(jax.tree.leaves(good), jax.tree.leaves(kept), strict=True))
  training.frozen = frozen
  metrics = training.step(images(4))
  assert metrics["skipped_in_row"] == 0 and metrics["skipped"] == 2


def test_what_is_trained_and_by_which_loss():
  """Apart, or the last level alone: then its loss reaches the first stage, and there is one head of each kind."""
  last = Training(clip_steps=0, supervision="last", jitters=1, optimizer="adam", crf_samples=0)
  assert {path.split("/")[0] for path in last.state.trainable} == {"projector", "heads"}
  assert not any(path.startswith("heads/scales/1") for path in last.state.trainable)
  metrics = last.step(images(4))
  assert {name for name in metrics if name[:3] in ("rec", "crf")} == {"rec_4x"}
  gradients = {path: 10 * np.abs(np.asarray(x)).max() for path, x in last.state.optimizer.mu.items()}
  assert gradients["projector/pyramid/stages/0/range_proj/0/kernel"] > 0
  assert all(np.isfinite(value) for value in gradients.values())


@pytest.mark.parametrize(
  "changes, words",
  [
    (dict(kind="spatial"), "kind='spatial'"),
    (dict(pyramid="bilinear"), "pyramid='bilinear'"),
    (dict(levels=(0,)), r"levels=\(0,\)"),
  ],
)
def test_a_projector_without_vdim_is_refused(changes, words):
  with pytest.raises(ConfigError, match=words):
    vdim_step.count_levels(dataclasses.replace(PROJECTOR, **changes))
