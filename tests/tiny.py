"""A run small enough for tests: Hugging Face folders of random tiny towers, digits data, and a configuration over
them."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from mllm_jax import parameters, recipes
from mllm_jax.config import (
  Config,
  DataConfig,
  DecoderConfig,
  EvaluationConfig,
  LoraConfig,
  ModelRecipe,
  ProjectorConfig,
  StageConfig,
  VisionConfig,
)
from mllm_jax.demo import write
from mllm_jax.models.decoder import Decoder
from mllm_jax.models.vision import VisionTower
from mllm_jax.weights import clip, llama, mapping

GOLDENS = Path(__file__).parent / "goldens" / "sp"
VISION = VisionConfig(image_size=56, patch_size=14, width=16, layers=3, heads=2, mlp_width=32)
DECODER = DecoderConfig(vocab_size=520, width=16, layers=2, heads=4, kv_heads=2, head_width=4, mlp_width=32)
PROJECTOR = ProjectorConfig(stride=1, dfi_kernel=2, conv_width=8)


def write_towers(folder: Path, seed: int = 0) -> tuple[str, str]:
  """Random towers as Hugging Face folders with a tokenizer: (vision folder, llm folder)."""
  vision, llm = folder / "clip", folder / "llama"
  vision.mkdir(parents=True)
  llm.mkdir()
  tower = VisionTower(VisionConfig(**vars(VISION) | {"select_layer": -1}), dtype="float32", rngs=nnx.Rngs(seed))
  arrays = {f"vision/{path}": np.asarray(value) for path, value in parameters.flatten(tower)[1].items()}
  save_file(mapping.export(arrays, clip.table(tower.config)), vision / "model.safetensors")
  (vision / "config.json").write_text(
    json.dumps(
      {
        "model_type": "clip_vision_model",
        "hidden_size": VISION.width,
        "intermediate_size": VISION.mlp_width,
        "num_hidden_layers": VISION.layers,
        "num_attention_heads": VISION.heads,
        "image_size": VISION.image_size,
        "patch_size": VISION.patch_size,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": VISION.norm_eps,
      }
    )
  )

  decoder = Decoder(DECODER, LoraConfig(), dtype="float32", remat="none", rngs=nnx.Rngs(seed + 1))
  arrays = {f"decoder/{path}": np.asarray(value) for path, value in parameters.flatten(decoder)[1].items()}
  save_file(mapping.export(arrays, llama.table(DECODER)), llm / "model.safetensors")
  (llm / "config.json").write_text(
    json.dumps(
      {
        "model_type": "llama",
        "vocab_size": DECODER.vocab_size,
        "hidden_size": DECODER.width,
        "intermediate_size": DECODER.mlp_width,
        "num_hidden_layers": DECODER.layers,
        "num_attention_heads": DECODER.heads,
        "num_key_value_heads": DECODER.kv_heads,
        "head_dim": DECODER.head_width,
        "rms_norm_eps": DECODER.norm_eps,
        "rope_theta": DECODER.rope_theta,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
      }
    )
  )
  shutil.copy(GOLDENS / "tiny_spm.model", llm / "tokenizer.model")
  (llm / "tokenizer_config.json").write_text(
    json.dumps(
      {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": False,
        "add_bos_token": True,
        "pad_token": "<unk>",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
      }
    )
  )
  return str(vision), str(llm)


def write_data(folder: Path) -> None:
  write.write(
    folder, seed=0, sizes=write.Sizes(captions=40, conversations=40, turns=2, heldout_pictures=3, heldout_questions=2)
  )


def config(folder: Path, **changes) -> Config:
  """A run of 12 and 10 steps over what the functions above wrote into `folder`."""
  data = str(folder / "data")
  stage = dict(batch_size=8, steps=12)
  result = Config(
    name="tiny",
    model=ModelRecipe(
      vision=str(folder / "clip"),
      llm=str(folder / "llama"),
      projector=dataclasses.replace(PROJECTOR),
      dtype="float32",
      frozen_dtype="float32",
      remat="full",
    ),
    pretrain=StageConfig(
      data=DataConfig(path=f"{data}/pretrain.json", image_folder=data, template="plain", max_length=128),
      parameters=recipes.parameter_table(1e-2),
      **stage,
    ),
    finetune=StageConfig(
      data=DataConfig(path=f"{data}/finetune.json", image_folder=data, max_length=256),
      accumulation=2,
      lora=LoraConfig(rank=4, alpha=8.0, dropout=0.05),
      parameters=recipes.parameter_table(1e-2, 1e-2),
      **stage | {"steps": 10, "batch_size": 16},
    ),
    evaluation=EvaluationConfig(path=f"{data}/heldout.json", image_folder=data, batch_size=8, max_new_tokens=3),
    log_every=1,
    checkpoint_every=3,
    loader_threads=2,
  )
  for name, value in changes.items():
    part, _, field = name.rpartition("__")
    setattr(getattr(result, part) if part else result, field, value)
  return result


def write_all(folder: Path) -> None:
  write_towers(folder)
  write_data(folder / "data")
  (folder / "recipe.py").write_text(
    f'"""The tiny run."""\nimport sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n'
    f"from pathlib import Path\nimport tiny\n\n\ndef get_config(variant=''):\n"
    f"  return tiny.config(Path({str(folder)!r}))\n"
  )
