"""CLIP's vision tower as Hugging Face stores it: `CLIPVisionModel`, the vision half of a `CLIPModel`, or part of a
LLaVA checkpoint. The reading of configurations and names is shared with SigLIP, which differs in values only.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mllm_jax.config import CLIP_MEAN, CLIP_STD, VisionConfig
from mllm_jax.models.vision import ACTIVATIONS
from mllm_jax.weights import parts
from mllm_jax.weights.known import WeightsError, read_json
from mllm_jax.weights.tables import PATCHES, Row, Table, linear, norm

# transformers leaves out of config.json what equals the defaults of its CLIPVisionConfig.
DEFAULTS = {
  "image_size": 224,
  "patch_size": 32,
  "hidden_size": 768,
  "num_hidden_layers": 12,
  "num_attention_heads": 12,
  "intermediate_size": 3072,
  "hidden_act": "quick_gelu",
  "layer_norm_eps": 1e-5,
  "num_channels": 3,
}
WHOLE, TOWER = "clip", "clip_vision_model"  # model_type of both halves together, and of the vision tower alone
EXAMPLE = "openai/clip-vit-large-patch14-336"
IMAGE_SIZE = "the checkpoint was made for another image or patch size"
TEXT_HALF = (
  r"(text_model\..*|text_projection\.weight|visual_projection\.weight|logit_scale)",
  "CLIP's text half and what joins it",
)
# `vision_tower.` stands twice where LLaVA's own wrapper of the tower is saved. Only behind it is `model.` a prefix: a
# language model's names begin so too.
PREFIXES = (
  rf"^({parts.OUTER}(vision_tower\.)+)?(vision_model\.)?(?=(embeddings|encoder|pre_layrnorm|post_layernorm|head)\.)"
)


def read_config(folder: str | Path) -> VisionConfig:
  """The architecture in a folder's config.json, with the colours' mean and deviation of preprocessor_config.json or
  processor_config.json where there is one (else CLIP's own). The selected layer is the configuration's default.

  Raises WeightsError where config.json is missing or of another model.
  """
  content, where = read_tower(folder, WHOLE, TOWER, EXAMPLE)
  return with_colours(parse(content, where), Path(folder))


def parse(content: Mapping[str, Any], where: str) -> VisionConfig:
  """The architecture in a `vision_config` of type clip_vision_model; `where` names its file and key in errors.

  Raises WeightsError where it is of another model, or asks for what the tower does not compute.
  """
  return vision_config(content, where, TOWER, DEFAULTS)


def table(config: VisionConfig, prefix: str = "vision_model.") -> Table:
  """The names of the layers that `config` uses, exported behind `prefix`. The layers after them are ignored, and so are
  the text half and the other parts of a LLaVA checkpoint."""
  return tower_table(config, prefix, (TEXT_HALF,))


def read_tower(folder: str | Path, whole: str, tower: str, example: str) -> tuple[dict[str, Any], str]:
  """The vision tower's part of a folder's config.json, and the name of its place for errors.

  `whole` and `tower` are the model types of a model with two halves and of the tower alone; `example` is a repository
  that has one. Raises WeightsError where the file is missing or of another model.
  """
  path = Path(folder) / "config.json"
  content = read_json(path, f"the configuration of a vision tower of type {whole}")
  kind = content.get("model_type")
  if kind not in (whole, tower):
    raise WeightsError(
      f"{path}: model_type is {kind!r}; as a vision tower {whole} or {tower} is read, such as {example}"
    )
  if kind == tower:
    return content, str(path)
  if not isinstance(content.get("vision_config"), dict):
    raise WeightsError(f"{path} is of a whole model of type {whole} and has no vision_config; download it again")
  return content["vision_config"], f"{path}, vision_config"


def vision_config(content: Mapping[str, Any], where: str, kind: str, defaults: Mapping[str, Any]) -> VisionConfig:
  """What Hugging Face's names say of a tower of type `kind`, a CLIP as far as they do not say."""
  if content.get("model_type", kind) != kind:
    raise WeightsError(f"{where}: model_type is {content['model_type']!r}, and {kind} is read here")
  vision = {**defaults, **{name: value for name, value in content.items() if value is not None}}
  if vision["hidden_act"] not in list(ACTIVATIONS) or vision["num_channels"] != 3:
    raise WeightsError(
      f"{where}: hidden_act is {vision['hidden_act']!r} and num_channels {vision['num_channels']}; towers with "
      f"{' or '.join(ACTIVATIONS)} and 3 channels are read"
    )
  not_whole = {name: vision[name] for name in ("image_size", "patch_size") if not isinstance(vision[name], int)}
  if not_whole:
    raise WeightsError(f"{where}: {not_whole}; towers for square images and patches are read, one number each")
  config = VisionConfig(
    image_size=vision["image_size"],
    patch_size=vision["patch_size"],
    width=vision["hidden_size"],
    layers=vision["num_hidden_layers"],
    heads=vision["num_attention_heads"],
    mlp_width=vision["intermediate_size"],
    activation=vision["hidden_act"],
    norm_eps=vision["layer_norm_eps"],
    mean=CLIP_MEAN,
    std=CLIP_STD,
  )
  return parts.checked(config, where)


def with_colours(config: VisionConfig, folder: Path) -> VisionConfig:
  """`config` with the mean and standard deviation of the colours, RGB in 0..1, that the folder's
  preprocessor_config.json or processor_config.json names; what they do not name stays."""
  content: dict[str, Any] = {}
  if (folder / "preprocessor_config.json").is_file():
    content = read_json(folder / "preprocessor_config.json", "how images are prepared")
  elif (folder / "processor_config.json").is_file():  # where transformers 5 puts it
    content = read_json(folder / "processor_config.json", "how images are prepared").get("image_processor", {})
  colours = lambda name, default: tuple(content.get(name) or default)
  return dataclasses.replace(config, mean=colours("image_mean", config.mean), std=colours("image_std", config.std))


def tower_table(config: VisionConfig, prefix: str, ignored: tuple[tuple[str, str], ...]) -> Table:
  """The names of a tower of CLIP's family; `ignored` is what its own family has beside them."""
  layer = "encoder.layers.{layer}."
  rows = [
    Row("embeddings.patch_embedding.weight", "vision/patch_embedding/kernel", PATCHES, IMAGE_SIZE),
    Row("embeddings.position_embedding.weight", "vision/position_embedding", hint=IMAGE_SIZE),
    *norm(layer + "layer_norm1", "vision/layers/norm1"),
    *norm(layer + "layer_norm2", "vision/layers/norm2"),
  ]
  if config.class_token:
    rows.append(Row("embeddings.class_embedding", "vision/class_embedding"))
  if config.patch_bias:
    rows.append(Row("embeddings.patch_embedding.bias", "vision/patch_embedding/bias"))
  if config.pre_norm:
    rows += norm("pre_layrnorm", "vision/pre_norm")  # spelt so in every checkpoint
  for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
    rows += linear(f"{layer}self_attn.{name}", f"vision/layers/{name}")
  for name in ("fc1", "fc2"):
    rows += linear(f"{layer}mlp.{name}", f"vision/layers/{name}")
  ignored += (
    (r"post_layernorm\..*", "the patch features are taken before it"),
    (r"embeddings\.position_ids", "a buffer: 0, 1, 2, ..."),
    parts.LANGUAGE,
    parts.PROJECTOR,
  )
  unused = "|".join(str(number) for number in range(config.layers_used, config.layers))
  if unused:
    ignored += ((rf"encoder\.layers\.({unused})\..*", "after the layer whose output is taken"),)
  return Table(tuple(rows), ignored, ((PREFIXES, ""),), parts.HINTS, prefix)
