"""InternViT as its own code stores it (`intern_vit_6b`, which InternViT-300M-448px is too), alone or inside an InternVL
checkpoint. transformers has other names for it: `internvit_hf`.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mllm_jax.config import IMAGENET_MEAN, IMAGENET_STD, VisionConfig
from mllm_jax.weights import clip, parts
from mllm_jax.weights.known import WeightsError
from mllm_jax.weights.tables import LAST, PATCHES, Permute, Row, Table, linear, norm

# What InternVL's own code takes where config.json does not say: the tower of 6 billion parameters, which is not read.
DEFAULTS = {
  "image_size": 224,
  "patch_size": 14,
  "hidden_size": 3200,
  "num_hidden_layers": 48,
  "num_attention_heads": 25,
  "intermediate_size": 12800,
  "hidden_act": "gelu",
  "layer_norm_eps": 1e-6,
  "num_channels": 3,
  "qkv_bias": False,
  "qk_normalization": True,
  "norm_type": "rms_norm",
}
COMPUTED = {"qkv_bias": True, "qk_normalization": False, "norm_type": "layer_norm"}
TOWER = "intern_vit_6b"
EXAMPLE = "OpenGVLab/InternViT-300M-448px"
PLACES = Permute((1, 2), rank=3)  # (1, places, width) -> [places, width]
PREFIXES = rf"^({parts.OUTER}(vision_tower|vision_model)\.)?(?=(embeddings|encoder|layernorm)\.)"
IGNORED = (parts.LANGUAGE, parts.PROJECTOR)


def read_config(folder: str | Path) -> VisionConfig:
  """The architecture in a folder's config.json, with the colours' mean and deviation of preprocessor_config.json or
  processor_config.json where there is one (else ImageNet's). The selected layer is the last.

  Raises WeightsError where config.json is missing or of another model.
  """
  content, where = clip.read_tower(folder, TOWER, TOWER, EXAMPLE)
  return clip.with_colours(parse(content, where), Path(folder))


def parse(content: Mapping[str, Any], where: str) -> VisionConfig:
  """The architecture in a `vision_config` of type intern_vit_6b; `where` names its file and key in errors.

  Raises WeightsError where it is of another model, or asks for what the tower does not compute, as the tower of 6
  billion parameters does.
  """
  return vision_config(content, where, TOWER, DEFAULTS, COMPUTED)


def table(config: VisionConfig, prefix: str = "vision_model.") -> Table:
  """The names of the layers that `config` uses, exported behind `prefix`. The layers after them are ignored, and so are
  the other parts of an InternVL checkpoint."""
  layer = "encoder.layers.{layer}."
  rows = [
    Row("embeddings.class_embedding", "vision/class_embedding", LAST),
    Row("embeddings.patch_embedding.weight", "vision/patch_embedding/kernel", PATCHES, clip.IMAGE_SIZE),
    Row("embeddings.patch_embedding.bias", "vision/patch_embedding/bias"),
    Row("embeddings.position_embedding", "vision/position_embedding", PLACES, clip.IMAGE_SIZE),
    *norm(layer + "norm1", "vision/layers/norm1"),
    *norm(layer + "norm2", "vision/layers/norm2"),
    *linear(layer + "attn.proj", "vision/layers/out_proj"),
    *linear(layer + "mlp.fc1", "vision/layers/fc1"),
    *linear(layer + "mlp.fc2", "vision/layers/fc2"),
    Row(layer + "ls1", "vision/layers/attention_scale"),
    Row(layer + "ls2", "vision/layers/mlp_scale"),
  ]
  for number, name in enumerate(("q_proj", "k_proj", "v_proj")):
    together = linear(layer + "attn.qkv", f"vision/layers/{name}")
    rows += [dataclasses.replace(row, part=(number, 3)) for row in together]
  return Table(tuple(rows), IGNORED + unused("layers", config), ((PREFIXES, ""),), prefix=prefix)


def unused(name: str, config: VisionConfig) -> tuple[tuple[str, str], ...]:
  """What ignores the layers after the one whose output is taken; `name` is that of the list they are in."""
  numbers = "|".join(str(number) for number in range(config.layers_used, config.layers))
  return ((rf"encoder\.{name}\.({numbers})\..*", "after the layer whose output is taken"),) if numbers else ()


def vision_config(
  content: Mapping[str, Any], where: str, kind: str, defaults: Mapping[str, Any], computed: Mapping[str, Any]
) -> VisionConfig:
  """What the names that InternVL's code and transformers have in common say of a tower of type `kind`.

  Raises WeightsError as `clip.vision_config`, and for a setting with another value than the one that is `computed`.
  """
  merged = {**defaults, **content}
  wrong = {name: merged[name] for name, value in computed.items() if merged[name] != value}
  if wrong:
    raise WeightsError(
      f"{where} sets {', '.join(f'{name}={value!r}' for name, value in wrong.items())}, which the tower does not "
      f"compute; read are towers like {EXAMPLE}"
    )
  config = clip.vision_config(content, where, kind, defaults)
  own = dict(select_layer=-1, class_token=True, patch_bias=True, pre_norm=False, layer_scale=True)
  return dataclasses.replace(config, **own, mean=IMAGENET_MEAN, std=IMAGENET_STD)
