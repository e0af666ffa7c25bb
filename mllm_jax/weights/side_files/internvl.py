"""The layout of InternVL 2's released code, `internvl_chat`."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mllm_jax.config import ConfigError, ModelConfig
from mllm_jax.data import chat, dynamic_tiles
from mllm_jax.weights import internvit, internvl
from mllm_jax.weights.side_files.files import check_dtype, text_config, tower_sizes, write_json

LLM_CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}  # that its code has
CODE = "OpenGVLab/InternVL2-1B"
TRANSFORMERS_VERSION = "4.37.2"  # what that code is pinned to
PATCH_TOKEN = "<IMG_CONTEXT>"  # in whose places its code puts the visual tokens


def write_internvl(
  folder: str | Path,
  model: ModelConfig,
  tokenizer_folder: str | Path,
  template: str,
  images: Mapping[str, Any],
  dtype: str,
) -> None:
  """Writes every file but the weights of an InternVL 2, for its own code, which is not among them.

  The tower is described with the layers that the model uses, the last of which is the feature.

  Args:
    folder: exists, or is made.
    model: with projector kind "pixel_shuffle" over an InternViT.
    tokenizer_folder: the language model's folder; its tokenizer's files are copied as they are.
    template: the one the model was trained with, "internvl2", or "plain", which is asked with that.
    images: how an image became crops in training, as in a folder's manifest.
    dtype: of the weights: "float32", "float16" or "bfloat16".

  Raises ConfigError for what the code has no class for, or would ask otherwise than the model was trained.
  """
  check_dtype(dtype)
  tokenizer = chat.load_tokenizer(str(tokenizer_folder))
  refuse(model, tokenizer, template, images)
  folder, source = Path(folder), Path(tokenizer_folder)
  folder.mkdir(parents=True, exist_ok=True)
  write_json(folder / "config.json", config(model, images, dtype))
  ids = {"eos_token_id": sorted({tokenizer.eos_id, chat.end_id("internvl2", tokenizer)})}
  write_json(folder / "generation_config.json", ids | {"transformers_version": TRANSFORMERS_VERSION})
  size = {"height": model.vision.image_size, "width": model.vision.image_size}
  colours = {"image_mean": list(model.vision.mean), "image_std": list(model.vision.std)}
  write_json(
    folder / "preprocessor_config.json",
    {"image_processor_type": "CLIPImageProcessor", "crop_size": size, "size": model.vision.image_size, **colours},
  )
  for name in chat.TOKENIZER_FILES:
    if (source / name).is_file():
      shutil.copyfile(source / name, folder / name)
  (folder / "README.md").write_text(
    "# For the released code of InternVL 2\n\n"
    f"Weights, configuration and tokenizer are here, the code is not: copy the files `*.py` of `{CODE}` into this\n"
    "folder. Then\n\n"
    '```python\nAutoModel.from_pretrained("FOLDER", trust_remote_code=True)\n```\n',
    encoding="utf-8",
  )


def refuse(model: ModelConfig, tokenizer: chat.ChatTokenizer, template: str, images: Mapping[str, Any]) -> None:
  """Raises ConfigError where the released code would not load the model, or would ask it otherwise."""
  if model.projector.kind != "pixel_shuffle" or not model.vision.layer_scale:
    raise ConfigError(
      f"projector.kind={model.projector.kind!r}, vision.layer_scale={model.vision.layer_scale}: the released code of "
      "InternVL 2 knows its own projector on an InternViT only; keep the folder that this project writes"
    )
  kind = text_config(model.decoder)["model_type"]
  if kind not in LLM_CLASSES:
    raise ConfigError(f"a {kind} language model: InternVL 2's released code has {', '.join(LLM_CLASSES)} only")
  if template not in (*internvl.TEMPLATES.values(), "plain"):
    raise ConfigError(f"template {template!r} is none of InternVL 2's released code; known: internvl2")
  chat.end_id("internvl2", tokenizer)
  marks = (dynamic_tiles.START, dynamic_tiles.END, PATCH_TOKEN)
  absent = [mark for mark in marks if mark not in tokenizer.specials]
  if absent:
    raise ConfigError(
      f"the tokenizer has no {', '.join(absent)}, which InternVL 2's released code writes around and for the visual "
      "tokens; this model was trained without"
    )
  if images.get("image_aspect", "tiles") != "tiles":
    raise ConfigError(
      f"data.image_aspect={images['image_aspect']!r}: InternVL 2's released code cuts pictures to tiles"
    )


def config(model: ModelConfig, images: Mapping[str, Any], dtype: str) -> dict[str, Any]:
  """config.json."""
  vision, text = model.vision, text_config(model.decoder)
  classes = {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"}
  classes |= dict.fromkeys(("AutoModel", "AutoModelForCausalLM"), "modeling_internvl_chat.InternVLChatModel")
  architecture = {"architectures": [LLM_CLASSES[text["model_type"]]], "vocab_size": model.decoder.vocab_size}
  return {
    "model_type": "internvl_chat",
    "architectures": ["InternVLChatModel"],
    "auto_map": classes,
    "template": next(iter(internvl.TEMPLATES)),
    "select_layer": -1,
    "force_image_size": vision.image_size,
    "downsample_ratio": 0.5,
    "ps_version": "v2",
    "pad2square": False,
    "dynamic_image_size": True,
    "use_thumbnail": True,
    "min_dynamic_patch": 1,
    "max_dynamic_patch": images.get("max_slices", internvl.TILES),
    "use_backbone_lora": 0,
    "use_llm_lora": 0,
    "torch_dtype": dtype,
    "transformers_version": TRANSFORMERS_VERSION,
    "llm_config": architecture | text | {"torch_dtype": dtype},
    "vision_config": {
      "model_type": internvit.TOWER,
      "architectures": ["InternVisionModel"],
      **tower_sizes(vision),
      **internvit.COMPUTED,
      "torch_dtype": dtype,
    },
  }
