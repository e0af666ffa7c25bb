"""CLIP's vision tower as Hugging Face stores it: `CLIPVisionModel`, or the vision half of a `CLIPModel`."""

from pathlib import Path
from typing import Any

from mllm_jax.config import CLIP_MEAN, CLIP_STD, VisionConfig
from mllm_jax.models.vision import ACTIVATIONS
from mllm_jax.weights.known import WeightsError, read_json
from mllm_jax.weights.mapping import PATCHES, Row, Table, linear, norm

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
IMAGE_SIZE = "the checkpoint was made for another image or patch size"


def read_config(folder: str | Path) -> VisionConfig:
  """The architecture in a folder's config.json, with the colours' mean and deviation of preprocessor_config.json or
  processor_config.json where there is one (else CLIP's own). The selected layer is the configuration's default.

  Raises WeightsError where config.json is missing or of another model.
  """
  path = Path(folder) / "config.json"
  content = read_json(path, "the configuration of a CLIP vision tower")
  kind = content.get("model_type")
  if kind not in ("clip", "clip_vision_model"):
    raise WeightsError(
      f"{path}: model_type is {kind!r}; as a vision tower clip or clip_vision_model is read, such as "
      "openai/clip-vit-large-patch14-336"
    )
  if kind == "clip" and not isinstance(content.get("vision_config"), dict):
    raise WeightsError(f"{path} is of a whole CLIP model and has no vision_config; download it again")
  vision = DEFAULTS | (content["vision_config"] if kind == "clip" else content)
  if vision["hidden_act"] not in ACTIVATIONS or vision["num_channels"] != 3:
    raise WeightsError(
      f"{path}: hidden_act is {vision['hidden_act']!r} and num_channels {vision['num_channels']}; towers with "
      f"{' or '.join(ACTIVATIONS)} and 3 channels are read"
    )
  mean, std = read_colours(Path(folder))
  return VisionConfig(
    image_size=vision["image_size"],
    patch_size=vision["patch_size"],
    width=vision["hidden_size"],
    layers=vision["num_hidden_layers"],
    heads=vision["num_attention_heads"],
    mlp_width=vision["intermediate_size"],
    activation=vision["hidden_act"],
    norm_eps=vision["layer_norm_eps"],
    mean=mean,
    std=std,
  )


def read_colours(folder: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
  """Mean and standard deviation of the colours, RGB in 0..1."""
  content: dict[str, Any] = {}
  if (folder / "preprocessor_config.json").is_file():
    content = read_json(folder / "preprocessor_config.json", "how images are prepared")
  elif (folder / "processor_config.json").is_file():  # where transformers 5 puts it
    content = read_json(folder / "processor_config.json", "how images are prepared").get("image_processor", {})
  return tuple(content.get("image_mean", CLIP_MEAN)), tuple(content.get("image_std", CLIP_STD))


def table(config: VisionConfig) -> Table:
  """The names of the layers that `config` uses. The layers after them are ignored, and so is the text tower."""
  layer = "encoder.layers.{layer}."
  rows = (
    Row("embeddings.class_embedding", "vision/class_embedding"),
    Row("embeddings.patch_embedding.weight", "vision/patch_embedding/kernel", PATCHES, IMAGE_SIZE),
    Row("embeddings.position_embedding.weight", "vision/position_embedding", hint=IMAGE_SIZE),
    *norm("pre_layrnorm", "vision/pre_norm"),  # spelt so in every checkpoint
    *norm(layer + "layer_norm1", "vision/layers/norm1"),
    *norm(layer + "layer_norm2", "vision/layers/norm2"),
    *(
      row
      for name in ("q_proj", "k_proj", "v_proj", "out_proj")
      for row in linear(f"{layer}self_attn.{name}", f"vision/layers/{name}")
    ),
    *(row for name in ("fc1", "fc2") for row in linear(f"{layer}mlp.{name}", f"vision/layers/{name}")),
  )
  unused = "|".join(str(number) for number in range(config.layers_used, config.layers))
  ignored = (
    (r"post_layernorm\..*", "the patch features are taken before it"),
    (r"embeddings\.position_ids", "a buffer: 0, 1, 2, ..."),
    (
      r"(text_model\..*|text_projection\.weight|visual_projection\.weight|logit_scale)",
      "CLIP's text half and what joins it",
    ),
  )
  if unused:
    ignored += ((rf"encoder\.layers\.({unused})\..*", "after the layer whose output is taken"),)
  return Table(rows, ignored, renames=((r"^vision_model\.", ""),), prefix="vision_model.")
