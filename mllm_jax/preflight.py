"""What must be right before a run starts, checked in seconds: files, names, sizes. Nothing heavy is imported."""

import dataclasses
import glob
import math
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from mllm_jax import places
from mllm_jax.config import LORA_TARGETS, Config, ConfigError, DataConfig, LoraConfig, StageConfig, VdimStage
from mllm_jax.data.batching import check_batching
from mllm_jax.weights.known import lookup

COCO = "curl -LO http://images.cocodataset.org/zips/train2017.zip && unzip -q train2017.zip -d"
# Published data sets by the name of their annotation file: how to get the file, and how to get the pictures.
DATA_COMMANDS = {
  "blip_laion_cc_sbu_558k.json": (
    "hf download liuhaotian/LLaVA-Pretrain blip_laion_cc_sbu_558k.json --repo-type dataset --local-dir {folder}",
    "hf download liuhaotian/LLaVA-Pretrain images.zip --repo-type dataset --local-dir {folder} && "
    "unzip -q {folder}/images.zip -d {images}",
  ),
  "llava_v1_5_mix665k.json": (
    "hf download liuhaotian/LLaVA-Instruct-150K llava_v1_5_mix665k.json --repo-type dataset --local-dir {folder}",
    "put the pictures of COCO train2017, GQA, OCR-VQA, TextVQA and Visual Genome into {images}/coco/train2017,"
    " gqa/images,"
    " ocr_vqa/images, textvqa/train_images, vg/VG_100K and vg/VG_100K_2; for COCO: "
    f"{COCO} {{images}}/coco",
  ),
  "llava-uhdv2-sft.json": (
    "write a LLaVA JSON of the instruction data; LLaVA-1.5's is a start: hf download liuhaotian/LLaVA-Instruct-150K "
    "llava_v1_5_mix665k.json --repo-type dataset --local-dir {folder}",
    f"put the pictures that it names there; for COCO: {COCO} {{images}}/coco",
  ),
  "train2017": (f"mkdir -p {{folder}} && {COCO} {{folder}}", ""),
}

CONVNEXT = "timm/convnext_large_mlp.clip_laion2b_ft_soup_320"  # CLIP-ConvNeXt-L's image half
STAGES = ("vdim", "pretrain", "finetune")
VDIM_CHOICES = {
  "optimizer": ("nadam", "adam"),
  "normalisation": ("imagenet", "clip"),
  "supervision": ("all", "last"),
}
DTYPES = ("bfloat16", "float32")
BELOW_1 = math.nextafter(1.0, 0.0)


@dataclasses.dataclass(frozen=True)
class Missing:
  """A file or folder that the run needs: the field that names it, where it was looked for, and how to get it."""

  field: str
  path: str
  remedy: str


def stage_names(config: Config) -> list[str]:
  """The stages to run, in order. Raises ConfigError for an unknown one, or an order that makes no sense."""
  names = [name.strip() for name in config.stages.split(",") if name.strip()]
  if not names or names != [name for name in STAGES if name in names]:
    raise ConfigError(f"stages={config.stages!r} must be some of {','.join(STAGES)}, in this order")
  unknown = set(config.evaluation.stages.split(",")) - {"pretrain", "finetune"}
  if unknown:
    raise ConfigError(f"evaluation.stages={config.evaluation.stages!r} must be pretrain, finetune or both by a comma")
  return names


def in_workdir(config: Config, workdir: str) -> Config:
  """The same configuration with "{workdir}" in its paths replaced."""
  fill = lambda text: text.replace("{workdir}", str(workdir))

  def fill_paths(part):
    return dataclasses.replace(part, path=fill(part.path), image_folder=fill(part.image_folder))

  def fill_stage(stage):
    mix = tuple(tuple(fill(text) if isinstance(text, str) else text for text in row) for row in stage.data.mix)
    return dataclasses.replace(stage, data=dataclasses.replace(fill_paths(stage.data), mix=mix))

  return dataclasses.replace(
    config,
    model=dataclasses.replace(config.model, vdim_weights=fill(config.model.vdim_weights)),
    vdim=fill_stage(config.vdim),
    pretrain=fill_stage(config.pretrain),
    finetune=fill_stage(config.finetune),
    evaluation=fill_paths(config.evaluation),
  )


