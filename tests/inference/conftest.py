"""Models with weights, and what makes prompts for them."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_models import GOLDENS, RELEASED, TINY, random_model

from mllm_jax import parameters
from mllm_jax.data import chat
from mllm_jax.data.aspects import Square
from mllm_jax.data.processor import Processor
from mllm_jax.models.mllm import abstract
from mllm_jax.models.projectors import tokens_per_crop
from mllm_jax.weights import clip, llama, spatial
from mllm_jax.weights.io import open_weights
from mllm_jax.weights.mapping import load


@pytest.fixture(scope="session")
def released(tmp_path_factory):
  """(the released model, the golden arrays)."""
  golden = dict(np.load(GOLDENS / "e2e_crop_dfi.npz"))
  language = dict(np.load(GOLDENS / "llama_mha.npz"))
  folder, flat = tmp_path_factory.mktemp("weights"), {}
  _, targets = parameters.flatten(abstract(RELEASED))
  parts = [
    ("clip.", "vision/", golden, clip.table(RELEASED.vision)),
    ("w.", "decoder/", language, llama.table(RELEASED.decoder)),
    ("w.", "projector/", golden, spatial.table(RELEASED.projector, RELEASED.vision.grid)),
  ]
  for prefix, ours, arrays, table in parts:
    file = folder / f"{ours[:-1]}.safetensors"
    save_file({name[len(prefix) :]: array for name, array in arrays.items() if name.startswith(prefix)}, file)
    flat |= load(open_weights(file), table, {path: target for path, target in targets.items() if path.startswith(ours)})
  graphdef, _ = parameters.flatten(abstract(RELEASED))
  return parameters.unflatten(graphdef, flat), golden


@pytest.fixture(scope="session")
def tiny():
  """A random model whose greedy answers vary."""
  return random_model(TINY)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tokenizer")
  shutil.copyfile(GOLDENS / "tiny_spm.model", folder / "tokenizer.model")
  (folder / "tokenizer_config.json").write_text(
    json.dumps(
      {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": False,
        "add_bos_token": True,
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
      }
    )
  )
  (folder / "config.json").write_text('{"model_type": "llama"}')
  return str(folder)


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder):
  return chat.load_tokenizer(tokenizer_folder)


@pytest.fixture(scope="session")
def processor(tokenizer):
  return Processor(tokenizer, Square(TINY.vision, tokens_per_crop(TINY)), "vicuna_v1", 256, 1)
