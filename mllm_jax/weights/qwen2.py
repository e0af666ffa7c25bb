"""Qwen2 decoders as Hugging Face stores them: `Qwen2ForCausalLM`, which Qwen2.5 is too, alone or inside a LLaVA
checkpoint. The names are Llama's, with biases on queries, keys and values.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mllm_jax.config import DecoderConfig
from mllm_jax.weights import llama
from mllm_jax.weights.known import WeightsError
from mllm_jax.weights.tables import Table

# transformers leaves out of config.json what equals the defaults of its Qwen2Config.
DEFAULTS = {
  "vocab_size": 151936,
  "hidden_size": 4096,
  "intermediate_size": 22016,
  "num_hidden_layers": 32,
  "num_attention_heads": 32,
  "num_key_value_heads": 32,
  "rms_norm_eps": 1e-6,
  "hidden_act": "silu",
  "tie_word_embeddings": False,
  "max_position_embeddings": 32768,
}
# sliding_window and max_window_layers say nothing where this one is false, as it is in the published checkpoints.
NEUTRAL = llama.NEUTRAL | {"use_sliding_window": False}


def read_config(folder: str | Path) -> DecoderConfig:
  """The architecture in a folder's config.json.

  Raises WeightsError where that is missing, of another model type, or asks for what the decoder does not compute.
  """
  return parse(*llama.read_decoder(folder, "qwen2", "Qwen/Qwen2-0.5B-Instruct"))


def parse(content: Mapping[str, Any], where: str) -> DecoderConfig:
  """The architecture in a `text_config` of type qwen2; `where` names its file and key in errors.

  Raises WeightsError where it is of another model type, or asks for what the decoder does not compute, such as
  attention within a sliding window.
  """
  others = sorted({str(kind) for kind in content.get("layer_types") or ()} - {"full_attention"})
  if others:
    raise WeightsError(
      f"{where}: layer_types has {', '.join(others)}, and the decoder computes full_attention only; use a qwen2 "
      "checkpoint without"
    )
  config = llama.decoder_config(content, where, "qwen2", DEFAULTS, NEUTRAL)
  return dataclasses.replace(config, attention_bias=True)


def table(config: DecoderConfig, prefix: str = "") -> Table:
  """The names of a decoder, exported behind `prefix`. The other parts of a LLaVA checkpoint are ignored."""
  return llama.table(config, prefix)
