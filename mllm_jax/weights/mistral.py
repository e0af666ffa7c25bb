"""Mistral decoders as Hugging Face stores them: `MistralForCausalLM`, alone or inside a LLaVA checkpoint. The names are
Llama's; each token sees the last ones of a sliding window, unless the checkpoint, as from version 0.2 on, has none.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mllm_jax.config import DecoderConfig
from mllm_jax.weights import llama
from mllm_jax.weights.known import WeightsError
from mllm_jax.weights.tables import Table

# transformers leaves out of config.json what equals the defaults of its MistralConfig.
DEFAULTS = {
  "vocab_size": 32000,
  "hidden_size": 4096,
  "intermediate_size": 14336,
  "num_hidden_layers": 32,
  "num_attention_heads": 32,
  "num_key_value_heads": 8,
  "rms_norm_eps": 1e-6,
  "hidden_act": "silu",
  "tie_word_embeddings": False,
  "max_position_embeddings": 131072,
}
SLIDING_WINDOW = 4096  # where config.json does not speak of one; null says that there is none


def read_config(folder: str | Path) -> DecoderConfig:
  """The architecture in a folder's config.json.

  Raises WeightsError where that is missing, of another model type, or asks for what the decoder does not compute.
  """
  return parse(*llama.read_decoder(folder, "mistral", "mistralai/Mistral-7B-Instruct-v0.1"))


def parse(content: Mapping[str, Any], where: str) -> DecoderConfig:
  """The architecture in a `text_config` of type mistral; `where` names its file and key in errors.

  Raises WeightsError where it is of another model type, or asks for what the decoder does not compute.
  """
  window = content.get("sliding_window", SLIDING_WINDOW)
  if window is not None and (not isinstance(window, int) or window < 1):
    raise WeightsError(f"{where}: sliding_window is {window!r}, and must be a positive number or null")
  config = llama.decoder_config(content, where, "mistral", DEFAULTS, llama.NEUTRAL)
  return dataclasses.replace(config, sliding_window=window or 0)


def table(config: DecoderConfig, prefix: str = "") -> Table:
  """The names of a decoder, exported behind `prefix`. The other parts of a LLaVA checkpoint are ignored."""
  return llama.table(config, prefix)
