"""Checkpoints: exact, never half, and a full disk that loses nothing."""

import collections
import errno
import shutil

import jax
import numpy as np
import pytest
from steps import Training, make_batch

from mllm_jax.config import MeshConfig
from mllm_jax.training.checkpoint import CheckpointError, Checkpoints, Trained
from mllm_jax.training.step import TrainState


def arrays(state):
  return [np.asarray(x) for x in jax.tree.leaves(state)]


def test_restores_exactly_also_onto_another_mesh(tmp_path):
  training = Training()
  training.step(make_batch(8))
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(training.state, {"samples": 3})
  checkpoints.wait()
  saved = arrays(training.state)
  other = Training(MeshConfig(data=1, fsdp=4, tensor=2), devices=8)
  restored = checkpoints.restore(1, other.state)
  assert all((a == b).all() for a, b in zip(saved, arrays(restored), strict=True))
  kernel = "projector/sfe/kernels/3"
  assert restored.trainable[kernel].sharding == other.state.trainable[kernel].sharding
  assert checkpoints.meta(1) == {"samples": 3}


def test_the_next_steps_do_not_reach_into_a_checkpoint_that_is_being_written(tmp_path):
  training = Training(warmup_ratio=0.0)
  training.step(make_batch(4))
  before = arrays(training.state)
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(training.state, {})
  for seed in range(3):
    training.step(make_batch(4, seed))  # donates the buffers that are being written
  checkpoints.wait()
  assert all((a == b).all() for a, b in zip(before, arrays(checkpoints.restore(1, training.state)), strict=True))


def test_a_full_disk_is_said_beforehand_and_loses_nothing(tmp_path, monkeypatch):
  training = Training()
  training.step(make_batch(4))
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(training.state, {})
  checkpoints.wait()
  training.step(make_batch(4))
  usage = collections.namedtuple("usage", "total used free")
  monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
  with pytest.raises(CheckpointError, match="a checkpoint needs .* make room and start the same command again"):
    checkpoints.save(training.state, {})
  assert Checkpoints(tmp_path).latest() == 1


def test_a_disk_that_fills_up_while_writing(tmp_path, monkeypatch):
  training = Training()
  checkpoints = Checkpoints(tmp_path)

  def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device", "array")

  monkeypatch.setattr(checkpoints.manager, "save", full)
  with pytest.raises(CheckpointError, match="the disk is full; what was saved before is still there"):
    checkpoints.save(training.state, {})


def test_what_was_trained_is_read_array_by_array(tmp_path, monkeypatch):
  checkpoints = Checkpoints(tmp_path)
  names = [f"projector/{i}/kernel" for i in range(6)]
  zero, arrays = np.int32(0), {name: np.full((2, 3), i, np.float32) for i, name in enumerate(names)}
  checkpoints.save(TrainState(np.int32(4), arrays, {}, zero, zero), {})
  checkpoints.wait()
  trained = Trained(Checkpoints(tmp_path, alone=True), 4)
  assert sorted(trained.names()) == names and trained.shape(names[0]) == (2, 3) and trained.dtype(names[0]) == "float32"
  read, found = [], Checkpoints.read_trainable
  monkeypatch.setattr(
    Checkpoints, "read_trainable", lambda self, step, paths: read.extend(paths) or found(self, step, paths)
  )
  part = (slice(0, 1), slice(1, 3))
  for _ in range(2):  # a second part of an array that is held costs nothing
    np.testing.assert_array_equal(trained.read(names[3], part), [[3, 3]])
  assert read == [names[3]] and list(trained.held) == read
  trained.release(names[3])
  assert not trained.held
  for name in names:
    np.testing.assert_array_equal(trained.read(name), arrays[name])
    assert len(trained.held) <= Trained.HELD
  assert read[1:] == names


def test_a_checkpoint_of_other_shapes_is_explained(tmp_path):
  training = Training()
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(training.state, {})
  checkpoints.wait()
  import dataclasses

  wrong = dataclasses.replace(
    training.state, trainable={path: x for path, x in training.state.trainable.items() if "sfe" not in path}
  )
  with pytest.raises(CheckpointError, match="another --workdir"):
    checkpoints.restore(0, wrong)
