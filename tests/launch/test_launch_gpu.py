"""gpu_local.sh and slurm.sbatch with a fake srun, scontrol and trainer; the flags of XLA with the real one."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
from fake_cloud import LAUNCH, TRAINING


@pytest.fixture
def checkout(tmp_path):
  """A repository of its own, without .venv."""
  shutil.copytree(LAUNCH, tmp_path / "checkout/launch")
  return tmp_path / "checkout"


def test_gpu_local_runs_one_process_for_the_cards(cloud, checkout):
  python = cloud.folder / "bin/python3"
  python.parent.mkdir()
  python.write_text('#!/bin/bash\nprintf "%s\\0" "$CUDA_VISIBLE_DEVICES" "$XLA_FLAGS" "$@"\nexit 7\n')
  python.chmod(0o755)
  call = [checkout / "launch/gpu_local.sh", "--gpus=0,3"]
  path = f"{python.parent}:/usr/bin:/bin"
  done = cloud.run(*call, *TRAINING, PATH=path, XLA_FLAGS="--xla_mine=1")
  cards, flags, *arguments = done.stdout.split("\0")[:-1]
  assert (done.returncode, cards, arguments) == (7, "0,3", ["-m", "mllm_jax.train", *TRAINING])
  assert flags.endswith(" --xla_mine=1")  # the last one wins
  shown = cloud.run(*call, "--dry-run", *TRAINING, PATH=path).stdout
  assert shlex.split(shown)[-6:] == ["python3", "-m", "mllm_jax.train", *TRAINING]


def slurm(cloud, checkout, plan: str, **environment):
  cloud.put("plan", plan)
  spooled = cloud.folder / "slurm_script"  # Slurm runs a copy
  shutil.copy(checkout / "launch/slurm.sbatch", spooled)
  job = dict(SLURM_JOB_ID="41", SLURM_SUBMIT_DIR=str(checkout), SLURM_CPUS_ON_NODE="48")
  command = ["bash", spooled, *TRAINING]
  return subprocess.Popen(command, env=cloud.environment | job | environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("status", [0, 1, 143])
def test_slurm_starts_a_process_a_node_and_hands_on_its_status(cloud, checkout, status):
  assert slurm(cloud, checkout, f"exit={status}").wait(timeout=20) == status
  flags, *words = (cloud.folder / "srun").read_text().split("\0")[:-1]
  assert "latency_hiding" in flags
  assert words == [
    "--ntasks-per-node=1",
    "--cpus-per-task=48",
    "--kill-on-bad-exit=1",
    "python3",
    "-m",
    "mllm_jax.train",
    *TRAINING,
  ]
  assert not cloud.calls  # nothing is queued again


def test_slurm_queues_the_job_again_when_its_time_is_over(cloud, checkout):
  job = slurm(cloud, checkout, "waits")
  for _ in range(200):
    if (cloud.folder / "told").exists():
      break
    time.sleep(0.05)
  job.send_signal(signal.SIGUSR1)
  assert job.wait(timeout=20) == 0
  assert cloud.calls == ["scancel --signal=TERM 41.0", "scontrol requeue 41"]


def test_slurm_must_be_called_in_the_repository(cloud, checkout):
  done = cloud.run("bash", checkout / "launch/slurm.sbatch", *TRAINING, SLURM_SUBMIT_DIR="/usr")
  assert done.returncode == 2 and "/usr is not the root of the repository" in done.stderr


# ---- flags of XLA ----------------------------------------------------------------------------------------------------


def flags(cloud, chip: str, variable: str) -> str:
  done = cloud.run("bash", "-c", f"source {LAUNCH}/xla_flags.sh; xla_flags {chip}; echo ${variable}")
  assert done.returncode == 0, done.stderr
  return done.stdout.strip()


def test_flags_for_gpus_are_known_to_xla(cloud):
  """XLA ends the process at a name it does not know."""
  environment = dict(os.environ, JAX_PLATFORMS="cpu", XLA_FLAGS=flags(cloud, "gpu", "XLA_FLAGS"))
  assert "--xla_gpu_" in environment["XLA_FLAGS"]
  subprocess.run([sys.executable, "-c", "import jax; jax.devices()"], env=environment, check=True, capture_output=True)


def test_flags_for_tpus_are_known_to_libtpu(cloud):
  pytest.importorskip("libtpu")
  names = {chip: flags(cloud, f"{chip} 2", "LIBTPU_INIT_ARGS") for chip in ("v4", "v5e", "v5p", "v6e")}
  assert all(names.values())
  describe = "from jax.experimental import topologies as t; t.get_topology_desc('v5e:2x2', 'tpu')"
  for value in sorted(set(names.values())):
    environment = dict(os.environ, JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    environment["LIBTPU_INIT_ARGS"] = value
    subprocess.run([sys.executable, "-c", describe], env=environment, check=True, capture_output=True)


def test_an_unknown_chip_has_no_flags(cloud):
  done = cloud.run("bash", "-c", f"source {LAUNCH}/xla_flags.sh; xla_flags v9")
  assert done.returncode == 2 and "unknown chip 'v9'" in done.stderr
