"""From a recipe, a run's folder or anybody's checkpoint to a model: architectures, and parameters on the mesh.

The trainer and everything that uses a trained model build it here, so that they cannot disagree.
"""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from mllm_jax import parameters, places, sharding
from mllm_jax.config import (
  SHUFFLED,
  Config,
  ConfigError,
  DataConfig,
  LoraConfig,
  MeshConfig,
  ModelConfig,
  ModelRecipe,
  VisionConfig,
  from_dict,
)
from mllm_jax.data.chat import VOCABULARY_FILES
from mllm_jax.data.processor import Processor
from mllm_jax.models.mllm import Mllm, abstract
from mllm_jax.processors import make_processor
from mllm_jax.weights import assemble, folder, vdim_file
from mllm_jax.weights import convnext as weights_convnext
from mllm_jax.weights.fingerprint import fingerprint
from mllm_jax.weights.io import open_weights
from mllm_jax.weights.known import WeightsError, lookup
from mllm_jax.weights.mapping import place
from mllm_jax.weights.quantize import KERNELS, SCALES, Int8, Rounded
from mllm_jax.weights.recognise import Found, Part, recognise
from mllm_jax.weights.tensors import Cast, Chosen, InMemory, Joined

STAGES = ("pretrain", "finetune")
RUN_CONFIG = "config.json"  # in the folder of a training run
FINISHED_MODEL = "model"  # where a run leaves its finished model
DEFAULT_LENGTH = DataConfig().max_length
INTERNVL_TILES, INTERNVL_LENGTH = 12, 8192  # of an image at most, and places of a conversation, as InternVL 2 is asked


# ---- for the trainer -------------------------------------------------------------------------------------------------


def architecture(recipe: ModelRecipe, lora: LoraConfig, packed: bool = True) -> ModelConfig:
  """The full configuration of a model: each tower's from its checkpoint, or, where that is not there yet but has the
  name of a published one, that one's. Raises WeightsError where neither is known."""

  return ModelConfig(
    vision=part_config(recipe.vision, "vision"),
    decoder=part_config(recipe.llm, "decoder"),
    projector=recipe.projector,
    lora=lora,
    dtype=recipe.dtype,
    remat=recipe.remat,
    attention=recipe.attention,
    packed=packed,
    int8_decoder=recipe.int8_decoder,
  )


def part_config(path: str, name: str):
  """The architecture of one tower, "vision" or "decoder", as `architecture` finds it."""
  known = lookup(path)
  if known is not None and not places.exists(path):
    return known.config
  found, part = part_of(path, name)
  return assemble.vision_config(found, part, found) if name == "vision" else part.config


def part_of(path: str, name: str) -> tuple[Found, Part]:
  """The part `name` of the checkpoint at a path. Raises WeightsError where it has none."""
  found = recognise(path)
  if name not in found.parts:
    raise WeightsError(f"{path} is a {found.family} and holds no {name}; it has {', '.join(found.parts)}")
  if name == "decoder" and "lora" in found.parts:
    raise WeightsError(
      f"{path} has an adapter beside its language model; fold it in first: "
      f"python -m mllm_jax.convert import --model={path} --merge --out=FOLDER"
    )
  return found, found.parts[name]


def tokenizer_folder(llm: str) -> str:
  """The local folder with the tokenizer of a language model. Raises WeightsError where it has none."""
  found, _ = part_of(llm, "decoder")
  if not found.tokenizer:
    raise WeightsError(
      f"{llm} holds no tokenizer; looked for {', '.join(VOCABULARY_FILES)}; copy the language model's there"
    )
  return found.tokenizer


