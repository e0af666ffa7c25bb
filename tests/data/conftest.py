"""Tokenizer folders made from the goldens' small SentencePiece model, and other things several tests need."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from PIL import Image

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
