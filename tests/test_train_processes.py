"""The trainer in two real processes of four devices, in one of eight, and in one of one: the same losses, whoever takes
over from whom."""

import json
import re
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
from processes import environment, free_port

from mllm_jax import sharding, train

STEPS = 20
OPTIONS = (
  "--config.stages=pretrain",
  f"--config.pretrain.steps={STEPS}",
  "--config.checkpoint_every=4",
  # What is compiled quickest: other models are compared on one process' devices.
  "--config.model.projector.kind=mlp2x_gelu",
  "--config.model.remat=none",
)
BARE = ("--config.evaluation.path=", "--config.save_model=False")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
  path = tmp_path_factory.mktemp("tiny")
  tiny.write_all(path)
  return path


def arguments(folder: Path, workdir: Path, options: tuple[str, ...]) -> list[str]:
  return [f"--config={folder / 'recipe.py'}", f"--workdir={workdir}", *OPTIONS, *options]


def run_here(folder: Path, workdir: Path, devices: int, *options: str) -> int:
  """The exit status of a run in this process on some of its devices."""
  make, handlers = sharding.make_mesh, [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sharding, "make_mesh", lambda config: make(config, jax.devices()[:devices]))
    try:
      return train.main(["train", *arguments(folder, workdir, options)])
    finally:
      for number, handler in zip((signal.SIGTERM, signal.SIGINT), handlers):
        signal.signal(number, handler)


def start_pair(folder: Path, workdir: Path, *options: str, data: int = 2) -> list[subprocess.Popen]:
  port = free_port()
  command = [sys.executable, "-m", "mllm_jax.train", *arguments(folder, workdir, options), f"--config.mesh.data={data}"]
  return [
    subprocess.Popen(
      command, env=environment(index, port), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder
    )
    for index in range(2)
  ]


def rows(workdir: Path) -> list[dict]:
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines if line.endswith("}")]


def check_losses(workdir: Path, expected: Path) -> None:
  """Of all steps; sums are added up in other orders on other meshes."""
  found, wanted = (
    {key: [row[key] for row in rows(path) if "loss" in row] for key in ("step", "loss", "grad_norm")}
    for path in (workdir, expected)
  )
  assert found["step"] == wanted["step"] == list(range(1, STEPS + 1))
  np.testing.assert_allclose(found["loss"], wanted["loss"], rtol=1e-5)
  np.testing.assert_allclose(found["grad_norm"], wanted["grad_norm"], rtol=1e-3)


@pytest.fixture(scope="module")
def one_process(folder) -> Path:
  """A run of one process with eight devices that nothing interrupted, with all of its checkpoints."""
  workdir = folder / "one"
  assert run_here(folder, workdir, 8, *BARE, "--config.keep_checkpoints=9") == 0
  return workdir


def up_to(step: int, run: Path, workdir: Path) -> Path:
  """A copy of a run that was killed after a checkpoint."""
  shutil.copytree(run, workdir)
  for path in (workdir / "pretrain" / "checkpoints").iterdir():
    if path.name.isdecimal() and int(path.name) > step:
      shutil.rmtree(path)
  return workdir


def test_losses_are_the_same_whoever_takes_over(folder, one_process):
  """One process of eight devices, then two of four, of which one is told to stop, then one of one."""
  workdir = up_to(4, one_process, folder / "relay")
  processes = start_pair(folder, workdir, *BARE)
  while all(process.poll() is None for process in processes) and rows(workdir)[-1]["step"] not in range(6, 20):
    time.sleep(0.05)
  processes[1].send_signal(signal.SIGTERM)
  (first, error), (second, quiet) = (process.communicate(timeout=200) for process in processes)
  assert [process.returncode for process in processes] == [128 + signal.SIGTERM] * 2, error + quiet
  said = re.search(r"error: pretrain: saved after step (\d+) of 20; the same command continues", error)
  assert said and "8 cpu device(s) of 2 processes (data 2 x fsdp 4 x tensor 1)" in first, first + error
  assert "continuing after step 4" in first
  assert not [line for line in (second + quiet).splitlines() if line.strip() and "[Gloo]" not in line]
  stopped = int(said[1])
  assert (workdir / "pretrain" / "checkpoints" / str(stopped)).is_dir()
  assert rows(workdir)[-1]["step"] == stopped < STEPS

  assert run_here(folder, workdir, 1, *BARE) == 0
  check_losses(workdir, one_process)


@pytest.mark.long
def test_two_processes_finish_a_run(folder, one_process):
  """What comes after the last step: the questions and the finished model, as one process has them."""
  single, double = (up_to(16, one_process, folder / name) for name in ("single", "double"))
  assert run_here(folder, single, 1) == 0
  processes = start_pair(folder, double)
  texts = [process.communicate(timeout=300) for process in processes]
  assert [process.returncode for process in processes] == [0, 0], texts
  check_losses(double, one_process)
  answers = [json.loads((path / "pretrain" / "evaluation.json").read_text()) for path in (single, double)]
  assert answers[0] == answers[1]
  from mllm_jax.weights.io import open_weights

  one, two = (open_weights(path / "model") for path in (single, double))
  assert one.names() == two.names()
  for name in one.names():
    # Adam's first steps are the gradient's sign, also where that is all rounding.
    np.testing.assert_allclose(one.read(name), two.read(name), atol=1e-3)


@pytest.mark.long
def test_an_axis_tensor_runs_through_both(folder, one_process):
  """Both make the same rows, and each has half of every product."""
  workdir = up_to(16, one_process, folder / "tensor")
  processes = start_pair(folder, workdir, *BARE, "--config.mesh.fsdp=1", "--config.mesh.tensor=8", data=1)
  texts = [process.communicate(timeout=300) for process in processes]
  assert [process.returncode for process in processes] == [0, 0], texts
  assert "8 cpu device(s) of 2 processes (data 1 x fsdp 1 x tensor 8)" in texts[0][0]
  check_losses(workdir, one_process)


@pytest.mark.long
@pytest.mark.parametrize("batching", ["pack", "group"])
def test_rows_of_several_lengths_are_shared(folder, batching):
  options = (*BARE, f"--config.pretrain.data.batching={batching}", "--config.pretrain.steps=4")
  alone, shared = folder / f"{batching}-alone", folder / f"{batching}-shared"
  assert run_here(folder, alone, 8, *options) == 0
  processes = start_pair(folder, shared, *options)
  texts = [process.communicate(timeout=300) for process in processes]
  assert [process.returncode for process in processes] == [0, 0], texts
  losses = [[row["loss"] for row in rows(path) if "loss" in row] for path in (alone, shared)]
  assert len(losses[0]) == 4
  np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.long
def test_a_problem_that_the_others_do_not_know_of_ends_them_too(folder, one_process):
  workdir = up_to(16, one_process, folder / "killed")
  processes = start_pair(folder, workdir, *BARE)
  while all(process.poll() is None for process in processes) and rows(workdir)[-1]["step"] != 17:
    time.sleep(0.05)
  processes[0].kill()
  assert processes[1].wait(timeout=150) not in (0, None)