def missing_files(config: Config) -> list[Missing]:
  """Every file and folder that the run names and that is not there."""
  found, names = [], stage_names(config)
  towers = [
    ("model.vision", config.model.vision, "a folder with a CLIP or SigLIP vision tower, or with a model that has one"),
    (
      "model.llm",
      config.model.llm,
      "a folder with a Llama, Mistral or Qwen2 language model, or with a model that has one",
    ),
  ]
  for field, folder, kind in towers[:1] if names == ["vdim"] else towers:
    known = lookup(folder)
    if not folder or not places.is_dir(folder):
      found.append(Missing(field, folder, known.command(folder) if known else f"set {field} to {kind}"))
  if config.model.projector_weights and not places.exists(config.model.projector_weights):
    found.append(
      Missing("model.projector_weights", config.model.projector_weights, "name a released projector's file, or none")
    )
  if config.model.convnext_weights and not places.exists(config.model.convnext_weights):
    path = config.model.convnext_weights
    found.append(Missing("model.convnext_weights", path, f"hf download {CONVNEXT} --local-dir {path}"))
  if config.model.vdim_weights and "vdim" not in names and not places.exists(config.model.vdim_weights):
    remedy = "name what the stage vdim left in another run (WORKDIR/vdim/vdim.safetensors), a released VDIM, or none"
    found.append(Missing("model.vdim_weights", config.model.vdim_weights, remedy))
  if not config.demo:
    for name in names:
      found += _missing_data(f"{name}.data", getattr(config, name).data)
    if config.evaluation.path and not places.exists(config.evaluation.path):
      found.append(Missing("evaluation.path", config.evaluation.path, "name a LLaVA JSON file of questions, or none"))
  return found


def _missing_data(field: str, data: DataConfig) -> list[Missing]:
  found = []
  if data.path or not data.mix:
    found += _missing_source(field, data.path, data.image_folder)
  for number, row in enumerate(data.mix):
    if len(row) == 3:  # others are refused, with the reason, where the mix is opened
      found += _missing_source(f"{field}.mix[{number}]", row[0], row[1])
  return found


def _missing_source(field: str, path: str, image_folder: str) -> list[Missing]:
  if path.startswith("tfds:"):  # where those lie is tfds's affair
    return []
  commands = DATA_COMMANDS.get(
    os.path.basename(path), ("name a LLaVA JSON or JSONL file", "name the folder of its pictures")
  )
  folders = {"folder": os.path.dirname(path) or ".", "images": image_folder or "."}
  found = []
  pattern = places.is_remote(path) and "*" in path  # what fits it is looked for where it is opened
  if not pattern and not (places.exists(path) if path else False) and not glob.glob(path):
    found.append(Missing(f"{field}.path", path, commands[0].format(**folders)))
  if not places.is_dir(image_folder or "."):
    found.append(Missing(f"{field}.image_folder", image_folder, commands[1].format(**folders)))
  return found


def explain_missing(missing: list[Missing], config_file: str) -> str:
  """What to tell a user who has not got the files yet."""
  lines = [f"{config_file} needs {len(missing)} things that are not here:", ""]
  for item in missing:
    lines += [
      f"  {item.field} = {item.path or '(empty)'}",
      f"      looked in  {item.path if '://' in item.path else Path(item.path).absolute()}" if item.path else "",
      f"      to get it  {item.remedy}",
      "",
    ]
  lines = [line for line, before in zip(lines, ["-"] + lines) if line or before]
  lines += [
    "Or point the field elsewhere: --config.FIELD=PATH. The demo needs no download:",
    "",
    f"  python -m mllm_jax.train --config={config_file}:demo",
  ]
  return "\n".join(lines)


def check_run(config: Config) -> None:
  """Raises ConfigError where a number or a name that all stages share cannot work."""
  for field in ("dtype", "frozen_dtype"):
    if getattr(config.model, field) not in DTYPES:
      raise ConfigError(f"model.{field}={getattr(config.model, field)!r} is unknown; known: {', '.join(DTYPES)}")
  _check_ranges("evaluation.", config.evaluation, (("batch_size", 1, None), ("max_new_tokens", 1, None)))
  _check_ranges("mesh.", config.mesh, (("cpu_devices", 0, None),))
  widths = ("conv_width", "depth_multiplier", "query_grid", "head_width")
  _check_ranges("model.projector.", config.model.projector, tuple((field, 1, None) for field in widths))
  at_least_1 = ("log_every", "checkpoint_every", "keep_checkpoints", "max_nonfinite")
  ranges = (("seed", 0, 2**32 - 1), ("loader_threads", 0, None), ("loader_workers", 0, None))
  _check_ranges("config.", config, ranges + tuple((field, 1, None) for field in at_least_1))


