"""Two real processes of four CPU devices: what they decide, read and write together, and how they end together."""

import errno
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from pair import ARRAY, loop, state_of
from processes import environment, free_port

from mllm_jax import distributed, sharding
from mllm_jax.config import ConfigError, MeshConfig
from mllm_jax.data.records import DataError
from mllm_jax.run_control import Stopped, status_of
from mllm_jax.training.checkpoint import CheckpointError, Checkpoints

KERNEL = "decoder/layers/q_proj/kernel"


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, list[dict]]:
  """The folder of two processes, and what each of them saw."""
  folder, port = tmp_path_factory.mktemp("pair"), free_port()
  one = Checkpoints(folder / "of_one")
  one.save(state_of(ARRAY, 5), {})
  one.wait()
  command = [sys.executable, str(Path(__file__).parent / "pair.py"), str(folder)]
  processes = [
    subprocess.Popen(command, env=environment(i, port), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for i in range(2)
  ]
  texts = [process.communicate(timeout=200)[0] for process in processes]
  assert [process.returncode for process in processes] == [0, 0], texts
  return folder, [json.loads((folder / f"{i}.json").read_text()) for i in range(2)]


def test_processes_decide_the_same(pair):
  for seen in pair[1]:
    assert seen["devices"] == 8 and seen["gathered"] == "ééé1" and seen["largest"] == 7
    assert seen["first says"] is True and seen["flags"] == [0, 3]


def test_each_process_makes_its_share_of_the_rows(pair):
  for seen in pair[1]:
    # All rows once, though those of a process do not lie side by side; or the same rows made by both.
    assert seen["rows"] == [list(range(8)), [0, 1]]


def test_what_goes_wrong_in_one_process_ends_both_and_is_said_by_process_0(pair):
  first, second = pair[1]
  assert first["agreed"] == [2, "process 1: sample 3 is bad"] and second["agreed"] == [2, "sample 3 is bad"]
  assert first["shared folder"] is None and second["shared folder"] is None
  assert second["own folder"][0] == 2 and "must lie on a file system that all hosts share" in second["own folder"][1]
  assert first["own folder"] == [2, "process 1: " + second["own folder"][1]]
  assert first["no room"][0] == 1 and first["no room"][1].startswith("process 1: ")
  assert "a checkpoint needs" in second["no room"][1]


def test_both_processes_stop_after_the_same_step_with_everything_saved(pair):
  first, second = pair[1]
  assert first["bad sample"] == ["1 process 1: sample 4 is bad", [3], [1, 2, 3]]
  assert second["bad sample"] == ["1 sample 4 is bad", [3], [1, 2, 3]]
  assert first["signal"] == second["signal"] == ["15", [3], [1, 2, 3]]
  # The number that cannot be written is seen when the next step's batch has been agreed on.
  assert second["full disk"] == ["1 ", [5], [1, 2, 3, 4, 5]]
  assert first["full disk"][0].startswith("1 metrics.jsonl: No space left on device") and first["full disk"][1] == [5]
  assert first["to the end"] == second["to the end"] == ["0", [8], list(range(1, 9))]


def test_one_process_stops_and_fails_alike():
  mesh = sharding.make_mesh(MeshConfig())
  assert loop(mesh) == ["0", [8], list(range(1, 9))]
  assert loop(mesh, signal_at=4) == ["15", [3], [1, 2, 3]]  # a signal is heard before the next step
  assert loop(mesh, bad_at=1, expected=DataError) == ["sample 1 is bad", [0], []]
  assert loop(mesh, bad_at=4, expected=DataError) == ["sample 4 is bad", [3], [1, 2, 3]]
  end, saved, reported = loop(mesh, full_at=4, expected=OSError)
  assert "No space left on device" in end and (saved, reported) == ([4], [1, 2, 3])


def test_what_an_error_means_for_the_run():
  full, lost = OSError(errno.ENOSPC, "No space left on device", "log"), OSError(errno.EIO, "Input/output error")
  errors = [ConfigError("a"), DataError("b"), Stopped(143, "c"), CheckpointError("d"), full]
  assert [status_of(error) for error in errors] == [2, 2, 143, 1, 1]
  assert status_of(lost) == status_of(RuntimeError("e")) == status_of(ValueError("f")) == 0
  assert distributed.explain(full).startswith("log: No space left on device; what was saved before is still there")
  assert distributed.explain(ValueError("f")) == "ValueError: f"


def test_each_process_reads_its_slices_only(pair):
  for seen in pair[1]:
    assert seen["read"] == 2 * ARRAY.nbytes // 2  # half of two arrays
    assert seen["largest piece"] == ARRAY.nbytes // 8  # a device's, of all layers
    np.testing.assert_allclose(seen["sums"], [ARRAY.astype("bfloat16").astype(np.float64).sum()] * 2, rtol=1e-6)


def test_checkpoints_of_one_process_and_of_two(pair):
  folder, both = pair
  total = ARRAY.sum(dtype=np.float64) + ARRAY[0, 0].sum()
  for seen in both:
    np.testing.assert_allclose([seen["restored"], seen["moments"]], [total, 2 * total], rtol=1e-6)
  assert both[0]["read alone"] == ARRAY[1, 1, 1]
  checkpoints = Checkpoints(folder / "of_two")
  restored = checkpoints.restore(7, state_of(0 * ARRAY))
  assert checkpoints.latest() == 7 and checkpoints.meta(7) == {"made by": "two"} and int(restored.step) == 7
  np.testing.assert_array_equal(restored.trainable[KERNEL], ARRAY)
  np.testing.assert_array_equal(restored.optimizer[KERNEL], 2 * ARRAY)


# ---- finding each other ----------------------------------------------------------------------------------------------

PLAIN = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234", "JAX_NUM_PROCESSES": "16", "JAX_PROCESS_ID": "3"}
TASK = {
  "SLURM_JOB_ID": "4097",
  "SLURM_STEP_NODELIST": "gpu[017-020,033],login",
  "SLURM_NTASKS": "8",
  "SLURM_PROCID": "5",
  "SLURM_LOCALID": "1",
}


def test_plain_variables():
  assert distributed.variables({"PATH": "x"}) is None
  expected = {"coordinator_address": "10.0.0.1:1234", "num_processes": 16, "process_id": 3}
  assert distributed.variables(PLAIN) == expected


@pytest.mark.parametrize(
  "change, words",
  [
    ({"JAX_PROCESS_ID": ""}, "JAX_NUM_PROCESSES is set and JAX_PROCESS_ID is not"),
    ({"JAX_COORDINATOR_ADDRESS": ""}, "JAX_COORDINATOR_ADDRESS is not; set all of them, or none"),
    ({"JAX_COORDINATOR_ADDRESS": "10.0.0.1"}, "must be host:port"),
    ({"JAX_PROCESS_ID": "16"}, "JAX_PROCESS_ID=16 must be one of 0 ... JAX_NUM_PROCESSES - 1, and that is 16"),
    ({"JAX_NUM_PROCESSES": "many"}, "JAX_PROCESS_ID=3"),
  ],
)
def test_plain_variables_that_do_not_fit(change, words):
  with pytest.raises(ConfigError, match=words):
    distributed.variables(PLAIN | change)


@pytest.mark.parametrize(
  "change, devices",
  [
    ({"SLURM_STEP_TASKS_PER_NODE": "1(x8)"}, None),  # one task a node, with all of its GPUs
    ({"SLURM_STEP_TASKS_PER_NODE": "2(x4)"}, [1]),
    ({"SLURM_STEP_TASKS_PER_NODE": "2(x4)", "CUDA_VISIBLE_DEVICES": "0,1"}, [1]),
    ({"SLURM_STEP_TASKS_PER_NODE": "2(x4)", "CUDA_VISIBLE_DEVICES": "1"}, None),  # --gpus-per-task=1
  ],
)
def test_a_task_of_slurm(change, devices):
  found = distributed.slurm(TASK | change)
  assert found.pop("local_device_ids", None) == devices
  assert found == {"coordinator_address": "gpu017:61441", "num_processes": 8, "process_id": 5}


def test_slurm_without_a_step_or_with_another_port():
  assert distributed.slurm({name: TASK[name] for name in ("SLURM_JOB_ID", "SLURM_NTASKS")}) is None
  # salloc's shell is a step of one task, whatever the job has
  assert distributed.slurm(TASK | {"SLURM_STEP_NUM_TASKS": "1"})["num_processes"] == 1
  given = {"JAX_COORDINATOR_PORT": "7", "SLURM_STEP_NODELIST": "a-1,a-2"}
  assert distributed.slurm(TASK | given)["coordinator_address"] == "a-1:7"


@pytest.mark.parametrize("error", [None, ValueError("coordinator_address should be defined.")])
def test_on_a_tpu_jax_finds_the_others(monkeypatch, error):
  calls = []

  def initialize(**given):
    calls.append(given)
    if error:
      raise error

  monkeypatch.setattr(jax.distributed, "initialize", initialize)
  distributed.start(9)
  assert calls == []
  monkeypatch.setenv("TPU_ML_PLATFORM", "JAX")
  distributed.start(9)
  assert calls == []  # JAX_PLATFORMS=cpu
  platforms = jax.config.jax_platforms
  try:
    jax.config.update("jax_platforms", "tpu,cpu")
    distributed.start(9)
  finally:
    jax.config.update("jax_platforms", platforms)
  assert calls == [{"initialization_timeout": 69}]


def test_others_that_do_not_come_are_waited_for_so_long():
  port = free_port()
  code = "from mllm_jax import distributed; distributed.start(1)"
  result = subprocess.run([sys.executable, "-c", code], env=environment(1, port), capture_output=True, text=True)
  assert result.returncode == 1, result.stderr
  assert f"process 1 of 2, coordinator 127.0.0.1:{port}: not all processes were there after 1 s" in result.stderr
  assert "JAX_COORDINATOR_ADDRESS" in result.stderr and "JAX_PROCESS_ID" in result.stderr
