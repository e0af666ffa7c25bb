"""The layout of transformers: LLaVA-1.5 as `LlavaForConditionalGeneration`, by the names and files of llava-hf."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from mllm_jax.config import ConfigError, ModelConfig, VisionConfig
from mllm_jax.data import chat
from mllm_jax.weights.side_files import chat_template
from mllm_jax.weights.side_files import tokenizer as tokenizer_files
from mllm_jax.weights.side_files.files import (
  TRANSFORMERS_VERSION,
  check_dtype,
  rope,
  text_config,
  tower_sizes,
  write_json,
)
from mllm_jax.weights.side_files.tokenizer import IMAGE_TOKEN, HfVocabulary

POST_NORM = "vision_tower.vision_model.post_layernorm"
BICUBIC = 3  # Pillow's number
PROCESSOR = "LlavaProcessor"
DECODER_CLASSES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}


def write_hf(
  folder: str | Path,
  model: ModelConfig,
  tokenizer_folder: str | Path,
  template: str,
  vocabulary: HfVocabulary,
  dtype: str,
  cut: bool = False,
) -> None:
  """Writes every file but the weights of a LLaVA-1.5-type model, for transformers 4 and 5.

  The tower is described with the layers that the model uses, so that the output of its last layer is the feature: what
  comes after them is not kept here, and transformers would fill it with random numbers. It wants a `post_layernorm` all
  the same, for a pooled output that LLaVA does not ask for; `extra_tensors` has it. The hidden states, the last one
  included, are taken before it.

  Pictures are padded to a square with the mean colour or cut to one, as here; llava-hf's are always cut. Resized
  by Pillow they have exactly our pixels. Where torchvision is installed transformers 5 resizes by that, and some pixels
  differ by one level of 255, unless the processor is loaded with backend="pil".

  Args:
    folder: exists, or is made.
    model: with projector kind "mlp2x_gelu".
    tokenizer_folder: the language model's folder, with its tokenizer and its config.json.
    template: the one the model was trained with; "plain" is asked with "vicuna_v1".
    vocabulary: from `hf_vocabulary`.
    dtype: of the weights: "float32", "float16" or "bfloat16".
    cut: whether images were cut to squares in training (data.image_aspect=square), not padded.

  Raises ConfigError for a model or a type that the layout cannot express, and where no chat template gives our token
  ids; DataError where the tokenizer cannot be used, with this template or at all.
  """
  check_dtype(dtype)
  if model.projector.kind != "mlp2x_gelu":
    raise ConfigError(
      f"projector.kind={model.projector.kind!r} cannot be exported to transformers, whose Llava has a projector of "
      "patches only; use the official layout"
    )
  tower = vision_config(model.vision)
  folder, source = Path(folder), Path(tokenizer_folder)
  ours, theirs = chat.load_tokenizer(str(source)), chat.hf_tokenizer(source)
  content = tokenizer_files.extended(theirs, vocabulary)
  backend = Tokenizer.from_str(json.dumps(content))
  template_text = chat_template.jinja(template, ours, backend, vocabulary.image_token_id)
  folder.mkdir(parents=True, exist_ok=True)

  ids = {"bos_token_id": theirs.bos_token_id, "eos_token_id": ours.eos_id, "pad_token_id": vocabulary.pad_token_id}
  ends = sorted({*ours.end_ids, chat.end_id(template, ours)})
  tokenizer_files.write(folder, source, theirs, content)
  write_json(folder / "config.json", config(model, tower, vocabulary, ids, dtype))
  ending = {"eos_token_id": ends if len(ends) > 1 else ends[0], "transformers_version": TRANSFORMERS_VERSION}
  write_json(folder / "generation_config.json", ids | ending)
  write_json(folder / "preprocessor_config.json", preprocessor_config(model.vision, cut))
  write_json(
    folder / "processor_config.json",
    {
      "processor_class": PROCESSOR,
      "image_token": IMAGE_TOKEN,
      "patch_size": model.vision.patch_size,
      "num_additional_image_tokens": int(model.vision.class_token),
      "vision_feature_select_strategy": _strategy(model.vision),
    },
  )
  (folder / "chat_template.jinja").write_text(template_text, encoding="utf-8")
  write_json(folder / "chat_template.json", {"chat_template": template_text})  # where transformers before 4.50 looks


def extra_tensors(model: ModelConfig) -> dict[str, np.ndarray]:
  """The weights that transformers wants and nothing uses, by the name they are exported under: the tower's
  `post_layernorm`, as it is before any training (see `write_hf`)."""
  width = model.vision.width
  return {f"{POST_NORM}.weight": np.ones(width, np.float32), f"{POST_NORM}.bias": np.zeros(width, np.float32)}


def config(
  model: ModelConfig,
  tower: dict[str, Any],
  vocabulary: HfVocabulary,
  ids: dict[str, int | None],
  dtype: str,
) -> dict[str, Any]:
  """config.json. What versions 4 and 5 spell differently stands there twice."""
  types = {"dtype": dtype, "torch_dtype": dtype}
  decoder = text_config(model.decoder)
  family = DECODER_CLASSES[decoder["model_type"]]
  rope_parameters = rope(model.decoder) | {"rope_theta": model.decoder.rope_theta}
  return {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "transformers_version": TRANSFORMERS_VERSION,
    **types,
    "image_token_index": vocabulary.image_token_id,
    "image_token_id": vocabulary.image_token_id,
    "image_seq_length": model.vision.grid**2,
    "multimodal_projector_bias": True,
    "projector_hidden_act": "gelu",
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": _strategy(model.vision),
    "tie_word_embeddings": model.decoder.tied_embeddings,
    **ids,
    "vision_config": tower | types,
    "text_config": {
      "architectures": [family],
      "vocab_size": vocabulary.vocab_size,
      **decoder,
      "rope_parameters": rope_parameters,
      **ids,
      **types,
    },
  }


def vision_config(vision: VisionConfig) -> dict[str, Any]:
  """The tower's part of config.json. Raises ConfigError for a tower that is neither CLIP's nor SigLIP's."""
  family = {(True, False, True): "clip_vision_model", (False, True, False): "siglip_vision_model"}.get(
    (vision.class_token, vision.patch_bias, vision.pre_norm)
  )
  if family is None:
    raise ConfigError(
      f"vision.class_token={vision.class_token}, patch_bias={vision.patch_bias} and pre_norm={vision.pre_norm} are "
      "together neither CLIP's nor SigLIP's, and transformers has no tower for them"
    )
  content = {"model_type": family, **tower_sizes(vision), "attention_dropout": 0.0}
  # Without its head for pooling SigLIP needs no weights for it.
  return content | ({"projection_dim": vision.width} if vision.class_token else {"vision_use_head": False})


def preprocessor_config(vision: VisionConfig, cut: bool) -> dict[str, Any]:
  """How pictures become pixel values: padded to a square with the mean colour or, `cut`, cut to one as the tower's own
  preprocessing does it; resized bicubically, normalised."""
  size = {"height": vision.image_size, "width": vision.image_size}
  own = "CLIPImageProcessor" if vision.class_token else "SiglipImageProcessor"
  cut_middle = cut and vision.class_token
  return {
    "image_processor_type": own if cut else "LlavaImageProcessor",
    "processor_class": PROCESSOR,
    "do_convert_rgb": True,
    "do_pad": not cut,
    "do_resize": True,
    "size": {"shortest_edge": vision.image_size} if cut_middle else size,
    "resample": BICUBIC,
    "do_center_crop": cut_middle,
    "crop_size": size,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": list(vision.mean),
    "image_std": list(vision.std),
  }


def _strategy(vision: VisionConfig) -> str:
  """Which places of the tower's output are features: "default" leaves the first one out."""
  return "default" if vision.class_token else "full"