def load_parameters(
  config: ModelConfig,
  recipe: ModelRecipe,
  learning_rates: dict[str, float],
  seed: int,
  mesh: Mesh,
  given: dict[str, jax.Array] | None = None,
) -> dict[str, jax.Array]:
  """Every parameter by path, on the mesh: the towers from their checkpoints, the projector and the adapters from
  `given`, from `recipe.projector_weights`, or freshly initialised. Types are those of `stored_dtypes`."""
  shapes = parameters.flatten(abstract(config))[1]
  dtypes = stored_dtypes(recipe, shapes, learning_rates)
  targets = placed({path: (shape.shape, dtypes[path]) for path, shape in shapes.items()}, mesh)
  flat = dict(given or {})
  convnext = {path: x for path, x in targets.items() if path.startswith(weights_convnext.PATH) and path not in flat}
  if recipe.convnext_weights and convnext:
    shapes = {path: x.shape for path, x in convnext.items()}
    flat |= place(weights_convnext.open_convnext(recipe.convnext_weights, shapes), convnext)
  parts = {"vision": config.vision, "decoder": config.decoder, "projector": config.projector}
  for name, path in (("vision", recipe.vision), ("decoder", recipe.llm), ("projector", recipe.projector_weights)):
    wanted = {key: target for key, target in targets.items() if key not in flat and assemble.belongs(key) == name}
    if path and wanted:
      tensors = assemble.part_tensors(name, part_of(path, name)[1], parts)
      flat |= place(Int8(tensors) if name == "decoder" and config.int8_decoder else tensors, wanted)
  return flat | initialise(config, {path: target for path, target in targets.items() if path not in flat}, seed)


def stored_dtypes(recipe: ModelRecipe, shapes: dict[str, Any], learning_rates: dict[str, float]) -> dict[str, Any]:
  """The type of each parameter: float32 where it is trained, else `recipe.frozen_dtype`; of an int8 decoder its own.

  Raises ConfigError where a decoder in int8 would be trained.
  """
  int8 = [path for path in shapes if recipe.int8_decoder and re.fullmatch(f"{KERNELS}|{SCALES}", path)]
  trained = [path for path in int8 if learning_rates[path]]
  if trained:
    raise ConfigError(
      f"model.int8_decoder is for a frozen decoder, and {trained[0]} is trained; leave it out, or train adapters (lora)"
    )
  dtype = lambda path: jnp.float32 if learning_rates[path] else jnp.dtype(recipe.frozen_dtype)
  return {path: shapes[path].dtype if path in int8 else dtype(path) for path in shapes}


def load_vision(recipe: ModelRecipe, config: VisionConfig, mesh: Mesh) -> dict[str, jax.Array]:
  """The parameters of the vision tower alone, frozen, by path."""
  shapes = assemble.part_shapes("vision", {"vision": config})
  targets = placed({path: (shape, jnp.dtype(recipe.frozen_dtype)) for path, shape in shapes.items()}, mesh)
  return place(assemble.part_tensors("vision", part_of(recipe.vision, "vision")[1], {"vision": config}), targets)


def placed(arrays: dict[str, tuple], mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
  """Targets by path, laid out by the sharding rules, from (shape, type) by path."""
  bare = {path: jax.ShapeDtypeStruct(shape, dtype) for path, (shape, dtype) in arrays.items()}
  shardings = sharding.parameter_shardings(bare, mesh)
  return {path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings[path]) for path, x in bare.items()}


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


def fingerprints(recipe: ModelRecipe) -> dict[str, str]:
  """Of the frozen halves: {"vision": ..., "llm": ...}, and of a ConvNeXt's weights."""
  found = {"vision": fingerprint_of(recipe.vision, "vision"), "llm": fingerprint_of(recipe.llm, "decoder")}
  if recipe.convnext_weights:
    found["convnext_weights"] = fingerprint(open_weights(recipe.convnext_weights))
  return found


def fingerprint_of(path: str, name: str) -> str:
  """Of the part `name` of the checkpoint at a path."""
  return fingerprint(part_of(path, name)[1].weights)


def check_fingerprints(meta: dict[str, Any], recipe: ModelRecipe, where: str) -> None:
  """Raises ConfigError where a checkpoint was trained on other frozen weights than the folders now hold."""
  for name, value in fingerprints(recipe).items():
    if meta["fingerprints"][name] != value:
      raise ConfigError(
        f"{where} was trained on other weights than {getattr(recipe, name)} holds now "
        f"({meta['fingerprints'][name]}, now {value}); put the weights back or use another --workdir"
      )


# ---- a trained model -------------------------------------------------------------------------------------------------


def is_run(path: str) -> bool:
  """Whether a path is the folder of a training run."""
  file = Path(path) / RUN_CONFIG
  if places.is_remote(path) or not file.is_file():
    return False
  try:
    content = json.loads(file.read_text(encoding="utf-8"))
  except ValueError:
    return False
  return isinstance(content, dict) and set(STAGES) <= set(content)


