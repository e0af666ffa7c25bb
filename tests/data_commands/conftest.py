import json
import pathlib
import shutil

import pytest

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens" / "sp"


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
  """A language model's folder with nothing but its tokenizer."""
  folder = tmp_path_factory.mktemp("tokenizer")
  shutil.copyfile(GOLDENS / "tiny_spm.model", folder / "tokenizer.model")
  config = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True, "pad_token": "<unk>"}
  config |= {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
  (folder / "tokenizer_config.json").write_text(json.dumps(config))
  (folder / "config.json").write_text('{"model_type": "llama"}')
  return str(folder)
