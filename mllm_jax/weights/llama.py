"""Llama-type decoders as Hugging Face stores them: `LlamaForCausalLM`, which Vicuna v1.5 is."""

from pathlib import Path
from typing import Any

from mllm_jax.config import DecoderConfig
from mllm_jax.weights.known import WeightsError, read_json
from mllm_jax.weights.mapping import LINEAR, Row, Table, linear

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
}
ROPE_THETA = 10000.0
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
VOCABULARY = "the checkpoint has another vocabulary, as when tokens were added to it"


def read_config(folder: str | Path) -> DecoderConfig:
  """The architecture in a folder's config.json.

  Raises WeightsError where that is missing, of another model type, or asks for what the decoder does not compute.
  """
  path = Path(folder) / "config.json"
  content = read_json(path, "the configuration of a Llama-type language model")
  kind = content.get("model_type")
  if kind != "llama":
    raise WeightsError(
      f"{path}: model_type is {kind!r}; as a language model llama is read, such as lmsys/vicuna-7b-v1.5"
    )
  config = DEFAULTS | content
  refuse(path, config)
  heads = config["num_attention_heads"]
  return DecoderConfig(
    vocab_size=config["vocab_size"],
    width=config["hidden_size"],
    layers=config["num_hidden_layers"],
    heads=heads,
    kv_heads=config.get("num_key_value_heads") or heads,
    head_width=config.get("head_dim") or config["hidden_size"] // heads,
    mlp_width=config["intermediate_size"],
    rope_theta=read_rope(path, config),
    norm_eps=config["rms_norm_eps"],
    tied_embeddings=config["tie_word_embeddings"],
  )


def refuse(path: Path, config: dict[str, Any]) -> None:
  """Raises WeightsError for settings that would change the result and are not computed here."""
  plain = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "quantization_config": None}
  wrong = [f"{name}={config[name]!r}" for name, value in plain.items() if config.get(name) not in (value, None)]
  if wrong:
    raise WeightsError(
      f"{path} sets {', '.join(wrong)}, which the decoder does not compute; use a Llama checkpoint without"
    )


def read_rope(path: Path, config: dict[str, Any]) -> float:
  """The base of the rotary angles, from rope_theta or, as transformers 5 writes it, from rope_parameters."""
  parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
  kind = parameters.get("rope_type", parameters.get("type", "default"))
  if kind != "default":
    raise WeightsError(
      f"{path} stretches its rotary positions ({kind!r}: {parameters}), which the decoder does not compute; "
      "use a checkpoint without rope scaling"
    )
  return float(parameters.get("rope_theta", config.get("rope_theta", ROPE_THETA)))


def table(config: DecoderConfig) -> Table:
  """The names of a decoder. What else a multimodal checkpoint holds beside it is ignored."""
  layer = "model.layers.{layer}."
  rows = (
    Row("model.embed_tokens.weight", "decoder/embedding", hint=VOCABULARY),
    Row(layer + "input_layernorm.weight", "decoder/layers/input_norm/scale"),
    Row(layer + "post_attention_layernorm.weight", "decoder/layers/post_attention_norm/scale"),
    *(row for name in ATTENTION for row in linear(f"{layer}self_attn.{name}", f"decoder/layers/{name}", bias=False)),
    *(row for name in MLP for row in linear(f"{layer}mlp.{name}", f"decoder/layers/{name}", bias=False)),
    Row("model.norm.weight", "decoder/norm/scale"),
  )
  ignored = (
    (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", "a buffer: follows from rope_theta"),
    (
      r"model\.(vision_tower|mm_projector|conv_\w+|conv_linear|(query|key|value)_projector)\..*",
      "the tower and projector of a multimodal checkpoint, which have tables of their own",
    ),
  )
  if config.tied_embeddings:
    return Table(rows, ignored + ((r"lm_head\.weight", "the same as the embedding table"),))
  return Table(rows + (Row("lm_head.weight", "decoder/head", LINEAR, VOCABULARY),), ignored)