def read_config(workdir: str) -> Config:
  """The configuration of the run in a folder. Raises ConfigError where there is none."""
  path = Path(workdir) / RUN_CONFIG
  if not path.is_file():
    raise ConfigError(f"{workdir}: no {RUN_CONFIG}; name the --workdir of a training run")
  try:
    return from_dict(Config, json.loads(path.read_text(encoding="utf-8")))
  except json.JSONDecodeError as error:
    raise ConfigError(f"{path} is not JSON ({error}); it was written by the trainer and must not be edited") from error


def finished(workdir: str) -> bool:
  """Whether a run's folder holds the whole model of its last checkpoint."""
  from mllm_jax.training.checkpoint import Checkpoints

  path = Path(workdir) / FINISHED_MODEL
  if not (path / folder.MANIFEST).is_file():
    return False
  run = folder.read(path).run
  for name in reversed(STAGES):
    checkpoints = Path(workdir) / name / "checkpoints"
    step = Checkpoints(checkpoints, alone=True).latest() if checkpoints.is_dir() else None
    if step is not None:
      return (run.get("stage"), run.get("step")) == (name, step)
  return True  # the checkpoints were removed to save space


def open_run(workdir: str) -> tuple[assemble.StoredModel, Config]:
  """The model of the last stage that has a checkpoint in a run's folder: the frozen halves where they were, and what
  was trained, of which an array at a time is read from the checkpoint. Of several processes, process 0 can have it.

  Raises ConfigError where there is no run or no checkpoint, WeightsError where the towers are not where they were.
  """
  from mllm_jax.training.checkpoint import Checkpoints, Trained  # imports orbax, which takes a second

  config = read_config(workdir)
  for name in reversed(STAGES):
    checkpoints_folder = Path(workdir) / name / "checkpoints"
    checkpoints = Checkpoints(checkpoints_folder, alone=True) if checkpoints_folder.is_dir() else None
    if checkpoints is None or checkpoints.latest() is None:
      continue
    step, stage = checkpoints.latest(), getattr(config, name)
    check_fingerprints(checkpoints.meta(step), config.model, str(checkpoints_folder))
    model = dataclasses.replace(architecture(config.model, stage.lora), int8_decoder=False)
    shapes = parameters.flatten(abstract(model))[1]
    rates = parameters.match(stage.parameters, list(shapes), f"{name}.parameters")
    trained = Trained(checkpoints, step)
    wanted = {path: x.shape for path, x in shapes.items() if rates[path]}
    found = {path: trained.shape(path) for path in trained.names()}
    if found != wanted:
      wrong = sorted(path for path in found | wanted if found.get(path) != wanted.get(path))
      raise ConfigError(f"{checkpoints_folder}: in step {step} {', '.join(wrong[:6])} are of another model")
    checkpoints.close()
    parts = {"vision": model.vision, "decoder": model.decoder, "projector": model.projector}
    tensors, sources = [trained], {}
    frozen_vdim = {path: x.shape for path, x in shapes.items() if path.startswith(vdim_file.PATH) and not rates[path]}
    if not vdim_file.in_run(workdir).is_file():
      frozen_vdim = {}  # it came with the projector
    if frozen_vdim:
      vdim = InMemory(vdim_file.read(vdim_file.in_run(workdir), frozen_vdim))
      tensors.append(Cast(vdim, jnp.dtype(config.model.frozen_dtype)))
    convnext = {
      path: x.shape for path, x in shapes.items() if path.startswith(weights_convnext.PATH) and not rates[path]
    }
    if convnext and config.model.convnext_weights:
      stored = weights_convnext.open_convnext(config.model.convnext_weights, convnext)
      tensors.append(Cast(stored, jnp.dtype(config.model.frozen_dtype)))
    for part, path in (
      ("vision", config.model.vision),
      ("decoder", config.model.llm),
      ("projector", config.model.projector_weights),
    ):
      held = wanted.keys() | frozen_vdim.keys() | convnext.keys()
      paths = [key for key in shapes if key not in held and assemble.belongs(key) == part]
      if paths:
        found, stored = part_of(path, part)
        frozen = assemble.part_tensors(part, stored, parts)
        if part == "decoder" and config.model.int8_decoder:
          frozen = Rounded(frozen)  # what it was trained beside
        tensors.append(Cast(Chosen(frozen, paths), jnp.dtype(config.model.frozen_dtype)))
        sources[part] = {"path": path, "family": found.family, "fingerprint": fingerprint(stored.weights)}
    if stage.lora.rank:
      parts["lora"] = stage.lora
    made_here = {"path": str(workdir), "family": f"trained here, {config.name}, {name}, step {step}", "fingerprint": ""}
    sources |= {part: made_here for part in parts if part not in sources}
    run = {"name": config.name, "stage": name, "step": step}
    manifest = folder.Manifest(
      parts, config.finetune.data.template, sources, run, images=folder.images_of(config.finetune.data)
    )
    ordered = Chosen(Joined(*tensors), list(shapes))
    return assemble.StoredModel(manifest, ordered, str(Path(workdir) / folder.TOKENIZER)), config
  raise ConfigError(f"{workdir}: no checkpoint yet; train first, or wait for the first one")


