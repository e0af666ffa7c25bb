"""The stage vdim as a user runs it, and what the stages after it start from."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from processes import environment, free_port, xla_flags
from safetensors.numpy import load_file, save_file

from mllm_jax import build, parameters, preflight, recipes, sharding, train, train_vdim
from mllm_jax.config import ConfigError, DataConfig, LoraConfig, ProjectorConfig, VdimStage
from mllm_jax.models.mllm import abstract
from mllm_jax.weights import vdim_file
from mllm_jax.weights.errors import WeightsError
from mllm_jax.weights.io import open_weights

REPOSITORY = Path(__file__).parents[1]
PROJECTOR = ProjectorConfig(kind="hiwin", levels=(0, 1), query_grid=2, head_width=8)


def config(folder: Path):
  result = tiny.config(folder, stages="vdim", checkpoint_every=10)
  result.model.projector = dataclasses.replace(PROJECTOR)  # a test's options change it
  for stage in (result.pretrain, result.finetune):
    trained = tuple(row for row in stage.parameters if row[0] != recipes.PROJECTOR)
    stage.parameters = (*trained, ("projector/pyramid/.*", 0.0), ("projector/resampler/.*", 1e-2))
    stage.steps = 2
  result.evaluation.path = ""
  result.vdim = VdimStage(
    data=DataConfig(path=str(folder / "data" / "pictures")),
    batch_size=2,
    steps=100,
    jitters=1,
    projected=4,
    crf_samples=5,
    clip_steps=2,
  )
  return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
  path = tmp_path_factory.mktemp("vdim")
  tiny.write_all(path)
  (path / "recipe.py").write_text(
    f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    "from pathlib import Path\nimport test_train_vdim\n"
    f"def get_config(variant=''):\n  return test_train_vdim.config(Path({str(path)!r}))\n"
  )
  return path


def start(folder: Path, workdir: Path, *options: str, variables: dict[str, str] | None = None) -> subprocess.Popen:
  alone = os.environ | {"XLA_FLAGS": xla_flags(1), "PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"}
  command = [sys.executable, "-m", "mllm_jax.train", f"--config={folder / 'recipe.py'}", f"--workdir={workdir}"]
  return subprocess.Popen(
    command + list(options),
    env=variables or alone,
    cwd=REPOSITORY,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def rows(workdir: Path) -> list[dict]:
  path = workdir / "metrics.jsonl"
  return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.is_file() else []


def losses(workdir: Path) -> list[tuple]:
  return [(row["step"], row["loss"], row["grad_norm"]) for row in rows(workdir) if "loss" in row]


@pytest.fixture(scope="module")
def finished(folder) -> tuple[Path, str]:
  """(workdir, what was printed) of a run that nothing interrupted."""
  process = start(folder, folder / "finished")
  out, err = process.communicate()
  assert process.returncode == 0, err
  return folder / "finished", out


def test_a_whole_run(finished):
  workdir, out = finished
  assert [step for step, _, _ in losses(workdir)] == list(range(1, 101))
  assert {"rec_2x", "crf_2x", "tokens", "samples_per_s"} <= set(rows(workdir)[0])
  for words in (
    "4,003 images, 100 steps of 2",
    "heads/downsamplers",
    "projector/pyramid",
    "frozen",
    "of bilinear upsampling",
  ):
    assert words in out
  assert "ask it" not in out and not (workdir / "model").exists()
  errors = rows(workdir)[-1]
  assert {"error/trained_2x", "error/untrained_2x", "error/bilinear_2x"} <= set(errors)
  report = (workdir / "report.html").read_text()
  assert "Reconstruction at 2x" in report and "1 views of each image" in report
  file = workdir / "vdim" / "vdim.safetensors"
  about = vdim_file.about(file)
  assert about["levels"] == "1" and about["width"] == "16" and about["tower"].startswith("clip ")
  arrays = load_file(file)
  assert all(name.startswith("projector/pyramid/") and x.dtype == np.float32 for name, x in arrays.items())
  assert sum(x.size for x in arrays.values()) == 6233 + 16 * 16 + 16  # the paper's stage, and the last correction


@pytest.mark.long
def test_a_run_that_was_killed_ends_with_the_same_parameters(folder, finished):
  workdir = folder / "killed"
  process = start(folder, workdir)
  while process.poll() is None and not (workdir / "vdim" / "checkpoints" / "10").is_dir():
    time.sleep(0.02)
  process.send_signal(signal.SIGKILL)
  process.communicate()
  process = start(folder, workdir)
  out, err = process.communicate()
  assert process.returncode == 0 and "continuing after step" in out, (out, err)
  assert losses(workdir) == losses(finished[0])
  found, expected = (load_file(vdim_file.in_run(each)) for each in (workdir, finished[0]))
  for name, array in expected.items():
    np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.mark.long
def test_two_processes_find_the_same_errors(folder):
  options = ("--config.vdim.batch_size=8", "--config.vdim.steps=2")
  port, double = free_port(), folder / "double"
  runs = [start(folder, folder / "single", *options)]
  runs += [start(folder, double, *options, "--config.mesh.data=2", variables=environment(i, port)) for i in range(2)]
  texts = [process.communicate(timeout=300) for process in runs]
  assert [process.returncode for process in runs] == [0, 0, 0], texts
  found, wanted = (rows(path)[-1] for path in (double, folder / "single"))
  errors = [key for key in wanted if key.startswith("error/")]
  assert len(errors) == 3
  # Two steps of the optimizer from sums in another order.
  np.testing.assert_allclose([found[key] for key in errors], [wanted[key] for key in errors], rtol=1e-3)


def test_all_three_stages_and_the_finished_model_have_the_same_vdim(folder, finished):
  """The later stages keep it frozen, so it is in none of their checkpoints."""
  workdir = folder / "three"
  shutil.copytree(finished[0], workdir)
  process = start(folder, workdir, "--config.stages=vdim,pretrain,finetune")
  out, err = process.communicate()
  assert process.returncode == 0, (out[-3000:], err[-3000:])
  assert (
    "starts from noise" not in out
    and [row["stage"] for row in rows(workdir)][-4:] == ["pretrain"] * 2 + ["finetune"] * 2
  )
  expected = load_file(vdim_file.in_run(finished[0]))
  stored, _ = build.open_run(str(workdir))
  for tensors in (stored.tensors, open_weights(workdir / "model")):
    for name, array in expected.items():
      np.testing.assert_array_equal(tensors.read(name), array, err_msg=name)


def settle(folder: Path, workdir: Path, **model):
  """(what settle_vdim gives, the wanted shapes) for the stage pretrain in a workdir."""
  recipe = config(folder)
  recipe.stages = "pretrain"
  for name, value in model.items():
    setattr(recipe.model, name, value)
  architecture = build.architecture(recipe.model, LoraConfig())
  shapes = parameters.flatten(abstract(architecture))[1]
  mesh = sharding.make_mesh(recipe.mesh, jax.devices()[:1])
  path = train_vdim.settle_vdim(recipe, workdir, architecture, shapes, mesh)
  rates = {name: 0.0 if name.startswith("projector/pyramid/stages") else 1.0 for name in shapes}
  recipe.model.frozen_dtype = "bfloat16"
  return path, path and train_vdim.placed_vdim(path, recipe.model, shapes, rates, mesh)


def test_later_stages_read_what_the_stage_left(folder, finished, tmp_path):
  expected = load_file(vdim_file.in_run(finished[0]))
  path, found = settle(folder, finished[0])
  assert path == vdim_file.in_run(finished[0]) and found.keys() == expected.keys()
  for name, array in found.items():
    frozen = name.startswith("projector/pyramid/stages")
    assert array.dtype == ("bfloat16" if frozen else "float32")
    np.testing.assert_array_equal(array, expected[name].astype(array.dtype))

  # Another run is given it by name, and keeps a copy.
  given = str(path)
  copied, found = settle(folder, tmp_path / "other", vdim_weights=given)
  assert copied == tmp_path / "other" / "vdim" / "vdim.safetensors"
  np.testing.assert_array_equal(
    found["projector/pyramid/fixup_proj/0/bias"], expected["projector/pyramid/fixup_proj/0/bias"]
  )
  assert settle(folder, tmp_path / "other", vdim_weights=given)[0] == copied
  changed = tmp_path / "changed.safetensors"
  save_file({name: np.asarray(array + 1) for name, array in expected.items()}, changed)
  with pytest.raises(ConfigError, match="is another VDIM than model.vdim_weights"):
    settle(folder, tmp_path / "other", vdim_weights=str(changed))


def test_vdim_that_is_not_there_or_of_another_model(folder, finished, tmp_path, capsys):
  path, found = settle(folder, tmp_path / "a")
  assert "VDIM starts from noise" in capsys.readouterr().out and path.is_file()
  again = settle(folder, tmp_path / "b")[1]
  for name, array in found.items():
    np.testing.assert_array_equal(array, again[name])
  given = str(vdim_file.in_run(finished[0]))
  assert settle(folder, tmp_path / "c", projector_weights="some.bin")[0] is None  # it brings its own
  with pytest.raises(WeightsError, match="VDIM of 1 levels above the tower.s, and .* need one of 2"):
    settle(
      folder, tmp_path / "d", vdim_weights=given, projector=ProjectorConfig(kind="hiwin", levels=(0, 2), head_width=8)
    )
  foreign = tmp_path / "foreign.safetensors"
  save_file({"upsampler.up1.range_temp": np.zeros((), np.float32)}, foreign)
  with pytest.raises(WeightsError, match="foreign.safetensors does not fit the model"):
    settle(folder, tmp_path / "e", vdim_weights=str(foreign))
  shutil.copytree(finished[0] / "vdim" / "checkpoints", tmp_path / "f" / "vdim" / "checkpoints")
  with pytest.raises(ConfigError, match="the stage vdim is not finished"):
    settle(folder, tmp_path / "f")


@pytest.mark.parametrize(
  "options, words",
  [
    (["--config.stages=pretrain,vdim"], "must be some of vdim,pretrain,finetune, in this order"),
    (["--config.vdim.batch_size=9"], "vdim.batch_size=9 does not divide"),
    (["--config.vdim.jitters=0"], "vdim.jitters=0 must be 1 or more"),
    (["--config.vdim.optimizer=sgd"], "vdim.optimizer='sgd' is unknown; known: nadam, adam"),
    (["--config.vdim.normalisation=none"], "known: imagenet, clip"),
    (["--config.vdim.supervision=first"], "known: all, last"),
    (["--config.vdim.learning_rate=0.0"], "vdim.learning_rate=0.0 must be above 0"),
    (["--config.vdim.data.path=nowhere"], "vdim.data.path = nowhere"),
    (["--config.model.projector.pyramid=bilinear", "--config.vdim.batch_size=8"], "pyramid='bilinear'"),
  ],
)
def test_what_a_user_may_get_wrong(folder, capsys, options, words):
  argv = ["train", f"--config={folder / 'recipe.py'}", f"--workdir={folder / 'wrong'}", "--config.vdim.batch_size=8"]
  assert train.main(argv + options) == 2
  error = capsys.readouterr().err
  assert words in error and "Traceback" not in error


def test_a_finished_stage_is_not_continued_as_another(folder, finished, capsys):
  argv = ["train", f"--config={folder / 'recipe.py'}", f"--workdir={finished[0]}"]
  assert train.main(argv + ["--config.vdim.learning_rate=0.01", "--config.vdim.batch_size=8"]) == 2
  error = capsys.readouterr().err
  assert "recipe.learning_rate: 0.001 in the checkpoint, 0.01 now" in error and "another --workdir" in error


def test_stages_in_order():
  recipe = config(Path("x"))
  for stages in ("vdim", "vdim,pretrain", "vdim, pretrain, finetune", "vdim,finetune", "finetune"):
    recipe.stages = stages
    assert preflight.stage_names(recipe) == [name.strip() for name in stages.split(",")]
  for stages in ("", "pretrain,vdim", "vdim,vdim", "all"):
    recipe.stages = stages
    with pytest.raises(ConfigError, match="in this order"):
      preflight.stage_names(recipe)
