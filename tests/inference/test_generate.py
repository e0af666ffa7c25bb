"""The command line: what it prints where, and what it says to arguments that cannot work."""

import json
import subprocess
import sys
import types

import numpy as np
import pytest
from PIL import Image

from mllm_jax import generate, stream
from mllm_jax.config import ConfigError
from mllm_jax.data.records import DataError, Turn
from mllm_jax.inference import questions
from mllm_jax.inference.engine import Engine
from mllm_jax.inference.requests import Request


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


@pytest.fixture
def asked(tiny, processor, picture):
  """What the engine answers in 6 tokens."""
  row = processor.prompt([Turn("human", "<image>\nHow many?")], [Image.open(picture)])
  return Engine(tiny, processor, rows=1).answer([Request(row, 6)])[0]


def test_prints_the_answer_and_nothing_else(loaded, picture, tmp_path, asked, capsys):
  command = [f"--workdir={tmp_path}", f"--image={picture}", "--prompt=How many?", "--max_new_tokens=6"]
  assert generate.main(command) == 0
  printed = capsys.readouterr()
  assert len(asked.ids) > 1 and printed.out == asked.text + "\n"
  assert f"{tmp_path}: read in" in printed.err
  assert ("cut off" in printed.err) == (len(asked.ids) == 6)


def test_stop_samples_and_pieces(loaded, picture, tmp_path, asked, tiny, processor, capsys):
  end = asked.text[3:5]
  ask = lambda function, **settings: function(tiny, processor, "How many?", [picture], max_new_tokens=6, **settings)
  assert ask(generate, stop=end) == asked.text.partition(end)[0].strip()
  assert "".join(ask(stream)) == asked.text
  drawn = ask(generate, temperature=1.5, num_samples=3, seed=5)
  assert drawn == [ask(generate, temperature=1.5, seed=seed) for seed in (5, 6, 7)] and len(set(drawn)) > 1
  command = [f"--model={tmp_path}", f"--image={picture}", "--prompt=How many?", "--max_new_tokens=6"]
  assert generate.main([*command, "--temperature=1.5", "--num_samples=3", "--seed=5"]) == 0
  assert capsys.readouterr().out == "\n\n".join(drawn) + "\n"
  with pytest.raises(ValueError, match="num_samples is 0"):
    ask(generate, num_samples=0)


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
    (["--num_beams=0"], "--num_beams is 0"),
    (["--num_beams=2", "--temperature=1"], "--num_beams=2 goes with --temperature=0"),
    (["--num_samples=0"], "--num_samples is 0"),
    (["--stop="], "--stop is empty"),
    (["--questions=a"], "give --prompt=TEXT for one question, or --questions"),
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


# ---- files of questions ----------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path, picture):
  """(the questions' file, the answers' file)."""
  rows = [
    {"question_id": "count/a.png", "image": "a.png", "text": "How many?", "category": "default"},
    {"question_id": "count/a.png", "image": "a.png", "text": "Which colour?"},
    {"question_id": 3, "text": "Who are you?"},
  ]
  (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
  return tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"


def command(tmp_path, files):
  return [
    f"--model={tmp_path}",
    f"--questions={files[0]}",
    f"--image_folder={tmp_path}",
    f"--out={files[1]}",
    "--max_new_tokens=4",
    "--batch_size=2",
  ]


def test_a_file_is_answered_and_goes_on_where_it_was(loaded, picture, files, tmp_path, tiny, processor, capsys):
  assert generate.main(command(tmp_path, files)) == 0
  assert "3/3" in capsys.readouterr().err  # the bar
  whole = files[1].read_bytes()
  rows = [json.loads(line) for line in whole.splitlines()]
  assert [(row["question_id"], row["prompt"]) for row in rows] == [
    ("count/a.png", "How many?"),
    ("count/a.png", "Which colour?"),
    (3, "Who are you?"),
  ]
  pictures = [[picture], [picture], []]
  expected = generate(tiny, processor, [row["prompt"] for row in rows], pictures, max_new_tokens=4)
  assert [row["text"] for row in rows] == expected
  assert all(row["model_id"] == tmp_path.name and row["metadata"] == {} for row in rows)
  assert len({row["answer_id"] for row in rows}) == 3

  first = whole.splitlines(keepends=True)[0]
  files[1].write_bytes(first + b'{"question_id": "count/a.png", "prom')  # killed while it wrote
  assert generate.main(command(tmp_path, files)) == 0
  resumed = files[1].read_bytes()
  assert resumed.startswith(first)
  texts = lambda content: [(row["prompt"], row["text"]) for row in map(json.loads, content.splitlines())]
  assert texts(resumed) == texts(whole)
  loaded.load = None  # not asked for again
  assert generate.main(command(tmp_path, files)) == 0
  assert "holds all 3 answers" in capsys.readouterr().err and files[1].read_bytes() == resumed


def test_problems_of_files_are_told_before_any_work(loaded, picture, files, tmp_path, capsys):
  loaded.load = None
  run = lambda: (generate.main(command(tmp_path, files)), capsys.readouterr().err)
  files[1].write_text('{"question_id": 7, "prompt": "Other?", "text": ""}\n')
  status, error = run()
  assert status == 2 and f"--out {files[1]}, line 1: is no answer to question 1" in error
  files[1].unlink()
  for line, message in [
    ('{"question_id": 1, "text": "a", "image": "gone.png"}', "line 1: image "),
    ('{"question_id": 1}', "line 1: must be"),
    ("[]", "line 1: must be"),
    ("{", "line 1: is no JSON"),
    ("", "holds no question"),
  ]:
    files[0].write_text(line)
    status, error = run()
    assert status == 2 and message in error and error.count("\n") == 1, line
    assert not files[1].exists()
  with pytest.raises(DataError, match="no such file"):
    questions.read(str(tmp_path / "nothing"), "")
  (tmp_path / "bytes").write_bytes(b"\x89PNG")
  with pytest.raises(DataError, match="bytes: not UTF-8 text"):
    questions.read(str(tmp_path / "bytes"), "")


def test_only_newlines_end_a_question(tmp_path):
  file, texts = tmp_path / "questions.jsonl", ["a\u2028b", "c\x85d"]
  rows = [json.dumps({"question_id": text, "text": text}, ensure_ascii=False) for text in texts]
  file.write_text("\r\n".join(rows), encoding="utf-8", newline="")
  assert [question.text for question in questions.read(str(file), "")] == texts