def check_stage(name: str, stage: StageConfig | VdimStage, shards: int, processes: int) -> None:
  """Raises ConfigError where a stage's numbers cannot work on a mesh whose batch axes have `shards` parts."""
  unit = stage.accumulation * shards
  if stage.batch_size < 1 or stage.accumulation < 1 or stage.batch_size % unit or shards % processes:
    raise ConfigError(
      f"{name}.batch_size={stage.batch_size} does not divide into {name}.accumulation={stage.accumulation} "
      f"micro-batches over {shards} devices; use a multiple of {unit}"
    )
  if stage.data.on_bad_sample not in ("error", "skip", "replace") or not 0 <= stage.data.max_bad_share <= 1:
    raise ConfigError(
      f"{name}.data.on_bad_sample={stage.data.on_bad_sample!r} must be error, skip or replace, and "
      f"max_bad_share={stage.data.max_bad_share} between 0 and 1"
    )
  if isinstance(stage, VdimStage):
    _check_ranges(f"{name}.", stage, (("steps", 1, None), ("jitters", 1, None), ("projected", 0, None)))
    _check_ranges(f"{name}.", stage, (("crf_samples", 0, None), ("clip_norm", 0, None), ("clip_steps", 0, None)))
    for field, known in VDIM_CHOICES.items():
      if getattr(stage, field) not in known:
        raise ConfigError(f"{name}.{field}={getattr(stage, field)!r} is unknown; known: {', '.join(known)}")
    if not 0 < stage.learning_rate < math.inf:
      raise ConfigError(f"{name}.learning_rate={stage.learning_rate} must be above 0")
    return
  _check_ranges(
    f"{name}.",
    stage,
    (
      ("warmup_ratio", 0, 1),
      ("weight_decay", 0, None),
      ("clip_norm", 0, None),
      ("epochs", 0, None),
      ("steps", 0, None),
      ("beta1", 0, BELOW_1),
      ("beta2", 0, BELOW_1),
      ("eps", 1e-30, None),
    ),
  )
  if stage.data.max_length < 2 or stage.data.max_images < 1:
    raise ConfigError(f"{name}.data.max_length={stage.data.max_length} must be 2 or more, and max_images 1 or more")
  crops = 1 if stage.data.max_slices == 1 else 1 + stage.data.max_slices
  if stage.data.image_aspect in ("slices", "tiles") and stage.data.max_images < crops:
    raise ConfigError(
      f"{name}.data.max_images={stage.data.max_images} crops have no room for an image, which is up to {crops} with "
      f"max_slices={stage.data.max_slices}"
    )
  check_batching(stage.data, f"{name}.data")
  _check_lora(f"{name}.lora", stage.lora)
  _check_rates(f"{name}.parameters", stage.parameters)


def _check_lora(name: str, lora: LoraConfig) -> None:
  """Raises ConfigError for adapters that cannot be, or that no layer would get."""
  _check_ranges(f"{name}.", lora, (("rank", 0, None), ("alpha", 0, None), ("dropout", 0, BELOW_1)))
  unknown = [target for target in lora.targets if target not in LORA_TARGETS]
  if lora.rank and (unknown or not lora.targets):
    raise ConfigError(f"{name}.targets={lora.targets!r} must be some of {', '.join(LORA_TARGETS)}")


def _check_rates(name: str, rows: tuple) -> None:
  """Raises ConfigError where a stage's table is not of patterns and learning rates, or freezes everything."""
  for row in rows:
    try:
      pattern, rate = row
      re.compile(pattern)
      good = isinstance(rate, int | float) and 0 <= rate < math.inf
    except (TypeError, ValueError, re.error):
      good = False
    if not good:
      raise ConfigError(f"{name} must be ((PATTERN, LEARNING RATE of 0 or more), ...), and {row!r} is one of its rows")
  if not any(rate for _, rate in rows):
    raise ConfigError(f"{name} freezes everything: give some pattern a learning rate above 0")


def _check_ranges(name: str, part, ranges: tuple) -> None:
  """Raises ConfigError where a field of `part` is not within its (field, least, largest or None). name: as the field's
  begins."""
  for field, low, high in ranges:
    value = getattr(part, field)
    if not low <= value <= (sys.float_info.max if high is None else high):  # which no NaN is
      upto = f"at least {low} and below 1" if high == BELOW_1 else f"between {low} and {high}"
      raise ConfigError(f"{name}{field}={value} must be {f'{low} or more' if high is None else upto}")


def check_projector(config: Config, workdir: Path, paths: Iterable[str]) -> None:
  """Raises ConfigError where finetune freezes what pretrain trains of the projector, by the `paths` of the model.

  A checkpoint of finetune holds what that trains. Of the rest of the projector a continued run would begin with noise.
  """
  names = stage_names(config)
  if "finetune" not in names or not ("pretrain" in names or (workdir / "pretrain" / "checkpoints").is_dir()):
    return
  trains = lambda stage, path: any(rate and re.fullmatch(pattern, path) for pattern, rate in stage.parameters)
  for path in paths:
    if path.startswith("projector/") and trains(config.pretrain, path) and not trains(config.finetune, path):
      raise ConfigError(
        f"finetune.parameters freezes {path}, which pretrain trains, and no checkpoint of finetune would hold it. Give "
        "it a learning rate; or run pretrain alone, and finetune in another --workdir with "
        f"model.projector_weights={workdir / 'model'}"
      )
