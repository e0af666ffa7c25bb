"""The trainer as a user runs it: a whole run, runs that are killed and started again, and everything that can be put
wrong."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny
from PIL import Image
from processes import xla_flags

import mllm_jax
from mllm_jax import build, run_control, train

REPOSITORY = Path(__file__).parents[1]
# One device; the same for all runs, as losses are compared to the last bit.
ENVIRONMENT = os.environ | {
  "XLA_FLAGS": xla_flags(1),
  "PYTHONPATH": str(REPOSITORY),
  "JAX_PLATFORMS": "cpu",
}


def start(folder: Path, workdir: Path, *options: str) -> subprocess.Popen:
  command = [
    sys.executable,
    "-m",
    "mllm_jax.train",
    f"--config={folder / 'recipe.py'}",
    f"--workdir={workdir}",
    *options,
  ]
  return subprocess.Popen(
    command, env=ENVIRONMENT, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  )


def rows(workdir: Path) -> list[dict]:
  path = workdir / "metrics.jsonl"
  lines = path.read_text().splitlines() if path.is_file() else []
  return [json.loads(line) for line in lines if line.endswith("}")]


def losses(workdir: Path) -> list[tuple]:
  return [(row["stage"], row["step"], row["loss"], row["grad_norm"]) for row in rows(workdir) if "loss" in row]


def last_model(workdir: Path):
  """What a run's last checkpoint and its towers hold, and the model that they make."""
  stored, config = build.open_run(str(workdir))
  return stored, build.put(stored, stored.config(config.model.dtype), None, None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
  path = tmp_path_factory.mktemp("tiny")
  tiny.write_all(path)
  return path


@pytest.fixture(scope="module")
def finished(folder) -> tuple[Path, str]:
  """(workdir, what was printed) of a run that nothing interrupted."""
  process = start(folder, folder / "finished")
  out, err = process.communicate()
  assert process.returncode == 0, err
  return folder / "finished", out


def test_a_whole_run(finished):
  workdir, out = finished
  assert [row[:2] for row in losses(workdir)] == [("pretrain", i) for i in range(1, 13)] + [
    ("finetune", i) for i in range(1, 11)
  ]
  evaluations = [row for row in rows(workdir) if "eval/exact_match" in row]
  assert [row["stage"] for row in evaluations] == ["pretrain", "finetune"]
  first = rows(workdir)[0]
  assert set(first) == {
    "stage",
    "step",
    "loss",
    "learning_rate",
    "grad_norm",
    "tokens",
    "skipped",
    "skipped_in_row",
    "samples_per_s",
    "tokens_per_s",
    "tflops_per_s",
  }
  assert first["tflops_per_s"] > 0
  assert first["learning_rate"] == 0.0 and rows(workdir)[1]["learning_rate"] == pytest.approx(1e-2)
  for text in ("frozen", "decoder/layers (LoRA)", "all trained", "done in", "ask it"):
    assert text in out
  assert (workdir / "report.html").stat().st_size > 10_000
  assert list((workdir / "tensorboard").iterdir())
  assert len(list((workdir / "finetune" / "checkpoints").iterdir())) == 2  # keep_checkpoints


def test_a_checkpoint_holds_the_trainable_half_and_restores_to_the_same_model(finished, folder):
  workdir, _ = finished
  stored, model = last_model(workdir)
  assert (stored.manifest.run["stage"], stored.manifest.run["step"]) == ("finetune", 10)
  assert stored.manifest.template == "vicuna_v1"
  saved = ocp.PyTreeCheckpointer().metadata(workdir / "finetune" / "checkpoints" / "10" / "state").item_metadata.tree
  assert set(saved) == {"step", "trainable", "optimizer", "skipped", "skipped_in_row"}
  assert all(path.startswith("projector/") or "/lora/" in path for path in saved["trainable"])
  assert sum(np.prod(array.shape) for array in saved["trainable"].values()) == 6200  # as in the table of parameters
  embedding = np.asarray(model.decoder.embedding[...])
  from mllm_jax.weights.io import open_weights

  np.testing.assert_array_equal(embedding, open_weights(folder / "llama").read("model.embed_tokens.weight"))


def test_a_run_killed_again_and_again_ends_with_the_same_losses(folder, finished):
  workdir, rng = folder / "killed", random.Random(0)
  for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, None):
    process = start(folder, workdir)
    seen, limit = len(rows(workdir)), rng.randint(3, 7)
    while number is not None and process.poll() is None and len(rows(workdir)) < seen + limit:
      time.sleep(0.02)
    if number is not None:
      process.send_signal(number)
    out, err = process.communicate()
    expected = {signal.SIGKILL: -9, signal.SIGTERM: 128 + 15, None: 0}[number]
    assert process.returncode == expected, err
    if number == signal.SIGTERM:
      assert "the same command continues" in err
  assert "continuing after step" in out
  assert losses(workdir) == losses(finished[0])


