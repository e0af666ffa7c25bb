"""LoRA adapters as PEFT stores them: `adapter_model.safetensors` or `.bin`, and `adapter_config.json`."""

from pathlib import Path

from mllm_jax.config import LORA_TARGETS, LoraConfig
from mllm_jax.weights import llama
from mllm_jax.weights.known import WeightsError, read_json
from mllm_jax.weights.mapping import LINEAR, Row, Table

# Settings that change the arithmetic or the set of weights, and the values with which they do nothing.
NEUTRAL = {
  "use_rslora": (False,),
  "use_dora": (False,),
  "rank_pattern": ({},),
  "alpha_pattern": ({},),
  "bias": ("none",),
  "fan_in_fan_out": (False,),
  "modules_to_save": ([],),
  "layers_to_transform": ([],),
  "layer_replication": ([],),
  "target_parameters": ([],),
  "trainable_token_indices": ([],),
  "lora_bias": (False,),
}
RANK = "the adapter has another rank or belongs to another model; compare adapter_config.json"


def read_config(folder: str | Path) -> LoraConfig:
  """The adapter that a folder's adapter_config.json describes. Its scale is alpha / rank.

  Raises WeightsError where the file is missing, is no LoRA, or has settings that are not computed here (rank-stabilised
  LoRA, DoRA, ranks that differ by layer, trained biases, ...).
  """
  path = Path(folder) / "adapter_config.json"
  content = read_json(path, "the configuration of a PEFT adapter")
  if content.get("peft_type") != "LORA":
    raise WeightsError(f"{path}: peft_type is {content.get('peft_type')!r}; only LORA adapters are read")
  wrong = [
    f"{name}={content[name]!r}"
    for name, neutral in NEUTRAL.items()
    if content.get(name) is not None and content[name] not in neutral
  ]
  if wrong:
    raise WeightsError(
      f"{path} sets {', '.join(wrong)}, which is not computed here; merge the adapter into its model with PEFT "
      "(merge_and_unload) and use the result"
    )
  if content.get("r") is None or content.get("lora_alpha") is None:
    raise WeightsError(f"{path} lacks r or lora_alpha; write the adapter's rank and alpha into it")
  targets = content.get("target_modules")
  if not isinstance(targets, list) or not set(targets) <= set(LORA_TARGETS):
    raise WeightsError(f"{path}: target_modules is {targets!r}; a list out of {', '.join(LORA_TARGETS)} is read")
  return LoraConfig(
    rank=content["r"],
    alpha=float(content["lora_alpha"]),
    dropout=float(content.get("lora_dropout", 0.0)),
    targets=tuple(name for name in LORA_TARGETS if name in targets),
  )


def table(config: LoraConfig) -> Table:
  """The names of the adapters of a decoder's projections."""
  rows = []
  for name in (name for name in LORA_TARGETS if name in config.targets):
    block = "self_attn" if name in llama.ATTENTION else "mlp"
    for foreign, ours in (("lora_A", "a"), ("lora_B", "b")):
      rows.append(
        Row(f"layers.{{layer}}.{block}.{name}.{foreign}.weight", f"decoder/layers/{name}/lora/{ours}", LINEAR, RANK)
      )
  # In memory PEFT has the adapter's name, "default", before `.weight`; some files were saved so.
  renames = ((r"^(base_model\.)?(model\.)*", ""), (r"\.default\.weight$", ".weight"))
  return Table(tuple(rows), renames=renames, prefix="base_model.model.model.")
