"""SigLIP's vision tower as Hugging Face stores it: `SiglipVisionModel`, the vision half of a `SiglipModel`, or part of
a LLaVA checkpoint.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mllm_jax.config import VisionConfig
from mllm_jax.weights import clip
from mllm_jax.weights.tables import Table

# transformers leaves out of config.json what equals the defaults of its SiglipVisionConfig.
DEFAULTS = {
  "image_size": 224,
  "patch_size": 16,
  "hidden_size": 768,
  "num_hidden_layers": 12,
  "num_attention_heads": 12,
  "intermediate_size": 3072,
  "hidden_act": "gelu_pytorch_tanh",
  "layer_norm_eps": 1e-6,
  "num_channels": 3,
}
WHOLE, TOWER = "siglip", "siglip_vision_model"
EXAMPLE = "google/siglip-large-patch16-384"
MEAN = STD = (0.5, 0.5, 0.5)  # SigLIP's preprocessing: colours from -1 to 1
IGNORED = (
  (r"head\..*", "the head that pools the patches into one vector for SigLIP's loss"),
  (r"(text_model\..*|logit_scale|logit_bias)", "SigLIP's text half and what joins it"),
)


def read_config(folder: str | Path) -> VisionConfig:
  """The architecture in a folder's config.json, with the colours' mean and deviation of preprocessor_config.json or
  processor_config.json where there is one (else 0.5). The selected layer is the configuration's default.

  Raises WeightsError where config.json is missing or of another model.
  """
  content, where = clip.read_tower(folder, WHOLE, TOWER, EXAMPLE)
  return clip.with_colours(parse(content, where), Path(folder))


def parse(content: Mapping[str, Any], where: str) -> VisionConfig:
  """The architecture in a `vision_config` of type siglip_vision_model; `where` names its file and key in errors.

  Raises WeightsError where it is of another model, or asks for what the tower does not compute.
  """
  config = clip.vision_config(content, where, TOWER, DEFAULTS)
  return dataclasses.replace(config, class_token=False, patch_bias=True, pre_norm=False, mean=MEAN, std=STD)


def table(config: VisionConfig, prefix: str = "vision_model.") -> Table:
  """The names of the layers that `config` uses, exported behind `prefix`. Ignored are the layers after them, the
  pooling head, the text half and the other parts of a LLaVA checkpoint."""
  return clip.tower_table(config, prefix, IGNORED)
