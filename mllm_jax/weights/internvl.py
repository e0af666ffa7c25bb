"""Whole InternVL 2 models with a Qwen2 or Llama under them, in two layouts: InternVL's own code's (`internvl_chat`, as
InternVL2-1B is released) and transformers' (`internvl`, "-hf"); and their projector, the MLP behind the pixel shuffle.
"""

import re
from collections.abc import Mapping
from typing import Any

from mllm_jax.config import ProjectorConfig
from mllm_jax.weights import mlp
from mllm_jax.weights.known import WeightsError
from mllm_jax.weights.tables import Row, Table, linear, norm

# The three layers, and what stands before them on export.
NAMES = {
  "official": (("mlp1.0", "mlp1.1", "mlp1.3"), ""),
  "hf": (("multi_modal_projector.layer_norm", "multi_modal_projector.linear_1", "multi_modal_projector.linear_2"), ""),
}
TEMPLATES = {"Hermes-2": "internvl2"}
DEFAULTS = {"internvl_chat": {"ps_version": "v1"}, "internvl": {}}
# Settings that would change the result, and the values that are computed.
COMPUTED = {
  "internvl_chat": {"downsample_ratio": (0.5,), "ps_version": ("v2",), "pad2square": (False,)},
  "internvl": {
    "downsample_ratio": (0.5,),
    "projector_hidden_act": ("gelu",),
    "vision_feature_select_strategy": ("default",),
  },
}
PROJECTOR = ProjectorConfig(kind="pixel_shuffle")
TILES = 12  # that its own code takes at most, where config.json does not say


def table(naming: str = "official") -> Table:
  """The names of the projector `pixel_shuffle`. Either naming is read; `naming`, "official" or "hf", is exported."""
  layers, prefix = NAMES[naming]
  renames = [mlp.STRIP]
  for others, _ in NAMES.values():
    if others != layers:
      renames += [(rf"^{re.escape(other)}\.", f"{layer}.") for other, layer in zip(others, layers)]
  first, second, third = layers
  rows: tuple[Row, ...] = (
    *norm(first, "projector/norm"),
    *linear(second, "projector/in_proj"),
    *linear(third, "projector/out_proj"),
  )
  return Table(rows, mlp.IGNORED, tuple(renames), prefix=prefix)


def parts_of(content: Mapping[str, Any], where: str) -> tuple[dict[str, Any], dict[str, Any], int]:
  """Of a whole model's config.json: the tower's part, the language model's, and which layer of the tower is taken.

  Raises WeightsError where a part or the layer is missing, or the crops are of another size than the tower's.
  """
  vision = content.get("vision_config")
  text = content.get("llm_config" if content["model_type"] == "internvl_chat" else "text_config")
  layer = content.get("select_layer", content.get("vision_feature_layer", -1))
  if not isinstance(vision, dict) or not isinstance(text, dict) or not isinstance(layer, int):
    raise WeightsError(
      f"{where}: a whole InternVL has a vision_config, an llm_config or text_config, and one selected layer (here "
      f"{layer!r}); download it again"
    )
  size = content.get("force_image_size") or vision.get("image_size")
  if size != vision.get("image_size"):
    raise WeightsError(f"{where}: crops of {size} pixels for a tower of {vision.get('image_size')} are not read")
  return vision, text, layer


def images_of(content: Mapping[str, Any]) -> dict[str, Any]:
  """How a released model's config.json says that pictures become tiles, as in a folder's manifest; {} where it does not
  say."""
  most = content.get("max_dynamic_patch")
  return {"image_aspect": "tiles", "max_slices": most} if isinstance(most, int) and most > 0 else {}
