"""InternViT as transformers stores it: `InternVLVisionModel`, alone or inside an `InternVLForConditionalGeneration`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mllm_jax.config import VisionConfig
from mllm_jax.weights import clip, internvit
from mllm_jax.weights.tables import LAST, PATCHES, Row, Table, linear, norm

# transformers leaves out of config.json what equals the defaults of its InternVLVisionConfig.
DEFAULTS = {
  "image_size": 448,
  "patch_size": 14,
  "hidden_size": 1024,
  "num_hidden_layers": 24,
  "num_attention_heads": 16,
  "intermediate_size": 4096,
  "hidden_act": "gelu",
  "layer_norm_eps": 1e-6,
  "num_channels": 3,
  "attention_bias": False,
  "use_qk_norm": False,
  "norm_type": "layer_norm",
  "use_absolute_position_embeddings": True,
  "use_mean_pooling": True,
}
# With mean pooling there is no norm after the last layer.
COMPUTED = {
  "attention_bias": True,
  "use_qk_norm": False,
  "norm_type": "layer_norm",
  "use_absolute_position_embeddings": True,
  "use_mean_pooling": True,
}
TOWER = "internvl_vision"
MASK = (r"embeddings\.mask_token", "for the tower's own training")


def read_config(folder: str | Path) -> VisionConfig:
  """As `internvit.read_config`."""
  content, where = clip.read_tower(folder, TOWER, TOWER, "OpenGVLab/InternVL3-1B-hf")
  return clip.with_colours(parse(content, where), Path(folder))


def parse(content: Mapping[str, Any], where: str) -> VisionConfig:
  """The architecture in a `vision_config` of type internvl_vision; `where` names its file and key in errors.

  Raises WeightsError where it is of another model, or asks for what the tower does not compute.
  """
  square = {}
  for name in ("image_size", "patch_size"):
    value = content.get(name)
    if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
      square[name] = value[0]
  return internvit.vision_config({**content, **square}, where, TOWER, DEFAULTS, COMPUTED)


def table(config: VisionConfig, prefix: str = "") -> Table:
  """The names of the layers that `config` uses, exported behind `prefix`. The layers after them are ignored, and so are
  the other parts of an InternVL checkpoint."""
  layer = "encoder.layer.{layer}."
  rows = [
    Row("embeddings.cls_token", "vision/class_embedding", LAST),
    Row("embeddings.patch_embeddings.projection.weight", "vision/patch_embedding/kernel", PATCHES, clip.IMAGE_SIZE),
    Row("embeddings.patch_embeddings.projection.bias", "vision/patch_embedding/bias"),
    Row("embeddings.position_embeddings", "vision/position_embedding", internvit.PLACES, clip.IMAGE_SIZE),
    *norm(layer + "layernorm_before", "vision/layers/norm1"),
    *norm(layer + "layernorm_after", "vision/layers/norm2"),
    *linear(layer + "attention.projection_layer", "vision/layers/out_proj"),
    *linear(layer + "mlp.fc1", "vision/layers/fc1"),
    *linear(layer + "mlp.fc2", "vision/layers/fc2"),
    Row(layer + "lambda_1", "vision/layers/attention_scale"),
    Row(layer + "lambda_2", "vision/layers/mlp_scale"),
  ]
  for name in ("q_proj", "k_proj", "v_proj"):
    rows += linear(f"{layer}attention.{name}", f"vision/layers/{name}")
  ignored = (MASK, *internvit.IGNORED, *internvit.unused("layer", config))
  return Table(tuple(rows), ignored, ((internvit.PREFIXES, ""),), prefix=prefix)