def test_a_finished_run_started_again_only_reports(folder, finished):
  before = losses(finished[0])
  process = start(folder, finished[0])
  out, err = process.communicate()
  assert process.returncode == 0 and "done in" in out, err
  assert losses(finished[0]) == before


def fail(capsys, folder: Path, *options: str, workdir: str = "wrong", recipe: str = "recipe.py") -> str:
  """The message of a run that must end with status 2."""
  argv = ["train", f"--config={folder / recipe}", f"--workdir={folder / workdir}", *options]
  status = train.main(argv)
  error = capsys.readouterr().err
  assert status == 2, error
  assert error.startswith("error: ") and "Traceback" not in error
  return error


@pytest.mark.parametrize(
  "options, words",
  [
    (["--config.pretrain.nope=3"], "no field 'nope'; StageConfig has data, lora, parameters"),
    (["--config.seed=abc"], "--config.seed=abc: invalid literal for int"),
    (["--nope=3"], "Unknown command line flag 'nope'"),
    (["stray"], "'stray' is no option"),
    (["--config.stages=finetune,pretrain"], "must be some of vdim,pretrain,finetune, in this order"),
    (["--config.evaluation.stages=vdim"], "evaluation.stages='vdim' must be pretrain, finetune"),
    (["--config.stages=finetune"], "run --config.stages=pretrain first"),
    (["--config.pretrain.batch_size=9"], "pretrain.batch_size=9 does not divide"),
    (["--config.mesh.fsdp=3"], "does not make up the 8 devices"),
    (
      ["--config.pretrain.parameters=(('vision/.*', 0.0), ('projector/.*', 0.1))"],
      "decoder/embedding is matched by no rule",
    ),
    (["--config.pretrain.parameters=(('.*', 0.1), ('projector/.*', 0.1))"], "is matched by 2 rules"),
    (["--config.model.projector.stride=3"], "projector.stride=3 does not fit a grid of 4"),
    (["--config.model.projector.dfi_kernel=5"], "projector.dfi_kernel=5 does not fit a grid of 4"),
    (["--config.model.vision=nowhere"], "model.vision = nowhere"),
    (["--config.pretrain.data.path=nowhere.json"], "pretrain.data.path = nowhere.json"),
    (["--config.pretrain.data.template=vicuna"], "unknown template 'vicuna'"),
    (["--config.pretrain.data.max_length=1"], "pretrain.data.max_length=1 must be 2 or more"),
    (["--config.model.remat=all"], "model.remat='all'"),
    (["--workdir=gs://bucket/run"], "--workdir=gs://bucket/run: checkpoints go to a local folder"),
    (["--config.model.vision=~/nowhere"], f"model.vision = {Path.home() / 'nowhere'}"),
    (["--config.model.dtype=bf16"], "model.dtype='bf16' is unknown; known: bfloat16, float32"),
    (["--config.model.frozen_dtype=int8"], "model.frozen_dtype='int8' is unknown"),
    (["--config.model.vision="], "model.vision = (empty)"),
    (["--config.pretain.steps=3"], "--config.pretain.steps=3: there is no field 'pretain'; Config has name, demo"),
    (["--config.seed=-1"], "seed=-1 must be between 0 and 4294967295"),
    (["--config.evaluation.batch_size=0"], "evaluation.batch_size=0 must be 1 or more"),
    (["--config.pretrain.warmup_ratio=nan"], "pretrain.warmup_ratio=nan must be between 0 and 1"),
    (["--config.pretrain.beta2=1.0"], "pretrain.beta2=1.0 must be at least 0 and below 1"),
    (["--config.pretrain.eps=0"], "pretrain.eps=0.0 must be 1e-30 or more"),
    (["--config.finetune.lora.rank=-1"], "finetune.lora.rank=-1 must be 0 or more"),
    (["--config.finetune.lora.targets=('q_prj', 'k_proj')"], "finetune.lora.targets=('q_prj', 'k_proj') must be some"),
    (["--config.pretrain.parameters=(('projector/(', 1.0),)"], "('projector/(', 1.0) is one of its rows"),
    (["--config.pretrain.parameters=(('projector/.*', -1.0),)"], "('projector/.*', -1.0) is one of its rows"),
    (["--config.pretrain.parameters=('projector/.*', 1.0)"], "'projector/.*' is one of its rows"),
    (
      ["--config.finetune.parameters=(('(?!.*lora).*', 0.0), ('.*lora.*', 0.1))"],
      "finetune.parameters freezes projector/dfi/kernel, which pretrain trains",
    ),
    (["--config.checkpoint_every=0"], "config.checkpoint_every=0 must be 1 or more"),
    (["--config.evaluation.max_new_tokens=0"], "evaluation.max_new_tokens=0 must be 1 or more"),
  ],
)
def test_what_a_user_may_get_wrong(folder, capsys, options, words):
  assert words in fail(capsys, folder, *options)


