"""Tokenizer folders made from the goldens' small SentencePiece model, and other things several tests need."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from known_samples import make, processor, records, table  # noqa: F401
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from mllm_jax.data import chat

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens" / "sp"


@pytest.fixture(scope="session")
def goldens():
  return GOLDENS


@pytest.fixture(scope="session")
def tokenizer_folders(tmp_path_factory):
  """{legacy flag: folder}."""
  folders = {}
  for legacy in (False, True):
    folder = tmp_path_factory.mktemp(f"tokenizer_legacy_{legacy}")
    shutil.copyfile(GOLDENS / "tiny_spm.model", folder / "tokenizer.model")
    config = {
      "tokenizer_class": "LlamaTokenizer",
      "legacy": legacy,
      "add_bos_token": True,
      "pad_token": "<unk>",
      "unk_token": "<unk>",
      "bos_token": "<s>",
      "eos_token": "</s>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    folders[legacy] = str(folder)
  return folders


@pytest.fixture(scope="session")
def tokenizers(tokenizer_folders):
  """{legacy flag: ChatTokenizer}."""
  return {legacy: chat.load_tokenizer(folder) for legacy, folder in tokenizer_folders.items()}


@pytest.fixture
def write_data(tmp_path):
  """Writes samples (dicts) to a file and noise pictures for every image they name; returns (path, image folder)."""

  def write(samples, name="train.json"):
    folder = tmp_path / "images"
    folder.mkdir(exist_ok=True)
    for number, sample in enumerate(samples):
      paths = sample.get("image") or []
      for path in [paths] if isinstance(paths, str) else paths:
        noise = np.random.default_rng(number).integers(0, 256, (20, 30, 3), np.uint8)
        Image.fromarray(noise).save(folder / path)
    (tmp_path / name).write_text(json.dumps(samples))
    return str(tmp_path / name), str(folder)

  return write


# How Qwen2 and Llama 3 cut texts before their byte-level merges.
WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTE_LEVEL = {  # special tokens, and which of them begins a text and ends an answer
  "qwen2": (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], None, "<|im_end|>"),
  "llama_3": (["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], 0, "<|eot_id|>"),
}


@pytest.fixture(scope="session")
def byte_level_folders(tmp_path_factory):
  """{"qwen2", "llama_3": folder} of small byte-level tokenizers with merges across line breaks."""
  folders = {}
  for name, (special, first, eos) in BYTE_LEVEL.items():
    tokenizer = Tokenizer(models.BPE())
    if name == "qwen2":
      tokenizer.normalizer = normalizers.NFC()  # as the real one has it
    words = pre_tokenizers.Split(Regex(WORDS), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    texts = ["What is in the picture?\n\nThe dog is on the left.\n", "user\n\n  system\n\n\nassistant\n \u00e9\u00e9"]
    tokenizer.train_from_iterator(texts * 9, trainer)
    tokenizer.add_special_tokens(special)
    after = [processors.ByteLevel(trim_offsets=True)]
    if first is not None:
      bos = special[first]
      after.append(processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]))
    tokenizer.post_processor = processors.Sequence(after)
    folder = tmp_path_factory.mktemp(name)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "pad_token": special[0]}
    config |= {} if first is None else {"bos_token": special[first]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    folders[name] = str(folder)
  return folders


@pytest.fixture(scope="session")
def byte_level(byte_level_folders):
  """{"qwen2", "llama_3": ChatTokenizer}."""
  return {name: chat.load_tokenizer(folder) for name, folder in byte_level_folders.items()}
