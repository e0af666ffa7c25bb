"""Tiny models as checkpoints in every layout that is read: folders with the names, files and configurations of others.

The towers are those of `tiny.write_towers`; the projectors and adapters are random. Weights are random numbers of
`dtype` and so the same in every layout of one seed.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import tiny
from safetensors.numpy import save_file

from mllm_jax.config import LoraConfig, ModelConfig, ProjectorConfig, VisionConfig
from mllm_jax.weights import assemble, clip, llama, mapping, mlp, peft, qwen2, siglip
from mllm_jax.weights.recognise import projector_table
from mllm_jax.weights.tensors import InMemory
from mllm_jax.weights.write import write_torch_bin

MLP = ProjectorConfig(kind="mlp2x_gelu")
LORA = LoraConfig(rank=2, alpha=8.0, dropout=0.0)
SIGLIP = VisionConfig(
  **vars(tiny.VISION)
  | dict(
    class_token=False,
    patch_bias=True,
    pre_norm=False,
    activation="gelu_pytorch_tanh",
    norm_eps=1e-6,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
  )
)
QWEN2 = dataclasses.replace(tiny.DECODER, attention_bias=True, rope_theta=1e6, norm_eps=1e-6)
CLIP_CONFIG = {
  "model_type": "clip_vision_model",
  "hidden_size": tiny.VISION.width,
  "intermediate_size": tiny.VISION.mlp_width,
  "num_hidden_layers": tiny.VISION.layers,
  "num_attention_heads": tiny.VISION.heads,
  "image_size": tiny.VISION.image_size,
  "patch_size": tiny.VISION.patch_size,
  "hidden_act": "quick_gelu",
  "layer_norm_eps": tiny.VISION.norm_eps,
}
SIGLIP_CONFIG = CLIP_CONFIG | {
  "model_type": "siglip_vision_model",
  "hidden_act": "gelu_pytorch_tanh",
  "layer_norm_eps": 1e-6,
}
LLAMA_CONFIG = {
  "model_type": "llama",
  "vocab_size": tiny.DECODER.vocab_size,
  "hidden_size": tiny.DECODER.width,
  "intermediate_size": tiny.DECODER.mlp_width,
  "num_hidden_layers": tiny.DECODER.layers,
  "num_attention_heads": tiny.DECODER.heads,
  "num_key_value_heads": tiny.DECODER.kv_heads,
  "head_dim": tiny.DECODER.head_width,
  "rms_norm_eps": tiny.DECODER.norm_eps,
  "rope_theta": tiny.DECODER.rope_theta,
  "hidden_act": "silu",
  "tie_word_embeddings": False,
  "max_position_embeddings": tiny.DECODER.max_positions,
}
QWEN2_CONFIG = LLAMA_CONFIG | {"model_type": "qwen2", "rope_theta": 1e6, "rms_norm_eps": 1e-6}
OFFICIAL_FIELDS = {
  "mm_projector_type": "mlp2x_gelu",
  "mm_hidden_size": tiny.VISION.width,
  "mm_vision_select_layer": -2,
  "mm_vision_select_feature": "patch",
  "mm_use_im_start_end": False,
  "mm_use_im_patch_token": False,
}


def arrays(model: ModelConfig, part: str, dtype=np.float32, seed: int = 0, layers: int | None = None) -> dict:
  """Random arrays of one part by our paths. `layers`: of the tower, more than it uses, as checkpoints have them."""
  configs = {name: getattr(model, name) for name in ("vision", "decoder", "projector", "lora")}
  if layers is not None:
    configs["vision"] = dataclasses.replace(model.vision, select_layer=-1)
  draw = np.random.default_rng([seed, *part.encode()])
  shapes = assemble.part_shapes(part, configs)
  return {path: draw.normal(0, 0.1, shape).astype(dtype) for path, shape in shapes.items()}


def tower(vision: VisionConfig) -> tuple:
  """(family, config.json) of a tower."""
  return (clip, CLIP_CONFIG) if vision.class_token else (siglip, SIGLIP_CONFIG)


def decoder(model: ModelConfig) -> tuple:
  """(family, config.json) of a language model."""
  content = QWEN2_CONFIG if model.decoder.attention_bias else LLAMA_CONFIG
  return qwen2 if model.decoder.attention_bias else llama, content | {
    "tie_word_embeddings": model.decoder.tied_embeddings
  }


def save(folder: Path, tensors: dict, content: dict | None = None, name: str = "model.safetensors") -> Path:
  """Writes a folder: weights as safetensors or .bin, and config.json."""
  folder.mkdir(parents=True, exist_ok=True)
  if name.endswith(".bin"):
    write_torch_bin(folder / name, InMemory(tensors))
  else:
    save_file(tensors, folder / name)
  if content is not None:
    (folder / "config.json").write_text(json.dumps(content))
  return folder


def tokenizer(folder: Path) -> Path:
  """The tiny tokenizer's files."""
  folder.mkdir(parents=True, exist_ok=True)
  shutil.copy(tiny.GOLDENS / "tiny_spm.model", folder / "tokenizer.model")
  settings = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True, "pad_token": "<unk>"}
  special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
  (folder / "tokenizer_config.json").write_text(json.dumps(settings | special))
  return folder