@pytest.mark.parametrize(
  "options, words",
  [
    (["--config.finetune.data.template=vicuna"], "unknown template 'vicuna'"),
    (["--config.finetune.lora.rank=0"], "the rule 'decoder/.*/lora/[ab]' matches no parameter"),
    (["--config.finetune.batch_size=1000", "--config.finetune.accumulation=1"], "do not fill a batch of 1000"),
    (["--config.finetune.data.max_length=20"], "finetune.json, sample"),  # less than its visual tokens
    (["--config.evaluation.path={folder}/llama/tokenizer.model"], "tokenizer.model"),
    (["--config.evaluation.image_folder={folder}"], "heldout.json, sample 0 ('heldout-00000'): image"),
  ],
)
def test_what_a_later_stage_would_stumble_over_is_found_before_the_first(folder, capsys, options, words):
  assert words in fail(capsys, folder, *(option.format(folder=folder) for option in options), workdir="early")
  assert not (folder / "early" / "pretrain").exists()


def test_a_missing_recipe(folder, capsys):
  assert "no such file" in fail(capsys, folder, recipe="other.py")
  assert "no such file; the recipes are in" in fail(capsys, folder, "--config.seed=1", recipe="other.py")


def test_a_workdir_that_another_run_works_in(folder, capsys):
  (folder / "taken").mkdir()
  with run_control.lock(folder / "taken"):
    assert "taken: another run is under way there" in fail(capsys, folder, workdir="taken")
    assert os.listdir(folder / "taken") == [run_control.LOCK]


def test_a_demo_leaves_data_that_are_not_its_own(tmp_path, capsys):
  (tmp_path / "data").mkdir()
  (tmp_path / "data" / "mine.json").touch()
  recipe = REPOSITORY / "configs" / "llava15.py"
  assert train.main(["train", f"--config={recipe}:demo", f"--workdir={tmp_path}"]) == 2
  assert "not written here" in (error := capsys.readouterr().err) and error.count("\n") == 1
  assert os.listdir(tmp_path / "data") == ["mine.json"]


def test_a_workdir_that_cannot_be_made(folder, capsys):
  assert "recipe.py: File exists; name a folder that can be made" in fail(capsys, folder, workdir="recipe.py")


def test_a_folder_that_is_no_hugging_face_model(folder, capsys):
  (folder / "empty").mkdir(exist_ok=True)
  assert f"{folder / 'empty'}" in fail(capsys, folder, f"--config.model.llm={folder / 'empty'}")
  assert "is a CLIP vision tower and holds no decoder" in fail(capsys, folder, f"--config.model.llm={folder / 'clip'}")


def broken_data(folder: Path, change) -> str:
  """The path of a copy of pretrain.json whose second sample `change` has altered."""
  samples = json.loads((folder / "data" / "pretrain.json").read_text())
  change(samples[1])
  path = folder / "broken.json"
  path.write_text(json.dumps(samples))
  return f"--config.pretrain.data.path={path}"


@pytest.mark.parametrize(
  "change, words",
  [
    (lambda sample: sample.update(image="gone.png"), "gone.png"),
    (lambda sample: sample.update(image=[sample["image"]] * 2), "2 images"),
    (lambda sample: sample["conversations"][1].update(value=""), "train"),
    (lambda sample: sample.update(conversations=[]), "turn"),
  ],
)
def test_bad_samples_are_found_before_training(folder, capsys, change, words):
  error = fail(capsys, folder, broken_data(folder, change))
  assert "broken.json, sample 1 ('caption-00001')" in error and words in error


