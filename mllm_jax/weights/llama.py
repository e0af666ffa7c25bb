"""Llama-type decoders as Hugging Face stores them: `LlamaForCausalLM`, which Vicuna v1.5 and Llama 3 are, alone or
inside a LLaVA checkpoint. The reading of configurations and names is shared with Qwen2 and Mistral, which differ in
values only.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mllm_jax.config import DecoderConfig
from mllm_jax.weights import parts
from mllm_jax.weights.known import WeightsError, read_json
from mllm_jax.weights.tables import LINEAR, Row, Table, linear

# transformers leaves out of config.json what equals the defaults of its LlamaConfig.
DEFAULTS = {
  "vocab_size": 32000,
  "hidden_size": 4096,
  "intermediate_size": 11008,
  "num_hidden_layers": 32,
  "num_attention_heads": 32,
  "rms_norm_eps": 1e-6,
  "hidden_act": "silu",
  "tie_word_embeddings": False,
  "max_position_embeddings": 2048,
}
ROPE_THETA = 10000.0
# Fields of the rotary scaling "llama3", and what DecoderConfig calls them.
LLAMA3_ROPE = {
  "factor": "rope_factor",
  "low_freq_factor": "rope_low",
  "high_freq_factor": "rope_high",
  "original_max_position_embeddings": "rope_trained",
}
# Settings that would change the result, and the values with which they do nothing.
NEUTRAL = {"hidden_act": "silu", "quantization_config": None, "partial_rotary_factor": 1.0}
BIASES = {"attention_bias": False, "mlp_bias": False}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
VOCABULARY = "the checkpoint has another vocabulary, as when tokens were added to it"
# From LLaVA's two layouts that wrap the language model to that of a causal language model alone.
RENAMES = ((r"^model\.language_model\.", "model."), (r"^language_model\.(?=(model|lm_head)\.)", ""))


def read_config(folder: str | Path) -> DecoderConfig:
  """The architecture in a folder's config.json.

  Raises WeightsError where that is missing, of another model type, or asks for what the decoder does not compute.
  """
  return parse(*read_decoder(folder, "llama", "lmsys/vicuna-7b-v1.5"))


def parse(content: Mapping[str, Any], where: str) -> DecoderConfig:
  """The architecture in a `text_config` of type llama; `where` names its file and key in errors.

  Raises WeightsError where it is of another model type, or asks for what the decoder does not compute.
  """
  return decoder_config(content, where, "llama", DEFAULTS, BIASES | NEUTRAL)


def table(config: DecoderConfig, prefix: str = "") -> Table:
  """The names of a decoder, exported behind `prefix`. The other parts of a LLaVA checkpoint are ignored."""
  layer = "model.layers.{layer}."
  rows = [
    Row("model.embed_tokens.weight", "decoder/embedding", hint=VOCABULARY),
    Row(layer + "input_layernorm.weight", "decoder/layers/input_norm/scale"),
    Row(layer + "post_attention_layernorm.weight", "decoder/layers/post_attention_norm/scale"),
    Row("model.norm.weight", "decoder/norm/scale"),
  ]
  for name in ATTENTION:
    bias = config.attention_bias and name != "o_proj"
    rows += linear(f"{layer}self_attn.{name}", f"decoder/layers/{name}", bias)
  for name in MLP:
    rows += linear(f"{layer}mlp.{name}", f"decoder/layers/{name}", bias=False)
  ignored = (
    (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", "a buffer: follows from rope_theta"),
    parts.VISION,
    parts.PROJECTOR,
  )
  if config.tied_embeddings:
    ignored += ((r"lm_head\.weight", "the same as the embedding table"),)
  else:
    rows.append(Row("lm_head.weight", "decoder/head", LINEAR, VOCABULARY))
  return Table(tuple(rows), ignored, RENAMES, parts.HINTS, prefix)


def read_decoder(folder: str | Path, kind: str, example: str) -> tuple[dict[str, Any], str]:
  """A folder's config.json and its name for errors. Raises WeightsError where its model_type is not `kind`, such as the
  repository `example` has it."""
  path = Path(folder) / "config.json"
  content = read_json(path, f"the configuration of a language model of type {kind}")
  if content.get("model_type") != kind:
    raise WeightsError(
      f"{path}: model_type is {content.get('model_type')!r}; as a language model {kind} is read, such as {example}"
    )
  return content, str(path)


def decoder_config(
  content: Mapping[str, Any], where: str, kind: str, defaults: Mapping[str, Any], neutral: Mapping[str, Any]
) -> DecoderConfig:
  """What Hugging Face's names say of a decoder of type `kind`.

  Raises WeightsError for another model_type, and for a setting with another value than its `neutral` one.
  """
  if content.get("model_type", kind) != kind:
    raise WeightsError(f"{where}: model_type is {content['model_type']!r}, and {kind} is read here")
  config = {**defaults, **content}
  wrong = [f"{name}={config[name]!r}" for name, value in neutral.items() if config.get(name) not in (value, None)]
  if wrong:
    raise WeightsError(
      f"{where} sets {', '.join(wrong)}, which the decoder does not compute; use a {kind} checkpoint without"
    )
  heads, width = config["num_attention_heads"], config["hidden_size"]
  if not isinstance(heads, int) or not isinstance(width, int) or heads < 1:
    raise WeightsError(f"{where}: num_attention_heads is {heads!r} and hidden_size {width!r}; download it again")
  result = DecoderConfig(
    vocab_size=config["vocab_size"],
    width=width,
    layers=config["num_hidden_layers"],
    heads=heads,
    kv_heads=config.get("num_key_value_heads") or heads,
    head_width=config.get("head_dim") or width // heads,
    mlp_width=config["intermediate_size"],
    **read_rope(where, config),
    norm_eps=config["rms_norm_eps"],
    tied_embeddings=config["tie_word_embeddings"],
    max_positions=config["max_position_embeddings"],
  )
  return parts.checked(result, where)


def read_rope(where: str, config: Mapping[str, Any]) -> dict[str, Any]:
  """The fields of the rotary angles: their base, from rope_theta or, as transformers 5 writes it, from rope_parameters,
  and how Llama 3.1 stretches them. Raises WeightsError for any other stretching."""
  parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
  if not isinstance(parameters, dict):
    raise WeightsError(f"{where} describes its rotary positions by {parameters!r}; download it again")
  kind = parameters.get("rope_type", parameters.get("type", "default"))
  if kind not in ("default", "llama3") or parameters.get("partial_rotary_factor") not in (1.0, None):
    raise WeightsError(
      f"{where} stretches its rotary positions ({kind!r}: {parameters}), which the decoder does not compute; "
      "use a checkpoint without rope scaling, or with llama3's"
    )
  theta = parameters.get("rope_theta", config.get("rope_theta", ROPE_THETA))
  if not isinstance(theta, int | float) or theta <= 0:
    raise WeightsError(f"{where}: rope_theta is {theta!r}, and must be a positive number; download it again")
  if kind == "default":
    return {"rope_theta": float(theta)}
  found = {name: parameters.get(name) for name in LLAMA3_ROPE}
  numbers = all(isinstance(value, int | float) and 0 < value < math.inf for value in found.values())
  if not numbers or found["factor"] < 1 or found["low_freq_factor"] >= found["high_freq_factor"]:
    raise WeightsError(
      f"{where}: the rotary scaling llama3 has {found}; the factor must be 1 or more, low_freq_factor lie below "
      "high_freq_factor, and none be missing; download it again"
    )
  found["original_max_position_embeddings"] = int(found["original_max_position_embeddings"])
  return {"rope_theta": float(theta)} | {LLAMA3_ROPE[name]: value for name, value in found.items()}