def vision_folder(folder: Path, model: ModelConfig, prefix: str = "vision_model.", **options) -> Path:
  """A tower alone, with the layers that it does not use."""
  family, content = tower(model.vision)
  whole = dataclasses.replace(model.vision, select_layer=-1)
  tensors = mapping.export(arrays(model, "vision", layers=whole.layers, **options), family.table(whole, prefix))
  tensors |= {f"{prefix}post_layernorm.{name}": np.ones(whole.width, np.float32) for name in ("weight", "bias")}
  return save(folder, tensors, content)


def decoder_folder(folder: Path, model: ModelConfig, name: str = "model.safetensors", **options) -> Path:
  """A language model alone, with its tokenizer."""
  family, content = decoder(model)
  tensors = mapping.export(arrays(model, "decoder", **options), family.table(model.decoder))
  return tokenizer(save(folder, tensors, content, name))


def projector_names(model: ModelConfig, prefix: str, **options) -> dict:
  """The projector in the released names behind a prefix."""
  table = projector_table(model.projector, model.vision.grid)
  exported = mapping.export(arrays(model, "projector", **options), dataclasses.replace(table, prefix=prefix))
  return exported


def official_folder(folder: Path, model: ModelConfig, vision_path: str, inside: bool = False, **options) -> Path:
  """A whole LLaVA or LLaVA-SP as its own code saves it, with the tower inside or named only."""
  family, content = decoder(model)
  tensors = mapping.export(arrays(model, "decoder", **options), family.table(model.decoder))
  tensors |= projector_names(model, "model.", **options)
  if inside:
    vision, _ = tower(model.vision)
    whole = dataclasses.replace(model.vision, select_layer=-1)
    table = vision.table(whole, "model.vision_tower.vision_tower.vision_model.")
    tensors |= mapping.export(arrays(model, "vision", layers=whole.layers, **options), table)
  content = content | OFFICIAL_FIELDS | {"model_type": "llava_llama", "mm_vision_tower": vision_path}
  return tokenizer(save(folder, tensors, content, "pytorch_model.bin"))


def lora_folder(folder: Path, model: ModelConfig, vision_path: str, base: str, **options) -> Path:
  """What the released fine-tuning leaves: the adapter, non_lora_trainables.bin, config.json, no tokenizer."""
  adapter = mapping.export(arrays(model, "lora", **options), peft.table(model.lora))
  save(folder, adapter, name="adapter_model.bin")
  (folder / "adapter_config.json").write_text(json.dumps(peft.config_file(model.lora, base)))
  save(folder, projector_names(model, "base_model.model.model.", **options), name="non_lora_trainables.bin")
  _, content = decoder(model)
  content = content | OFFICIAL_FIELDS | {"model_type": "llava_llama", "mm_vision_tower": vision_path}
  (folder / "config.json").write_text(json.dumps(content))
  return folder


# Of llava-hf: before transformers 4.52, since then, and since 5.
HF_PREFIXES = {
  "classic": ("vision_tower.vision_model.", "language_model.", "multi_modal_projector."),
  "since 4.52": ("model.vision_tower.vision_model.", "model.language_model.", "model.multi_modal_projector."),
  "since 5": ("model.vision_tower.", "model.language_model.", "model.multi_modal_projector."),
}


def llava_hf_folder(folder: Path, model: ModelConfig, layout: str = "classic", **options) -> Path:
  """A whole LLaVA-1.5 as transformers stores it."""
  vision, vision_content = tower(model.vision)
  family, text = decoder(model)
  vision_prefix, decoder_prefix, projector_prefix = HF_PREFIXES[layout]
  whole = dataclasses.replace(model.vision, select_layer=-1)
  tensors = mapping.export(arrays(model, "vision", layers=whole.layers, **options), vision.table(whole, vision_prefix))
  exported = mapping.export(arrays(model, "decoder", **options), family.table(model.decoder))
  for name, tensor in exported.items():
    if layout == "classic":
      tensors[decoder_prefix + name] = tensor
    else:
      tensors["lm_head.weight" if name == "lm_head.weight" else decoder_prefix + name.removeprefix("model.")] = tensor
  exported = mapping.export(arrays(model, "projector", **options), mlp.table("llava-hf"))
  tensors |= {
    projector_prefix + name.removeprefix("multi_modal_projector."): tensor for name, tensor in exported.items()
  }
  content = {
    "model_type": "llava",
    "vision_config": vision_content,
    "text_config": text,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default" if model.vision.class_token else "full",
    "projector_hidden_act": "gelu",
    "image_token_index": model.decoder.vocab_size - 2,
  }
  return tokenizer(save(folder, tensors, content))


def model(projector: ProjectorConfig = MLP, lora: LoraConfig = LoraConfig(), **parts) -> ModelConfig:
  """A tiny model's configuration."""
  return ModelConfig(
    **dict(vision=tiny.VISION, decoder=tiny.DECODER, dtype="float32", remat="none") | parts,
    projector=projector,
    lora=lora,
  )
