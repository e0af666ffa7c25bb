"""What a stage goes on from: its own checkpoints, if they are of the same run, or the projector of the stage before."""

import json
import re
from pathlib import Path

from mllm_jax.config import Config, ConfigError, ModelConfig, StageConfig, VdimStage, to_dict

# jax and orbax are imported where they are used, so that a mistyped command is answered at once.

HOW = ("attention", "packed", "remat")  # a model is computed, which may change from stage to stage and within one


def pretrained_projector(config: Config, workdir: Path, identity: dict, shapes: dict, mesh) -> dict:
  """What pretrain trained of the projector in the same workdir, by path; {} where a released one is named instead.

  Raises ConfigError where there is neither: a projector that starts from noise would train, and be worth nothing.
  """
  import jax
  import jax.numpy as jnp

  from mllm_jax import sharding
  from mllm_jax.training.checkpoint import Checkpoints

  folder = workdir / "pretrain" / "checkpoints"
  checkpoints = Checkpoints(folder) if folder.is_dir() else None
  step = checkpoints.latest() if checkpoints is not None else None
  if step is None:
    if config.model.projector_weights:
      return {}
    raise ConfigError(
      f"finetune starts from a pre-trained projector, and {folder} holds none; run --config.stages=pretrain first, "
      "or name a released one in model.projector_weights"
    )
  meta = checkpoints.meta(step)
  if step < meta["steps"]:
    raise ConfigError(
      f"{folder}: pretrain has done {step} of {meta['steps']} steps; finish it first (--config.stages=pretrain)"
    )
  without_lora = lambda content: {
    "model": {key: value for key, value in content["model"].items() if key != "lora"},
    "fingerprints": content["fingerprints"],
  }
  check_identity(without_lora(meta), without_lora(identity), folder)
  is_trained = lambda path: any(rate and re.fullmatch(pattern, path) for pattern, rate in meta["recipe"]["parameters"])
  places = sharding.parameter_shardings(shapes, mesh)
  like = {
    path: jax.ShapeDtypeStruct(shape.shape, jnp.float32, sharding=places[path])
    for path, shape in shapes.items()
    if path.startswith("projector/") and is_trained(path)
  }
  return checkpoints.restore_trainable(step, like)


def model_identity(model: ModelConfig) -> dict:
  """What of a model's configuration decides its result, not HOW it is computed. int8_decoder, which older checkpoints
  do not know, stands there where it is used."""
  left_out = {*HOW} | ({"int8_decoder"} if not model.int8_decoder else set())
  return {key: value for key, value in to_dict(model).items() if key not in left_out}


def recipe_identity(stage) -> dict:
  """What of a stage's configuration decides its result. Where the data lie does not: they may be moved."""
  content = to_dict(stage)
  moved = ("path", "image_folder", "max_bad_share")
  content["data"] = {key: value for key, value in content["data"].items() if key not in moved}
  content["data"]["mix"] = [share for _, _, share in stage.data.mix]
  return json.loads(json.dumps(content))


def check_identity(saved: dict, now: dict, folder: Path) -> None:
  """Raises ConfigError where a checkpoint is of another run than this one would be, with all differences. A field that
  it does not know is younger than the checkpoint, which was made as by the field's default."""
  stage = VdimStage() if now.get("stage") == "vdim" else StageConfig()
  defaults = {"model": to_dict(ModelConfig()), "recipe": to_dict(stage)}

  def differences(a, b, default, path):
    if isinstance(a, dict) and isinstance(b, dict):
      default = default if isinstance(default, dict) else {}
      inside = lambda key: (a.get(key, default.get(key)), b.get(key, default.get(key)), default.get(key))
      return [line for key in sorted(set(a) | set(b)) for line in differences(*inside(key), f"{path}.{key}")]
    return [] if a == b else [f"{path.lstrip('.')}: {a} in the checkpoint, {b} now"]

  now, defaults = json.loads(json.dumps(now)), json.loads(json.dumps(defaults))
  # Older checkpoints have some of it.
  saved = saved | {"model": {key: value for key, value in saved["model"].items() if key not in HOW}}
  found = [line for key in now for line in differences(saved.get(key), now[key], defaults.get(key), key)]
  if found:
    raise ConfigError(
      f"{folder} holds checkpoints of another run:\n  "
      + "\n  ".join(found[:12])
      + "\nSet these back to continue it, or use another --workdir"
    )