def test_an_unreadable_image_ends_the_run_with_everything_saved(folder):
  (folder / "broken.png").write_bytes(b"no picture")
  option = broken_data(folder, lambda sample: sample.update(image="../broken.png"))
  process = start(folder, folder / "unreadable", option, "--config.pretrain.steps=20")
  _, err = process.communicate()
  assert process.returncode == 1 and "Traceback" not in err, err
  assert "broken.png" in err and "sample 1 ('caption-00001')" in err
  steps = [int(path.name) for path in (folder / "unreadable" / "pretrain" / "checkpoints").iterdir()]
  assert max(steps) == len(losses(folder / "unreadable"))  # up to the step before the one that needs it


def test_a_checkpoint_of_another_run_is_not_continued(folder, finished, capsys):
  error = fail(
    capsys, folder, "--config.model.projector.conv_width=16", "--config.pretrain.weight_decay=0.1", workdir="finished"
  )
  assert "model.projector.conv_width: 8 in the checkpoint, 16 now" in error
  assert "recipe.weight_decay: 0.0 in the checkpoint, 0.1 now" in error and "another --workdir" in error


def test_weights_that_changed_since_the_checkpoint(folder, finished, tmp_path, capsys):
  copied = tmp_path / "run"
  shutil.copytree(finished[0], copied)
  shutil.rmtree(copied / "finetune")
  tiny.write_towers(tmp_path / "others", seed=7)
  error = fail(capsys, folder, f"--config.model.llm={tmp_path / 'others' / 'llama'}", workdir=str(copied))
  assert "fingerprints.llm" in error


def test_losses_that_are_not_finite_stop_the_run_after_the_configured_number(folder):
  process = start(
    folder,
    folder / "diverged",
    "--config.pretrain.parameters=(('vision/.*', 0.), ('decoder/.*', 0.), ('projector/.*', 1e38))",
    "--config.max_nonfinite=2",
    "--config.stages=pretrain",
  )
  _, err = process.communicate()
  assert process.returncode == 1 and "2 steps in a row" in err, err
  lost = [json.loads(line) for line in (folder / "diverged" / "pretrain" / "nonfinite.jsonl").read_text().splitlines()]
  assert [row["step"] for row in lost] == [lost[0]["step"], lost[0]["step"] + 1] and len(lost[0]["ids"]) == 8
  assert all(name.startswith("caption-") for name in lost[0]["ids"])
  saved = max(int(path.name) for path in (folder / "diverged" / "pretrain" / "checkpoints").iterdir())
  assert saved - lost[1]["step"] in (0, 1)  # one more step may be under way when the numbers of the second arrive


def test_the_finished_model_needs_no_other_file(finished, folder, tmp_path):
  """It gives the logits of the run, after it was moved and with the towers out of reach."""
  import jax.numpy as jnp

  from mllm_jax import build

  workdir, _ = finished
  assert build.finished(str(workdir))
  _, trained = last_model(workdir)
  alone = tmp_path / "alone"
  shutil.copytree(workdir / "model", alone)
  for name in ("clip", "llama"):
    (folder / name).rename(folder / f"{name}.away")
  try:
    model, processor = mllm_jax.load(str(alone))
    from_workdir, _ = mllm_jax.load(str(workdir))
  finally:
    for name in ("clip", "llama"):
      (folder / f"{name}.away").rename(folder / name)
  batch = processor(["What is there?"], [[Image.new("RGB", (90, 60), (10, 20, 90))]])
  expected = trained.logits(batch)
  assert model.config.lora.rank == 4 and model.config.dtype == "float32"
  np.testing.assert_array_equal(model.logits(batch), expected)
  np.testing.assert_array_equal(from_workdir.logits(batch), expected)
  assert jnp.abs(expected).max() > 0
  manifest = json.loads((alone / "mllm_jax.json").read_text())
  assert manifest["run"]["stage"] == "finetune" and manifest["sources"]["vision"]["path"] == str(folder / "clip")
  assert len(manifest["sources"]["decoder"]["fingerprint"]) == 16


def test_generate_answers_from_a_workdir(finished, folder):
  Image.new("RGB", (90, 60), (10, 20, 90)).save(folder / "picture.png")
  command = [
    sys.executable,
    "-m",
    "mllm_jax.generate",
    f"--workdir={finished[0]}",
    f"--image={folder / 'picture.png'}",
    "--prompt=What is there?",
    "--max_new_tokens=4",
  ]
  first, second = (
    subprocess.run(command, env=ENVIRONMENT, cwd=REPOSITORY, capture_output=True, text=True) for _ in range(2)
  )
  assert first.returncode == 0, first.stderr
  assert first.stdout == second.stdout and "read in" in first.stderr
