"""`python -m mllm_jax.data check` on a data set with everything wrong that it looks for."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from mllm_jax.data.__main__ import main


def turns(*values):
  return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


@pytest.fixture
def data(tmp_path):
  """(path, image folder): thirteen samples."""
  folder = tmp_path / "images"
  folder.mkdir()
  noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8))
  noise.save(folder / "good.jpg")
  noise.save(folder / "other.png")
  (folder / "html.jpg").write_text("<html>")
  content = (folder / "good.jpg").read_bytes()
  (folder / "cut.jpg").write_bytes(content[: len(content) // 2])
  (folder / "zero.jpg").write_bytes(b"")
  Image.fromarray(np.zeros((4, 4), np.uint16)).save(folder / "deep.png")
  Image.new("RGB", (100, 1)).save(folder / "strip.png")
  Image.new("RGB", (100_000, 1)).save(folder / "long.png")
  q = "<image>\nQ"
  samples = [
    {"image": "good.jpg", "conversations": turns(q, "A")},
    {"image": "other.jpg", "conversations": turns(q, "A")},
    {"image": "html.jpg", "conversations": turns(q, "A")},
    {"image": "cut.jpg", "conversations": turns(q, "A")},
    {"image": "zero.jpg", "conversations": turns(q, "A")},
    {"image": "deep.png", "conversations": turns(q, "A")},
    {"image": "strip.png", "conversations": turns(q, "A")},
    {"image": "long.png", "conversations": turns(q, "A")},
    {"image": "none.jpg", "conversations": turns(q, "A")},
    {"image": "good.jpg", "conversations": turns("Q", "A")},
    {"conversations": turns("Q", "A", "Q", "")},
    {"conversations": turns("Q", "")},
    {"conversations": "Q"},
    {"conversations": turns("Q", "a long answer " * 100)},
    {"conversations": turns("a long question " * 100, "A")},
  ]
  (tmp_path / "train.json").write_text(json.dumps([{"id": f"s{i}", **sample} for i, sample in enumerate(samples)]))
  return str(tmp_path / "train.json"), str(folder)


UNUSABLE = [
  (2, "corrupt image"),
  (3, "corrupt image"),
  (4, "corrupt image"),
  (7, "extreme shape"),
  (8, "missing image"),
  (9, "placeholders"),
  (11, "no answer"),
  (12, "structure"),
  (14, "nothing to train on"),
]
NOTES = [
  (1, "other extension"),
  (5, "odd mode"),
  (6, "extreme shape"),
  (7, "extreme shape"),
  (10, "empty answer"),
  (13, "truncated"),
]


@pytest.mark.parametrize("processes", [1, 2])
def test_everything_is_found(data, tokenizer_folder, tmp_path, capsys, processes, monkeypatch):
  monkeypatch.setattr("mllm_jax.data_commands.check.SAMPLES", 2)
  path, folder = data
  out = tmp_path / "found.jsonl"
  arguments = ["check", f"--path={path}", f"--image_folder={folder}", f"--llm={tokenizer_folder}", f"--out={out}"]
  status = main([*arguments, "--max_length=200", "--tokens_per_image=9", f"--processes={processes}"])
  found = [json.loads(line) for line in out.read_text().splitlines()]
  assert [(each["index"], each["kind"]) for each in found if each["unusable"]] == UNUSABLE
  assert [(each["index"], each["kind"]) for each in found if not each["unusable"]] == NOTES
  assert [each["index"] for each in found] == sorted(each["index"] for each in found)
  assert status == 1
  printed = capsys.readouterr().out
  assert (
    "unusable  corrupt image                 3" in printed and "note      truncated                     1" in printed
  )
  assert f"{path}, sample 8 ('s8'): image {folder}/none.jpg is missing; restore the file" in printed
  assert f"15 samples, 9 of them unusable; all in {out}" in printed


def test_good_data_and_no_model(data, tmp_path, capsys):
  path, folder = data
  samples = json.loads(open(path).read())[:2]
  (tmp_path / "good.jsonl").write_text("\n".join(json.dumps(sample) for sample in samples))
  assert main(["check", f"--path={tmp_path / 'good.jsonl'}", f"--image_folder={folder}", "--processes=1"]) == 0
  printed = capsys.readouterr().out
  assert "lengths were not looked at; name the language model's folder with --llm" in printed
  assert "2 samples, 0 of them unusable" in printed


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory):
  """A workdir with the demo's data, which the commands then need not write."""
  from mllm_jax.demo.write import write as write_demo

  folder = tmp_path_factory.mktemp("demo")
  write_demo(folder / "data", seed=0)
  return folder


