"""From a recipe to a model: architectures out of folders, frozen weights, fresh or trained projectors and adapters.

The trainer and everything that uses a trained model build it here, so that they cannot disagree.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from mllm_jax import parameters, sharding
from mllm_jax.config import (
  Config,
  ConfigError,
  LoraConfig,
  MeshConfig,
  ModelConfig,
  ModelRecipe,
  StageConfig,
  from_dict,
)
from mllm_jax.data.chat import load_tokenizer
from mllm_jax.data.processor import Processor
from mllm_jax.models import projectors
from mllm_jax.models.mllm import Mllm, abstract
from mllm_jax.weights import clip, llama, mapping, mlp, spatial
from mllm_jax.weights.io import open_weights
from mllm_jax.weights.known import lookup

STAGES = ("pretrain", "finetune")


def architecture(recipe: ModelRecipe, lora: LoraConfig) -> ModelConfig:
  """The full configuration of a model: each tower's from its folder's config.json, or, where the folder is not there
  yet but has the name of a published checkpoint, that checkpoint's. Raises WeightsError where neither is known."""

  def read(folder: str, reader):
    known = lookup(folder)
    return known.config if known is not None and not Path(folder).is_dir() else reader(folder)

  return ModelConfig(
    vision=read(recipe.vision, clip.read_config),
    decoder=read(recipe.llm, llama.read_config),
    projector=recipe.projector,
    lora=lora,
    dtype=recipe.dtype,
    remat=recipe.remat,
  )


def make_processor(model: ModelConfig, stage: StageConfig, llm_folder: str) -> Processor:
  """What turns this model's conversations and images into rows."""
  return Processor(
    load_tokenizer(llm_folder),
    model.vision,
    projectors.tokens_per_crop(model),
    stage.data.template,
    stage.data.max_length,
    stage.data.max_images,
  )


def load_parameters(
  config: ModelConfig,
  recipe: ModelRecipe,
  learning_rates: dict[str, float],
  seed: int,
  mesh: Mesh,
  given: dict[str, jax.Array] | None = None,
) -> dict[str, jax.Array]:
  """Every parameter by path, on the mesh: the towers from their folders, the projector and the adapters from `given`,
  from `recipe.projector_weights`, or freshly initialised. What is trained is float32, the rest of type
  `recipe.frozen_dtype`."""
  graphdef, shapes = parameters.flatten(abstract(config))
  del graphdef
  places = sharding.parameter_shardings(shapes, mesh)
  frozen_dtype = jnp.dtype(recipe.frozen_dtype)
  targets = {
    path: jax.ShapeDtypeStruct(
      shape.shape, jnp.float32 if learning_rates[path] else frozen_dtype, sharding=places[path]
    )
    for path, shape in shapes.items()
  }
  flat = dict(given or {})
  pick = lambda keep: {path: target for path, target in targets.items() if path not in flat and keep(path)}

  flat |= mapping.load(
    open_weights(recipe.vision), clip.table(config.vision), pick(lambda path: path.startswith("vision/"))
  )
  flat |= mapping.load(
    open_weights(recipe.llm),
    llama.table(config.decoder),
    pick(lambda path: path.startswith("decoder/") and "/lora/" not in path),
  )
  wanted = pick(lambda path: path.startswith("projector/"))
  if recipe.projector_weights and wanted:
    table = (
      mlp.table() if config.projector.kind == "mlp2x_gelu" else spatial.table(config.projector, config.vision.grid)
    )
    flat |= mapping.load(open_weights(recipe.projector_weights), table, wanted)
  return flat | initialise(config, pick(lambda path: True), seed)


def initialise(config: ModelConfig, targets: dict[str, jax.ShapeDtypeStruct], seed: int) -> dict[str, jax.Array]:
  """Freshly initialised parameters, made where they shall lie: the compiler drops everything that is not asked for, so
  the towers of a 7B model cost nothing here."""
  if not targets:
    return {}

  def make(key):
    flat = parameters.flatten(Mllm(config, rngs=nnx.Rngs(params=key)))[1]
    return {path: flat[path].astype(target.dtype) for path, target in targets.items()}

  out_shardings = {path: target.sharding for path, target in targets.items()}
  return jax.jit(make, out_shardings=out_shardings)(jax.random.key(seed))


