"""A stage's real step with shapes instead of arrays: what is compiled here is what the trainer runs."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mllm_jax import build, parameters, preflight, sharding
from mllm_jax.batch import Batch
from mllm_jax.config import Config, ModelConfig, ModelRecipe, StageConfig, VdimStage, VisionConfig
from mllm_jax.data.batching import packed_length
from mllm_jax.data.image_batches import ImageBatch
from mllm_jax.models.mllm import abstract
from mllm_jax.processors import shapes_aspect
from mllm_jax.training import optimizer as optimizer_lib
from mllm_jax.training import step as step_lib
from mllm_jax.training import vdim_step

SCHEDULE_STEPS = 1000  # of the learning rate's schedule: a number inside the compiled step that changes nothing else


@dataclasses.dataclass(frozen=True)
class AbstractStep:
  """A step and its arguments as shapes with shardings: `step.lower(state, frozen, batch)` under `jax.set_mesh(mesh)`.

  flat: every parameter by path; rates: its learning rate, 0 where it is frozen.
  """

  step: Callable
  state: step_lib.TrainState
  frozen: dict[str, jax.ShapeDtypeStruct]
  batch: Any
  flat: dict[str, jax.ShapeDtypeStruct]
  rates: dict[str, float]
  mesh: Mesh

  @property
  def arguments(self) -> tuple:
    return self.state, self.frozen, self.batch

  def lower(self):
    with jax.set_mesh(self.mesh):
      return self.step.lower(*self.arguments)


def make(config: Config, name: str, mesh: Mesh) -> AbstractStep:
  """The step of the stage `name`: "vdim", "pretrain" or "finetune". Raises ConfigError as the trainer does before it
  starts, WeightsError where an architecture is not known."""
  stage = getattr(config, name)
  preflight.check_stage(name, stage, sharding.batch_shards(mesh), 1)
  return _vdim(config, mesh) if name == "vdim" else _language(config, name, stage, mesh)


def _language(config: Config, name: str, stage: StageConfig, mesh: Mesh) -> AbstractStep:
  model = build.architecture(config.model, stage.lora, packed=stage.data.batching == "pack")
  graphdef, shapes = parameters.flatten(abstract(model))
  rates = parameters.match(stage.parameters, list(shapes), f"{name}.parameters")
  trained = {path: rate for path, rate in rates.items() if rate}
  optimizer = optimizer_lib.make(stage, trained)
  make_step = lambda shardings: step_lib.make_step(
    graphdef, stage, trained, SCHEDULE_STEPS, config.seed, mesh, optimizer, shardings
  )
  return _assembled(shapes, rates, config.model, optimizer, make_step, batch(model, stage), mesh)


def _vdim(config: Config, mesh: Mesh) -> AbstractStep:
  stage, vision = config.vdim, build.part_config(config.model.vision, "vision")
  make = lambda: vdim_step.make_model(vision, config.model.projector, stage, config.model.dtype, nnx.Rngs(0))
  graphdef, shapes = parameters.flatten(nnx.eval_shape(make))
  rates = {path: stage.learning_rate if vdim_step.is_trained(path) else 0.0 for path in shapes}
  optimizer = vdim_step.make_optimizer(stage)
  make_step = lambda shardings: vdim_step.make_step(graphdef, stage, config.seed, mesh, optimizer, shardings)
  return _assembled(shapes, rates, config.model, optimizer, make_step, image_batch(vision, stage), mesh)


def _assembled(
  shapes: dict,
  rates: dict[str, float],
  recipe: ModelRecipe,
  optimizer: optax.GradientTransformation,
  make_step: Callable,
  batch: Any,
  mesh: Mesh,
) -> AbstractStep:
  """`make_step` gives the compiled function from the state's shardings."""
  flat = _placed(shapes, recipe, rates, mesh)
  trainable = {path: x for path, x in flat.items() if rates[path]}
  frozen = {path: x for path, x in flat.items() if not rates[path]}
  shardings = step_lib.state_shardings(optimizer, trainable, mesh)
  state = _state(optimizer, trainable, shardings, mesh)
  return AbstractStep(make_step(shardings), state, frozen, _laid_out(batch, mesh), flat, rates, mesh)


def batch(model: ModelConfig, stage: StageConfig) -> Batch:
  """Shapes of a step's batch [A, B, ...]; of "group", of one whose micro-batches all have the longest bucket. Raises
  ConfigError where the model cannot read data.image_aspect."""
  data = stage.data
  places = packed_length(data) if data.batching == "pack" else data.max_length
  rows = (stage.accumulation, stage.batch_size // stage.accumulation)
  shape = lambda dtype, *dims: jax.ShapeDtypeStruct((*rows, *dims), dtype)
  ids = ("tokens", "targets", "segment_ids", "positions", "visual_index")
  return Batch(
    **{name: shape(jnp.int32, places) for name in ids},
    loss_weights=shape(jnp.float32, places),
    patches=shape(jnp.uint8, data.max_images, shapes_aspect(model, data).patches, model.vision.patch_values),
    grids=shape(jnp.int32, data.max_images, 2),
  )


def image_batch(vision: VisionConfig, stage: VdimStage) -> ImageBatch:
  """Shapes of a step's images [A, B, ...]."""
  rows = (stage.accumulation, stage.batch_size // stage.accumulation)
  return ImageBatch(
    jax.ShapeDtypeStruct((*rows, vision.grid**2, vision.patch_values), jnp.uint8),
    jax.ShapeDtypeStruct(rows, jnp.float32),
  )


def _placed(shapes: dict, recipe: ModelRecipe, rates: dict[str, float], mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
  dtypes = build.stored_dtypes(recipe, shapes, rates)
  return build.placed({path: (x.shape, dtypes[path]) for path, x in shapes.items()}, mesh)


def _state(optimizer, trainable: dict, shardings: step_lib.TrainState, mesh: Mesh) -> step_lib.TrainState:
  bare = {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in trainable.items()}
  state = jax.eval_shape(lambda t: step_lib.initial_state(optimizer, t, mesh), bare)
  return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state, shardings)


def _laid_out(batch: Any, mesh: Mesh) -> Any:
  """As `sharding.to_device` lays it out."""
  place = NamedSharding(mesh, P(None, sharding.BATCH_AXES))
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), batch)
