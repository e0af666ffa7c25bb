"""The stage "vdim": VDIM trained alone, on images and a frozen vision tower, before the language model comes in."""

import os
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from mllm_jax import build, distributed, flops, parameters, sharding
from mllm_jax.config import Config, ConfigError, ModelConfig, ModelRecipe, VdimStage, VisionConfig, to_dict
from mllm_jax.continuation import recipe_identity
from mllm_jax.data.bad_samples import MINIMUM, BadSamples
from mllm_jax.data.image_batches import ImageBatches, centre_square, open_images
from mllm_jax.data.images import load
from mllm_jax.data.patches import patchify
from mllm_jax.data.records import DataError
from mllm_jax.preflight import stage_names
from mllm_jax.run_control import say
from mllm_jax.stage_loop import StageRun
from mllm_jax.training import step as step_lib
from mllm_jax.training import vdim_step
from mllm_jax.training.checkpoint import Checkpoints
from mllm_jax.weights import vdim, vdim_file
from mllm_jax.weights.fingerprint import fingerprint
from mllm_jax.weights.mapping import place
from mllm_jax.weights.tensors import InMemory

NAME = "vdim"
COMPARED = 8  # pictures that the result is compared with bilinear interpolation on
LARGEST = 64  # patches along a side of an enlarged picture: the tower's attention is over all of them