def open_any(path: str, **others: str) -> assemble.StoredModel:
  """The model at a path: a folder that this project wrote, a training run's, or a checkpoint of any family that
  `weights.recognise` knows. `others` are those of `assemble.open_model`; they replace parts."""
  if is_run(path):
    if not finished(path):
      given = ", ".join(name for name, value in others.items() if value)
      if given:
        raise WeightsError(f"{path} is a training run, whose parts are settled; leave out {given}")
      return open_run(path)[0]
    path = str(Path(path) / FINISHED_MODEL)
  return assemble.open_model(path, **others)


def load(
  path: str,
  mesh: Mesh | None = None,
  dtype: str | None = None,
  *,
  vision: str = "",
  llm: str = "",
  projector: str = "",
  adapter: str = "",
  template: str = "",
  max_slices: int = 0,
) -> tuple[Mllm, Processor]:
  """A model and the processor that makes its batches.

  Args:
    path: a folder that `mllm_jax.convert` or the trainer made, a training run's folder, or a checkpoint of any family
      that `python -m mllm_jax.convert import --help` lists; local, or remote as gs://...
    mesh: where it shall lie, by the rules of `mllm_jax.sharding`; None: on the first device of this process.
    dtype: of parameters and computation, "bfloat16" or "float32"; None: as stored, float16 as bfloat16.
    vision, llm, projector, adapter: checkpoints of parts that `path` does not hold, or in place of its own.
    template: of conversations, where the checkpoint does not say.
    max_slices: of an image, where it is cut into slices or tiles; 0: as many as in training. LLaVA-UHD v2 was trained
      with 6 and evaluated with 9.

  Raises WeightsError, ConfigError or DataError that names what is missing or does not fit.
  """
  others = dict(vision=vision, llm=llm, projector=projector, adapter=adapter, template=template)
  stored = open_any(str(path), **others)
  if not stored.tokenizer:
    raise WeightsError(
      f"{path} holds no tokenizer; name the language model's folder (llm=...) or copy its tokenizer there"
    )
  model = put(stored, stored.config(dtype or ""), mesh, dtype)
  data = dataclasses.replace(data_of(stored), **({"max_slices": max_slices} if max_slices else {}))
  return model, make_processor(model.config, stored.tokenizer, data)


def data_of(stored: assemble.StoredModel) -> DataConfig:
  """How a stored model reads conversations and images: as in training, or, where nothing says that, as its projector
  tells. Raises WeightsError where it has none."""
  projector = stored.config().projector
  # A model that takes any shape, or has a token between rows of tiles, was trained so.
  aspect = "slices" if projector.any_aspect else "anyres" if projector.image_newline else "pad"
  data = DataConfig(template=stored.manifest.template, max_length=DEFAULT_LENGTH, image_aspect=aspect)
  if projector.kind in SHUFFLED:
    data = dataclasses.replace(data, image_aspect="tiles", max_slices=INTERNVL_TILES, max_length=INTERNVL_LENGTH)
  return dataclasses.replace(data, **stored.manifest.images)


def put(stored: assemble.StoredModel, config: ModelConfig, mesh: Mesh | None, dtype: str | None) -> Mllm:
  """A stored model on a mesh. `dtype` is of the parameters; None: as stored, float16 as bfloat16."""
  mesh = mesh or sharding.make_mesh(MeshConfig(), jax.local_devices()[:1])
  graphdef, shapes = parameters.flatten(abstract(config))
  kept = lambda path: jnp.bfloat16 if stored.tensors.dtype(path) == jnp.float16 else stored.tensors.dtype(path)
  arrays = {path: (x.shape, jnp.dtype(dtype) if dtype else kept(path)) for path, x in shapes.items()}
  return parameters.unflatten(graphdef, place(stored.tensors, placed(arrays, mesh)))
