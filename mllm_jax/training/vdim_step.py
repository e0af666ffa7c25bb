"""One step of VDIM's own training (LLaVA-UHD v2, section 3.2): the tower is frozen, and there is no language model.

The parts of the loss are in `vdim_loss`. Here a batch of images goes through them, several views of each, into one
update. Each image has its own draws, from the seed, the step and its row, so that they do not depend on how a batch is
cut into micro-batches or spread over devices.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mllm_jax import parameters, sharding
from mllm_jax.config import IMAGENET_MEAN, IMAGENET_STD, ConfigError, ProjectorConfig, VdimStage, VisionConfig
from mllm_jax.data.image_batches import ImageBatch
from mllm_jax.models.downsampler import PretrainingHeads
from mllm_jax.models.projectors.vdim import LEVELS, Vdim
from mllm_jax.models.vision import VisionTower
from mllm_jax.training import nadam, vdim_loss
from mllm_jax.training.step import TrainState, updated

NORM_EPS = 1e-5  # of FeatUp's ChannelNorm, which is PyTorch's layer norm and stays as it is initialised
OPTIMIZERS = {"nadam": nadam.scale_by_nadam, "adam": optax.scale_by_adam}


class Projector(nnx.Module):
  """The part of a projector that is trained here, under the path that it has there."""

  def __init__(self, levels: int, width: int, *, rngs: nnx.Rngs):
    self.pyramid = Vdim(levels, width, rngs=rngs)


class VdimTraining(nnx.Module):
  """The tower, VDIM, and the heads that its loss is computed through: `vision`, `projector.pyramid`, `heads`."""

  def __init__(
    self, vision: VisionConfig, levels: int, supervised: int, *, dtype: str, rngs: nnx.Rngs, any_aspect: bool = False
  ):
    self.vision = VisionTower(vision, any_aspect=any_aspect, dtype=dtype, rngs=rngs)
    self.projector = Projector(levels, vision.width, rngs=rngs)
    self.heads = PretrainingHeads(vision.width, supervised, vision.patch_size, rngs=rngs)


def count_levels(projector: ProjectorConfig) -> int:
  """How many stages the VDIM of a projector has. Raises ConfigError where it has no VDIM."""
  levels = max(projector.levels, default=0)
  if not projector.any_aspect or projector.pyramid != "vdim" or not 1 <= levels <= LEVELS:
    raise ConfigError(
      f"the stage vdim trains the VDIM of model.projector, and kind={projector.kind!r}, pyramid={projector.pyramid!r}, "
      f"levels={projector.levels} has none; set kind=hiwin, pyramid=vdim and levels up to 1, 2 or {LEVELS}"
    )
  return levels


def make_model(
  vision: VisionConfig, projector: ProjectorConfig, stage: VdimStage, dtype: str, rngs: nnx.Rngs, any_aspect=False
) -> VdimTraining:
  levels = count_levels(projector)
  return VdimTraining(
    vision, levels, len(supervised_levels(stage, levels)), dtype=dtype, rngs=rngs, any_aspect=any_aspect
  )


def supervised_levels(stage: VdimStage, levels: int) -> tuple[int, ...]:
  """The levels that have a loss, of a VDIM of `levels` stages."""
  return tuple(range(1, levels + 1)) if stage.supervision == "all" else (levels,)


def is_trained(path: str) -> bool:
  return not path.startswith("vision/")


def normalise(patches: jax.Array, stage: VdimStage, vision: VisionConfig) -> jax.Array:
  """uint8 [..., 3 p p] -> float32 of the same shape, as the tower and VDIM are given images here."""
  mean, std = (IMAGENET_MEAN, IMAGENET_STD) if stage.normalisation == "imagenet" else (vision.mean, vision.std)
  pixels = patches.reshape(*patches.shape[:-1], -1, 3).astype(jnp.float32) / 255
  return ((pixels - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)).reshape(patches.shape)


def to_pixels(patches: jax.Array, side: int) -> jax.Array:
  """Square images from their patches: [B, P, 3 p p] -> [B, L, L, 3]."""
  grid = round(patches.shape[1] ** 0.5)
  cells = patches.reshape(-1, grid, grid, side, side, 3).swapaxes(2, 3)
  return cells.reshape(-1, grid * side, grid * side, 3)


def to_patches(pixels: jax.Array, side: int) -> jax.Array:
  """The inverse of `to_pixels`."""
  grid = pixels.shape[1] // side
  cells = pixels.reshape(-1, grid, side, grid, side, 3).swapaxes(2, 3)
  return cells.reshape(-1, grid**2, side * side * 3)


def tower_features(model: VdimTraining, patches: jax.Array, stage: VdimStage, grids: jax.Array | None = None):
  """Normalised patches [B, P, 3 p p] -> the features that VDIM is trained on and towards, [B, P, C]."""
  features = model.vision(patches, grids)
  if not stage.norm_targets:
    return features
  x = features.astype(jnp.float32)
  centred = x - x.mean(-1, keepdims=True)
  return (centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + NORM_EPS)).astype(features.dtype)


def view_losses(
  model: VdimTraining, stage: VdimStage, patches: jax.Array, clean: jax.Array, keys: jax.Array, first: jax.Array
) -> Callable:
  """The function VdimTraining -> (loss, its parts by name) of each image of one view each, [B] all.

  patches [B, P, 3 p p], clean [B, P, C]: normalised, and their features. keys [B]. first: bool, whether this is the
  view that the term of sampled pixels belongs to. What the frozen tower makes of the views is computed beforehand.
  """
  side, n = model.vision.config.patch_size, model.vision.config.grid
  levels = supervised_levels(stage, len(model.projector.pyramid.stages))
  draw = functools.partial(
    vdim_loss.draw,
    size=n * side,
    patches=n,
    width=clean.shape[-1],
    levels=len(levels),
    projected=stage.projected,
    crf_samples=stage.crf_samples,
  )
  draw_keys, dropout_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
  draws = jax.vmap(draw)(draw_keys)
  images = to_pixels(patches, side)
  views = to_patches(jax.vmap(vdim_loss.jittered)(images, draws.jitter), side)
  targets = tower_features(model, views, stage).reshape(-1, n, n, clean.shape[-1])
  grid = jnp.full((2,), n, jnp.int32)

  def losses(model: VdimTraining):
    def one(features, patches, image, target, draws, dropout_key):
      pyramid = model.projector.pyramid
      # Apart, a level's loss does not reach the stages before it; the last level's alone has to.
      make_maps = pyramid.separate if stage.supervision == "all" else pyramid
      maps = make_maps(features, patches, grid, dropout_key)
      maps = [maps[level].reshape(2**level * n, 2**level * n, -1) for level in levels]
      _, parts = vdim_loss.jitter_loss(maps, target, image, model.heads, draws, stage.jitters)
      named, loss = {}, 0.0
      for number, level in enumerate(levels):
        named[f"rec_{2**level}x"] = parts[f"reconstruction_{number}"]
        loss += parts[f"reconstruction_{number}"]
        if stage.crf_samples:
          named[f"crf_{2**level}x"] = jnp.where(first, parts[f"crf_{number}"], 0)
          loss += vdim_loss.CRF_WEIGHT * named[f"crf_{2**level}x"]
      return loss, named

    return jax.vmap(one)(clean, patches, images, targets, draws, dropout_keys)

  return losses


def added_up(function: Callable, xs: Any) -> Any:
  """The sum of function(x) over the first axis of xs, one after another and compiled once."""
  if jax.tree.leaves(xs)[0].shape[0] == 1:
    return function(jax.tree.map(lambda x: x[0], xs))
  zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, jax.tree.map(lambda x: x[0], xs)))
  return jax.lax.scan(lambda total, x: (jax.tree.map(jnp.add, total, function(x)), None), zero, xs)[0]


def make_optimizer(stage: VdimStage) -> optax.GradientTransformation:
  """Gradients -> updates before the learning rate."""
  return OPTIMIZERS[stage.optimizer]()


def make_step(
  graphdef: nnx.GraphDef,
  stage: VdimStage,
  seed: int,
  mesh: Mesh,
  optimizer: optax.GradientTransformation,
  shardings: TrainState,
) -> Callable:
  """The compiled function (state, frozen, ImageBatch of [A, B, ...]) -> (state, metrics); the state is donated.

  The loss is the mean over images of the sum over their views. The gradients of views and micro-batches are added up
  one after another. A step whose loss or gradient is not finite changes nothing but the counters.
  """
  rows = NamedSharding(mesh, P(sharding.BATCH_AXES))

  def gradient(trainable, frozen, batch: ImageBatch, keys):
    """({name: sum over the images}, summed gradient)."""
    batch = jax.lax.with_sharding_constraint(batch, rows)
    model = parameters.unflatten(graphdef, {**frozen, **trainable})
    patches = normalise(batch.patches, stage, model.vision.config)
    clean = tower_features(model, patches, stage)

    def view(number):
      view_keys = jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)
      losses = view_losses(model, stage, patches, clean, view_keys, first=number == 0)

      def summed(trainable):
        loss, parts = losses(parameters.unflatten(graphdef, {**frozen, **trainable}))
        total = lambda values: jnp.where(batch.weights > 0, values, 0).sum()
        return total(loss), jax.tree.map(total, {"loss": loss, **parts})

      grads, numbers = jax.grad(summed, has_aux=True)(trainable)
      return numbers, grads

    numbers, grads = added_up(view, jnp.arange(stage.jitters))
    return {**numbers, "images": batch.weights.sum()}, grads

  def step(state: TrainState, frozen: dict[str, jax.Array], batch: ImageBatch):
    shape = batch.weights.shape
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step), shape)
    numbers, grads = added_up(lambda xs: gradient(state.trainable, frozen, *xs), (batch, keys))
    images = jnp.maximum(numbers.pop("images"), 1.0)
    numbers, grads = jax.tree.map(lambda x: x / images, (numbers, grads))
    norm = parameters.norm(grads)
    if stage.clip_norm > 0 and stage.clip_steps > 0:
      factor = jnp.minimum(1.0, stage.clip_norm / (norm + 1e-6))
      factor = jnp.where(state.step < stage.clip_steps, factor, 1.0)
      grads = jax.tree.map(lambda g: g * factor, grads)
    rates = dict.fromkeys(grads, jnp.float32(stage.learning_rate))
    state = updated(state, optimizer, grads, rates, jnp.isfinite(numbers["loss"]) & jnp.isfinite(norm))
    metrics = numbers | {
      "grad_norm": norm,
      "learning_rate": jnp.float32(stage.learning_rate),
      "tokens": images * batch.patches.shape[-2],
      "skipped": state.skipped,
      "skipped_in_row": state.skipped_in_row,
    }
    return state, metrics

  return jax.jit(step, donate_argnums=0, out_shardings=(shardings, sharding.replicated(mesh)))