def train_vdim(run: StageRun) -> None:
  """The stage from its last checkpoint, or its beginning, to WORKDIR/vdim/vdim.safetensors."""
  config, stage, mesh = run.config, run.stage, run.mesh

  # ---- data ----------------------------------------------------------------------------------------------------------
  vision = build.part_config(config.model.vision, "vision")
  with distributed.agreed("images"):
    records = open_images(stage.data, config.seed)
  share, shares = sharding.row_share(mesh, jax.process_index())
  noted = run.folder if sharding.first_of_share(mesh, jax.process_index()) else None
  batches = ImageBatches(
    records,
    image_size=vision.image_size,
    patch_size=vision.patch_size,
    batch_size=stage.batch_size,
    accumulation=stage.accumulation,
    steps=stage.steps,
    seed=config.seed,
    process_index=share,
    process_count=shares,
    threads=config.loader_threads,
    on_bad_sample=stage.data.on_bad_sample,
    bad_samples=BadSamples(stage.data.max_bad_share, noted, minimum=min(MINIMUM, len(records))),
  )

  # ---- model, and from where it goes on ------------------------------------------------------------------------------
  make = lambda rngs, **more: vdim_step.make_model(
    vision, config.model.projector, stage, config.model.dtype, rngs, **more
  )
  graphdef, shapes = parameters.flatten(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
  identity = {
    "stage": NAME,
    "seed": config.seed,
    "samples": batches.samples,
    "steps": batches.steps,
    "model": {"vision": to_dict(vision), "levels": max(config.model.projector.levels), "dtype": config.model.dtype},
    "recipe": recipe_identity(stage),
    "fingerprints": {"vision": build.fingerprint_of(config.model.vision, "vision")},
  }
  start = run.open(identity)

  # ---- parameters, optimizer, step -----------------------------------------------------------------------------------
  trained_shapes = {path: x for path, x in shapes.items() if vdim_step.is_trained(path)}
  rates = {path: stage.learning_rate if path in trained_shapes else 0.0 for path in shapes}
  with distributed.agreed("the tower's weights"):
    frozen = build.load_vision(config.model, vision, mesh)
  targets = build.placed({path: (x.shape, x.dtype) for path, x in trained_shapes.items()}, mesh)
  trainable = fresh(make, targets, config.seed)
  say(parameters.table({**frozen, **trainable}, rates))
  optimizer = vdim_step.make_optimizer(stage)
  state = step_lib.initial_state(optimizer, trainable, mesh)
  if start is not None:
    state = run.checkpoints.restore(start, state)
  del trainable
  step_flops = flops.vdim_flops(vision, stage, shapes, identity["model"]["levels"]) / shares
  shardings = step_lib.state_shardings(optimizer, state.trainable, mesh)
  train_step = vdim_step.make_step(graphdef, stage, config.seed, mesh, optimizer, shardings)

  # ---- the loop, and what came of it ---------------------------------------------------------------------------------
  run.begin(batches, "images", f"{stage.batch_size}")
  state = run.train(train_step, state, frozen, batches, lambda batch: step_flops)
  save_weights(run, int(state.step), identity)
  if (start or 0) < batches.steps:
    any_aspect = parameters.flatten(nnx.eval_shape(lambda: make(nnx.Rngs(0), any_aspect=True)))[0]
    both = {"untrained": fresh(make, targets, config.seed), "trained": state.trainable}
    report_errors(run, any_aspect, some_patches(records, vision), frozen, both, int(state.step))


def report_errors(run: StageRun, graphdef, patches: np.ndarray, frozen: dict, both: dict[str, dict], step: int) -> None:
  """Logs and says how far VDIM, untrained and trained, and bilinear upsampling are from the tower (see `compare`)."""
  flats = {name: {**frozen, **flat} for name, flat in both.items()}
  errors = compare(graphdef, run.stage, patches, flats, run.mesh)
  run.log.write({"stage": NAME, "step": step, **errors})
  for name in (name.removeprefix("error/trained_") for name in errors if name.startswith("error/trained_")):
    say(
      f"error at {name}, against the tower's features of pictures {name} as large: "
      f"{errors[f'error/trained_{name}']:.3f}, untrained {errors[f'error/untrained_{name}']:.3f}, "
      f"of bilinear upsampling {errors[f'error/bilinear_{name}']:.3f}"
    )


def fresh(make, targets: dict[str, jax.ShapeDtypeStruct], seed: int) -> dict[str, jax.Array]:
  """Freshly initialised parameters, made where they shall lie."""

  def arrays(key):
    flat = parameters.flatten(make(nnx.Rngs(params=key)))[1]
    return {path: flat[path].astype(target.dtype) for path, target in targets.items()}

  return jax.jit(arrays, out_shardings={path: x.sharding for path, x in targets.items()})(jax.random.key(seed))


def save_weights(run: StageRun, step: int, identity: dict) -> None:
  """VDIM without the heads it was trained through, for the stages after this one and for other runs."""
  path, model = vdim_file.in_run(run.workdir), identity["model"]
  with distributed.agreed("VDIM's file"):
    if distributed.is_first():
      checkpoints = Checkpoints(run.folder / "checkpoints", alone=True)
      wanted = [name for name in checkpoints.trainable(step) if name.startswith(vdim_file.PATH)]
      texts = {
        "levels": str(model["levels"]),
        "width": str(model["vision"]["width"]),
        "tower": f"{os.path.basename(os.path.normpath(run.config.model.vision))} {identity['fingerprints']['vision']}",
        "trained": f"{run.config.name}, step {step}",
      }
      vdim_file.write(path, checkpoints.read_trainable(step, wanted), texts)
      checkpoints.close()
  say(f"VDIM is in {path}")


# ---- for the stages after it -----------------------------------------------------------------------------------------


def settle_vdim(config: Config, workdir: Path, model: ModelConfig, shapes: Mapping, mesh) -> Path | None:
  """The file with the VDIM of this run, which all its later stages and its finished model read.

  It is what the stage vdim left, or else a copy of model.vdim_weights, or else, with a warning, a random one. None
  where the projector has no VDIM, or brings its own with model.projector_weights.

  Raises ConfigError where the stage is not finished, or the copy is of other weights than are named now; WeightsError
  where the weights named are no VDIM, or one of other levels.
  """
  wanted = {path: x for path, x in shapes.items() if path.startswith(vdim_file.PATH)}
  if not wanted or config.model.projector.pyramid != "vdim":
    return None
  path, given = vdim_file.in_run(workdir), config.model.vdim_weights
  source = fingerprint(vdim.find(given)) if given and NAME not in stage_names(config) else ""
  if distributed.first_says(path.is_file()):
    if source and vdim_file.about(path).get("source") != source:
      raise ConfigError(
        f"{path} is another VDIM than model.vdim_weights={given}; set that back, or use another --workdir"
      )
    return path
  if (workdir / NAME / "checkpoints").is_dir():
    raise ConfigError(f"{workdir / NAME}: the stage vdim is not finished; run --config.stages=vdim first")
  if not given and config.model.projector_weights:
    return None
  if given:
    tensors = vdim.open_vdim(given, model.projector, model.vision.width)
    arrays = {name: tensors.read(name) for name in wanted}
  else:
    say(
      "warning: VDIM starts from noise: no stage vdim was run in this workdir, and model.vdim_weights names none; "
      "where it is frozen it stays so"
    )
    targets = build.placed({name: (x.shape, jnp.float32) for name, x in wanted.items()}, mesh)
    arrays = jax.tree.map(gathered, build.initialise(model, targets, config.seed))
  with distributed.agreed("VDIM's file"):
    if distributed.is_first():
      vdim_file.write(path, arrays, {"source": source, "levels": str(max(config.model.projector.levels))})
  return path


def gathered(array: jax.Array) -> np.ndarray:
  """An array that several processes share, on each host."""
  if array.is_fully_addressable:
    return np.asarray(array)
  return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def placed_vdim(path: Path, recipe: ModelRecipe, shapes: Mapping, rates: Mapping[str, float], mesh) -> dict:
  """The parameters in a run's VDIM file on the mesh, by path: float32 where trained, else as all frozen ones."""
  wanted = {name: x.shape for name, x in shapes.items() if name.startswith(vdim_file.PATH)}
  dtype = lambda name: jnp.float32 if rates[name] else jnp.dtype(recipe.frozen_dtype)
  targets = build.placed({name: (shape, dtype(name)) for name, shape in wanted.items()}, mesh)
  return place(InMemory(vdim_file.read(path, wanted), str(path)), targets)


# ---- what came of it -------------------------------------------------------------------------------------------------


def some_patches(records, vision: VisionConfig) -> np.ndarray:
  """uint8 [N, P, 3 p p]: pictures at even distances through the data, as far as process 0 can read them."""
  found = np.zeros((COMPARED, vision.grid**2, vision.patch_values), np.uint8)
  count = 0
  for i in np.linspace(0, len(records) - 1, min(COMPARED, len(records))).astype(int).tolist():
    try:
      image = load(records[i].images[0])
      found[count] = patchify(centre_square(image, vision.image_size), vision.patch_size)
      count += 1
    except (DataError, IndexError):
      continue
  found, count = multihost_utils.broadcast_one_to_all((found, np.int32(count)))
  return found[:count]


def compare(
  graphdef, stage: VdimStage, patches: np.ndarray, flats: Mapping[str, dict[str, jax.Array]], mesh
) -> dict[str, float]:
  """How far maps are from the tower's features of enlarged pictures, by who made them and level: VDIM with each of the
  `flats`, or bilinear upsampling. It is the mean square of the difference over that of the wanted features from their
  mean over the picture. Towers are not made for enlarged pictures, so no upsampling comes near to 0.

  graphdef: with a tower for any aspect. patches: uint8 [N, P, 3 p p], the same in all processes. mesh: where the flats
  lie.
  """

  def errors(flat, patches):
    model = parameters.unflatten(graphdef, flat)
    n, side = model.vision.config.grid, model.vision.config.patch_size
    patches = vdim_step.normalise(patches, stage, model.vision.config)[None]
    grids = jnp.full((1, 2), n, jnp.int32)
    features = vdim_step.tower_features(model, patches, stage, grids)
    maps = model.projector.pyramid(features, patches, grids)
    pixels, found = vdim_step.to_pixels(patches, side), {}
    for level in range(1, len(model.projector.pyramid.stages) + 1):
      size = n * 2**level
      if size > LARGEST:
        break
      large = jax.image.resize(pixels, (1, size * side, size * side, 3), "bilinear")
      grids = jnp.full((1, 2), size, jnp.int32)
      wanted = vdim_step.tower_features(model, vdim_step.to_patches(large, side), stage, grids).astype(jnp.float32)
      bilinear = jax.image.resize(features.reshape(1, n, n, -1), (1, size, size, wanted.shape[-1]), "bilinear")
      scale = jnp.square(wanted - wanted.mean(1, keepdims=True)).mean()
      for name, given in (("", maps[level]), ("bilinear", bilinear.reshape(wanted.shape))):
        found[name, level] = jnp.square(given.astype(jnp.float32) - wanted).mean() / scale
    return {f"{name}_{2**level}x": value for (name, level), value in found.items()}

  measure = jax.jit(errors, out_shardings=sharding.replicated(mesh))
  result = {}
  for name, flat in flats.items():
    rows = [jax.device_get(measure(flat, each)) for each in patches]
    for key in rows[0]:
      who, level = key.split("_")
      result[f"error/{who or name}_{level}"] = float(np.mean([row[key] for row in rows]))
  return result