def test_a_recipe_names_the_data_and_the_model(demo_folder, capsys):
  recipe = ["--config=configs/sp_cropping.py:demo", f"--workdir={demo_folder}", "--processes=1"]
  assert main(["check", *recipe, "--stage=pretrain"]) == 0
  first = capsys.readouterr().out
  assert "lengths were not" not in first and " 0 of them unusable" in first
  assert main(["check", *recipe, "--config.finetune.data.mix=(('nowhere.json','','0.5'),)"]) == 2
  assert "nowhere.json: no such file" in capsys.readouterr().err


def test_pictures_that_are_cut_into_slices_take_the_places_of_their_size(tmp_path):
  for name, size in (("one", (112, 112)), ("four", (224, 224)), ("thin", (1000, 1))):
    Image.new("RGB", size).save(tmp_path / f"{name}.png")
  samples = [{"image": f"{name}.png", "conversations": turns("<image>\nQ", "A")} for name in ("one", "four", "thin")]
  (tmp_path / "train.json").write_text(json.dumps(samples))
  out = tmp_path / "found.jsonl"
  arguments = ["check", "--config=configs/uhd_v2.py:demo", f"--path={tmp_path / 'train.json'}", f"--out={out}"]
  arguments += [f"--image_folder={tmp_path}", "--processes=1"]

  def unusable(*options):
    assert main([*arguments, *options]) == 1
    found = [json.loads(line) for line in out.read_text().splitlines()]
    return [(each["index"], each["kind"], each["text"]) for each in found if each["unusable"]]

  (thin,) = unusable("--max_length=256")
  assert thin[:2] == (2, "extreme shape") and "1000 x 1 pixels is too thin" in thin[2]
  one, four, _ = unusable("--max_length=2")
  length = lambda each: int(each[2].split()[1])
  # 16 tokens of the whole picture; with slices 16 for each of five crops, eight newlines and a comma.
  assert one[1] == four[1] == "nothing to train on" and length(four) - length(one) == 5 * 16 + 9 - 16
  assert (1, "too many images") in [each[:2] for each in unusable("--max_length=256", "--max_images=4")]
  one, *_ = unusable("--max_length=2", "--config.finetune.data.enlarge=1.0")
  assert length(one) == length(four)  # the small picture is brought to as many slices


def test_the_command_line(capsys):
  assert main([]) == 0
  listed = capsys.readouterr().out
  assert "  check " in listed and "  prepare " in listed and "settings" not in listed
  assert main(["chekc"]) == 2
  assert main(["check"]) == 2
  assert "which data? name a recipe with --config=FILE" in capsys.readouterr().err
  assert main(["check", "--path=x.json", "--config.seed=1"]) == 2
  assert "--config.seed=1 overrides a recipe; name it with --config=FILE" in capsys.readouterr().err
  assert main(["check", "--path=none.json"]) == 2
  command = [sys.executable, "-m", "mllm_jax.data", "check", "--help"]
  result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"})
  assert result.returncode == 0 and "--image_folder" in result.stdout


@pytest.mark.parametrize("command", ["check", "prepare", "show", "stats"])
def test_all_commands_name_their_data_alike(command, tmp_path, demo_folder, capsys, monkeypatch):
  monkeypatch.setenv("COLUMNS", "200")
  with pytest.raises(SystemExit):
    main([command, "--help"])
  shown = capsys.readouterr().out
  for option in (
    "config",
    "stage",
    "workdir",
    "path",
    "image_folder",
    "template",
    "max_length",
    "image_aspect",
    "seed",
  ):
    assert f"--{option}" in shown
  out = [f"--out={tmp_path / 'out'}"] if command != "stats" else []
  assert main([command, "--path=none.json", "--config.seed=1", *out]) == 2
  assert "--config.seed=1 overrides a recipe" in capsys.readouterr().err
  recipe = ["--config=configs/sp_cropping.py:demo", f"--workdir={demo_folder}"]
  assert main([command, *recipe, "--config.finetune.data.mix=(('nowhere.json','','0.5'),)", *out]) == 2
  assert "nowhere.json: no such file" in capsys.readouterr().err
