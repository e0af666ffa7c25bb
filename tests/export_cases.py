"""What the tests of exports share: models small enough, tokenizers of every kind, and conversations."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import tiny
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mllm_jax.config import DecoderConfig, ModelConfig, ProjectorConfig, VisionConfig
from mllm_jax.data.records import Turn

VICUNA = ModelConfig(
  vision=tiny.VISION,
  # a head width that does not follow from the width, and another base than every default
  decoder=dataclasses.replace(tiny.DECODER, head_width=8, rope_theta=5000.0, max_positions=512),
  projector=ProjectorConfig(kind="mlp2x_gelu"),
  dtype="float32",
  remat="none",
)
QWEN = ModelConfig(
  # 58 pixels are 4 patches of 14, and 2 pixels that belong to none
  vision=VisionConfig(
    image_size=58,
    width=16,
    layers=3,
    heads=2,
    mlp_width=32,
    activation="gelu_pytorch_tanh",
    norm_eps=1e-6,
    class_token=False,
    patch_bias=True,
    pre_norm=False,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
  ),
  decoder=DecoderConfig(
    vocab_size=400,
    width=16,
    layers=2,
    heads=4,
    kv_heads=2,
    head_width=4,
    mlp_width=32,
    rope_theta=1e6,
    norm_eps=1e-6,
    tied_embeddings=True,
    attention_bias=True,
    max_positions=1024,
  ),
  projector=ProjectorConfig(kind="mlp2x_gelu"),
  dtype="float32",
  remat="none",
)
# By the kind of tokenizer: Vicuna's with both meanings of `legacy`, from tokenizer.model and from tokenizer.json alone;
# the tokenizer.json of before the flag, with a normalizer for the spaces; and Qwen2's.
MODELS = {
  "spm_new": VICUNA,
  "spm_legacy": VICUNA,
  "json_new": VICUNA,
  "json_legacy": VICUNA,
  "json_normalizer": VICUNA,
  "bytes": QWEN,
}
TEMPLATES = dict.fromkeys(MODELS, "vicuna_v1") | {
  "json_new": "mistral_instruct",
  "json_normalizer": "mistral_instruct",
  "bytes": "qwen2_5",
}
PICTURES = {"wide": (91, 40), "tall": (33, 70), "square": (64, 64)}
CONVERSATIONS = {  # turns, pictures, the system's text
  "one turn": ([Turn("human", "<image>\nWhat is in the picture?")], ["wide"], None),
  "several turns": (
    [
      Turn("human", "<image>\nDescribe the colours."),
      Turn("gpt", "Red and blue."),
      Turn("human", "Where?"),
      Turn("gpt", "On the left,\n\nat the top."),
      Turn("human", "Is it 42?"),
    ],
    ["tall"],
    None,
  ),
  "text only": ([Turn("human", "Hello! Who are you?")], [], None),
  "text in turns": ([Turn("human", " Hello "), Turn("gpt", "Hi."), Turn("human", "Bye")], [], None),
  "another system text": ([Turn("human", "<image>\nWhat is it?")], ["square"], "Answer in one word."),
  "no system text": ([Turn("human", "<image>\nWhat is it?")], ["square"], ""),
  "picture only": ([Turn("human", "<image>")], ["square"], None),
  "two pictures": (
    [Turn("human", "<image>\n<image>\nCompare."), Turn("gpt", "Equal."), Turn("human", "Sure?")],
    ["square", "wide"],
    None,
  ),
}
LLAMA_TOKENS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


def pictures() -> dict[str, Image.Image]:
  """Noise, which shows every difference between two ways of resizing."""
  draw = np.random.default_rng(0)
  return {
    name: Image.fromarray(draw.integers(0, 256, (height, width, 3), np.uint8))
    for name, (width, height) in PICTURES.items()
  }


def write_tokenizers(folder: Path) -> dict[str, Path]:
  """{kind: folder of a tokenizer and a config.json}, by the keys of MODELS."""
  folders = {kind: folder / kind for kind in MODELS}
  for kind, path in folders.items():
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"model_type": "qwen2" if kind == "bytes" else "llama"}))
  for legacy, name in ((False, "new"), (True, "legacy")):
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "add_bos_token": True, "pad_token": "<unk>"}
    spm, converted = folders[f"spm_{name}"], folders[f"json_{name}"]
    shutil.copy(tiny.GOLDENS / "tiny_spm.model", spm / "tokenizer.model")
    (spm / "tokenizer_config.json").write_text(json.dumps(config | LLAMA_TOKENS))
    (converted / "tokenizer.json").write_text(converted_json(spm))
    config["tokenizer_class"] += "Fast"
    (converted / "tokenizer_config.json").write_text(json.dumps(config | LLAMA_TOKENS))
  _write_normalizing(folders["json_normalizer"], folders["spm_legacy"])
  _write_bytes(folders["bytes"])
  return folders


def converted_json(folder: Path) -> str:
  """The tokenizer.json of a folder with a tokenizer.model."""
  from transformers import AutoTokenizer

  return AutoTokenizer.from_pretrained(folder).backend_tokenizer.to_str()


def _write_normalizing(folder: Path, source: Path) -> None:
  content = json.loads(converted_json(source))
  prepend = {"type": "Prepend", "prepend": "\u2581"}
  replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
  content |= {"pre_tokenizer": None, "normalizer": {"type": "Sequence", "normalizers": [prepend, replace]}}
  (folder / "tokenizer.json").write_text(json.dumps(content))
  (folder / "tokenizer_config.json").write_text(
    json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **LLAMA_TOKENS})
  )


def _write_bytes(folder: Path) -> None:
  tokenizer = Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  texts = [turn.text for turns, _, _ in CONVERSATIONS.values() for turn in turns]
  trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
  tokenizer.train_from_iterator(texts * 3, trainer)
  special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
  tokenizer.add_special_tokens(special)
  tokenizer.save(str(folder / "tokenizer.json"))
  (folder / "tokenizer_config.json").write_text(
    json.dumps(
      {
        "tokenizer_class": "Qwen2Tokenizer",
        "bos_token": None,
        "unk_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": special[1:],
        "model_max_length": 2000,
      }
    )
  )
