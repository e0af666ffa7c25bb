"""The command line: what it prints where, and what it says to arguments that cannot work."""

import subprocess
import sys
import types

import numpy as np
import pytest
from PIL import Image

from mllm_jax import generate
from mllm_jax.config import ConfigError
from mllm_jax.data.processor import collate
from mllm_jax.data.records import Turn
from mllm_jax.inference.engine import Engine
from mllm_jax.inference.text import Detokenizer


@pytest.fixture
def picture(tmp_path):
  path = tmp_path / "a.png"
  Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)).save(path)
  return str(path)


@pytest.fixture
def loaded(tiny, processor, monkeypatch):
  """Lets `load` give the tiny model."""
  module = types.ModuleType("mllm_jax.build")
  module.load = lambda path: (tiny, processor)
  monkeypatch.setitem(sys.modules, "mllm_jax.build", module)
  return module


def test_prints_the_answer_and_nothing_else(loaded, picture, tmp_path, tiny, processor, capsys):
  assert generate.main([f"--workdir={tmp_path}", f"--image={picture}", "--prompt=How many?", "--max_new_tokens=6"]) == 0
  printed = capsys.readouterr()
  batch = collate([processor.prompt([Turn("human", "<image>\nHow many?")], [Image.open(picture)])])
  ids = Engine(tiny, processor.tokenizer.eos_id).generate(batch, 6)[0]
  assert len(ids) > 1
  text = Detokenizer(processor.tokenizer.decode)  # random ids hold broken bytes, which decode shows otherwise
  assert printed.out == "".join(map(text.push, ids)) + text.finish() + "\n"
  assert f"{tmp_path}: read in" in printed.err
  assert ("cut off" in printed.err) == (len(ids) == 6)


@pytest.mark.parametrize(
  "arguments, message",
  [
    (["--workdir=/no/such/folder"], "--model /no/such/folder: no such folder"),
    (["--prompt= "], "--prompt is empty"),
    (["--prompt=<image>\n"], "--prompt is empty"),
    (["--temperature=-1"], "--temperature is -1.0"),
    (["--temperature=hot"], "--temperature"),
    (["--top_p=0"], "--top_p is 0.0"),
    (["--top_p=1.5"], "--top_p is 1.5"),
    (["--top_k=-2"], "--top_k is -2"),
    (["--max_new_tokens=0"], "--max_new_tokens is 0"),
    (["--seed=-1"], "--seed is -1"),
    (["--seed=4294967296"], "--seed is 4294967296"),
    (["--nonsense=1"], "--nonsense=1"),
  ],
)
def test_arguments_out_of_range(arguments, message, tmp_path, capsys):
  with pytest.raises(SystemExit) as stop:
    generate.main([f"--workdir={tmp_path}", "--prompt=hm", *arguments])
  printed = capsys.readouterr()
  assert stop.value.code == 2 and printed.out == ""
  assert message in printed.err and printed.err.count("\n") == 1


@pytest.mark.parametrize(
  "make, message",
  [
    (lambda path: None, "no such file"),
    (lambda path: path.write_text("no picture"), "cannot be read as a picture"),
    (lambda path: path.mkdir(), "no such file"),
  ],
)
def test_pictures_that_cannot_be_read(make, message, tmp_path, capsys):
  make(tmp_path / "b.png")
  assert generate.main([f"--workdir={tmp_path}", "--prompt=hm", f"--image={tmp_path / 'b.png'}"]) == 2
  error = capsys.readouterr().err
  assert f"b.png: {message}" in error and error.count("\n") == 1


def test_two_pictures(loaded, picture, tmp_path, tiny, processor, capsys):
  command = [f"--model={tmp_path}", "--prompt=Which?", *[f"--image={picture}"] * 2, "--max_new_tokens=3"]
  assert generate.main(command) == 0
  expected = generate(tiny, processor, "Which?", [picture, picture], max_new_tokens=3)
  assert capsys.readouterr().out.strip() == expected != ""


def test_a_folder_without_checkpoint(loaded, picture, tmp_path, capsys):
  def load(path):
    raise ConfigError(f"{path} holds no checkpoint")

  loaded.load = load
  assert generate.main([f"--workdir={tmp_path}", "--prompt=hm"]) == 2
  assert capsys.readouterr().err == f"error: {tmp_path} holds no checkpoint\n"


def test_placeholders():
  assert generate.with_placeholders("q", 2) == "<image>\n<image>\nq"
  assert generate.with_placeholders("<image> q", 1) == "<image> q"
  with pytest.raises(ValueError, match="1 times, and --image names 2"):
    generate.with_placeholders("<image> q", 2)


def test_mistakes_are_told_before_anything_heavy_is_imported():
  code = (
    "import sys\nfrom mllm_jax import generate\n"
    "try: generate.main(['--workdir=/no/such/folder', '--prompt=a'])\nexcept SystemExit: pass\n"
    "assert not {'jax', 'flax', 'tokenizers', 'transformers'} & set(sys.modules)"
  )
  assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
