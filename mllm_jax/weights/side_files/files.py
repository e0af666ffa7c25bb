"""How the side files are written, and what several of them take from the language model's folder."""

import json
from pathlib import Path
from typing import Any

from mllm_jax.config import ConfigError, DecoderConfig, VisionConfig
from mllm_jax.weights.llama import LLAMA3_ROPE

DTYPES = ("float32", "float16", "bfloat16")
# Version of transformers whose spelling the files follow; later ones read it too.
TRANSFORMERS_VERSION = "4.57.6"


def write_json(path: Path, content: dict[str, Any]) -> None:
  """Writes an object as transformers does: indented, UTF-8, with a newline at the end."""
  path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_dtype(dtype: str) -> None:
  """Raises ConfigError unless `dtype` is one that weights are stored in."""
  if dtype not in DTYPES:
    raise ConfigError(f"dtype={dtype!r} is no type to store weights in; use one of {', '.join(DTYPES)}")


def text_config(decoder: DecoderConfig) -> dict[str, Any]:
  """The decoder's fields of config.json, without its vocabulary and without ids."""
  kind = decoder_kind(decoder)
  content = {
    "model_type": kind,
    "hidden_size": decoder.width,
    "intermediate_size": decoder.mlp_width,
    "num_hidden_layers": decoder.layers,
    "num_attention_heads": decoder.heads,
    "num_key_value_heads": decoder.kv_heads,
    "head_dim": decoder.head_width,
    "hidden_act": "silu",
    "max_position_embeddings": decoder.max_positions,
    "rms_norm_eps": decoder.norm_eps,
    "rope_theta": decoder.rope_theta,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "tie_word_embeddings": decoder.tied_embeddings,
    "use_cache": True,
  } | ({} if decoder.rope_factor == 1 else {"rope_scaling": rope(decoder)})
  if kind == "mistral":
    return content | {"sliding_window": decoder.sliding_window}
  if kind == "llama":
    return content | {"attention_bias": False, "mlp_bias": False}
  return content | {"use_sliding_window": False, "max_window_layers": decoder.layers}


def decoder_kind(decoder: DecoderConfig) -> str:
  """The model_type that computes what this decoder does. Raises ConfigError where there is none."""
  if decoder.attention_bias and decoder.sliding_window:
    raise ConfigError(
      f"decoder.attention_bias and decoder.sliding_window={decoder.sliding_window}: no model type of other tools has "
      "both in every layer"
    )
  return "qwen2" if decoder.attention_bias else "mistral" if decoder.sliding_window else "llama"


def rope(decoder: DecoderConfig) -> dict[str, Any]:
  """The rotary angles without their base, as transformers names them."""
  if decoder.rope_factor == 1:
    return {"rope_type": "default"}
  return {"rope_type": "llama3"} | {name: getattr(decoder, field) for name, field in LLAMA3_ROPE.items()}


def tower_sizes(vision: VisionConfig) -> dict[str, Any]:
  """A tower's fields of config.json that all kinds of towers have."""
  return {
    "image_size": vision.image_size,
    "patch_size": vision.patch_size,
    "num_channels": 3,
    "hidden_size": vision.width,
    "intermediate_size": vision.mlp_width,
    "num_hidden_layers": vision.layers_used,
    "num_attention_heads": vision.heads,
    "hidden_act": vision.activation,
    "layer_norm_eps": vision.norm_eps,
  }