def fingerprint(folder: str) -> str:
  """Tells two checkpoints apart without reading them whole: a hash of the names and sizes of a folder's weight files
  and configuration, and of 16 blocks of 64 KiB spread over each."""
  digest = hashlib.sha256()
  path = Path(folder)
  files = (
    [path]
    if path.is_file()
    else sorted(
      file for file in path.iterdir() if file.suffix in (".safetensors", ".bin") or file.name == "config.json"
    )
  )
  for file in files:
    size = file.stat().st_size
    digest.update(f"{file.name} {size}\n".encode())
    with open(file, "rb") as content:
      for part in range(16):
        content.seek(size * part // 16)
        digest.update(content.read(2**16))
  return digest.hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Restored:
  """A trained model ready for use: `stage` says which stage's checkpoint it is, `step` at which step."""

  model: Mllm
  processor: Processor
  config: Config
  stage: str
  step: int


def read_config(workdir: str) -> Config:
  """The configuration of the run in a folder. Raises ConfigError where there is none."""
  path = Path(workdir) / "config.json"
  if not path.is_file():
    raise ConfigError(f"{workdir}: no config.json; name the --workdir of a training run")
  try:
    return from_dict(Config, json.loads(path.read_text(encoding="utf-8")))
  except json.JSONDecodeError as error:
    raise ConfigError(f"{path} is not JSON ({error}); it was written by the trainer and must not be edited") from error


def restore(workdir: str, mesh: Mesh | None = None) -> Restored:
  """The model of the last stage that has a checkpoint in `workdir`, and its processor.

  Raises ConfigError where there is no run or no checkpoint, WeightsError where the towers are not where they were.
  """
  from mllm_jax.training.checkpoint import Checkpoints  # imports orbax, which takes a second

  config = read_config(workdir)
  mesh = mesh or sharding.make_mesh(MeshConfig(), jax.local_devices()[:1])
  for name in reversed(STAGES):
    folder = Path(workdir) / name / "checkpoints"
    checkpoints = Checkpoints(folder) if folder.is_dir() else None
    if checkpoints is None or checkpoints.latest() is None:
      continue
    step, stage = checkpoints.latest(), getattr(config, name)
    model_config = architecture(config.model, stage.lora)
    graphdef, shapes = parameters.flatten(abstract(model_config))
    rates = parameters.match(stage.parameters, list(shapes), f"{name}.parameters")
    places = sharding.parameter_shardings(shapes, mesh)
    like = {
      path: jax.ShapeDtypeStruct(shape.shape, jnp.float32, sharding=places[path])
      for path, shape in shapes.items()
      if rates[path]
    }
    check_fingerprints(checkpoints.meta(step), config.model, str(folder))
    flat = load_parameters(model_config, config.model, rates, 0, mesh, checkpoints.restore_trainable(step, like))
    stage = dataclasses.replace(stage, data=dataclasses.replace(stage.data, template=config.finetune.data.template))
    return Restored(
      parameters.unflatten(graphdef, flat), make_processor(model_config, stage, config.model.llm), config, name, step
    )
  raise ConfigError(f"{workdir}: no checkpoint yet; train first, or wait for the first one")


def fingerprints(recipe: ModelRecipe) -> dict[str, str]:
  """Of the frozen halves: {"vision": ..., "llm": ...}."""
  return {"vision": fingerprint(recipe.vision), "llm": fingerprint(recipe.llm)}


def check_fingerprints(meta: dict[str, Any], recipe: ModelRecipe, where: str) -> None:
  """Raises ConfigError where a checkpoint was trained on other frozen weights than the folders now hold."""
  for name, value in fingerprints(recipe).items():
    if meta["fingerprints"][name] != value:
      raise ConfigError(
        f"{where} was trained on other weights than {getattr(recipe, name)} holds now "
        f"({meta['fingerprints'][name]}, now {value}); put the weights back or use another --workdir"
      )
