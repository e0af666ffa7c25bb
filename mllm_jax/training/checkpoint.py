"""Checkpoints of a stage: the trainable half, its moments and the step, written in the background and never half.

A checkpoint does not hold the frozen towers. Its `meta` says which folders they came from and their fingerprints.
"""

import shutil
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from mllm_jax import distributed
from mllm_jax.training.step import TrainState

BOOKKEEPING = 2**24  # bytes; what orbax writes beside the arrays, with room to spare


class CheckpointError(RuntimeError):
  """A checkpoint that cannot be written, or does not fit the run; the message names the folder and the remedy."""


class Checkpoints:
  """The checkpoints in one folder, named by their step; the newest `keep` stay.

  Every process of a run does the same with it at the same time; `alone`, to read only, it belongs to process 0.
  """

  def __init__(self, folder: Path, keep: int = 2, *, alone: bool = False):
    self.folder = Path(folder).absolute()
    processes = {"primary_host": 0, "active_processes": {0}, "barrier_sync_key_prefix": "alone"} if alone else {}
    self.processes = ocp.options.MultiprocessingOptions(**processes)
    options = ocp.CheckpointManagerOptions(
      max_to_keep=keep,
      enable_async_checkpointing=not alone,
      create=not alone,
      multiprocessing_options=self.processes,
    )
    self.manager = ocp.CheckpointManager(self.folder, options=options, item_names=("state", "meta"))

  def latest(self) -> int | None:
    """The step of the newest finished checkpoint."""
    return self.manager.latest_step()

  def save(self, state: TrainState, meta: dict[str, Any]) -> None:
    """Starts to write the state. Returns once it is copied off the device; `wait` returns once it is on the disk.

    Raises CheckpointError where the disk is too full, or a write that was started before has failed. What was saved
    before is still there then. A disk that is too full for one process ends all of them, as `distributed.share` does.
    """
    step = int(state.step)
    if step in self.manager.all_steps():
      return
    with distributed.agreed("checkpoint"):
      self._check_room(state)
    with self._explained():
      self.manager.save(
        step, args=ocp.args.Composite(state=ocp.args.StandardSave(_tree(state)), meta=ocp.args.JsonSave(meta))
      )

  def _check_room(self, state: TrainState) -> None:
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    free = shutil.disk_usage(self.folder).free
    needed = 1.1 * size + BOOKKEEPING
    if free < needed:
      raise CheckpointError(
        f"{self.folder}: a checkpoint needs {needed / 2**20:,.0f} MiB and {free / 2**20:,.0f} MiB are free; "
        "make room and start the same command again, it continues from the last checkpoint"
      )

  def wait(self) -> None:
    """Returns when everything is on the disk. Raises CheckpointError where that failed."""
    with self._explained():
      self.manager.wait_until_finished()
      self.manager.check_for_errors()

  def meta(self, step: int) -> dict[str, Any]:
    """What `save` was given beside the state."""
    with self._explained():
      return self.manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]

  def restore(self, step: int, like: TrainState) -> TrainState:
    """The state of a step, laid out as `like`, whose leaves are arrays or ShapeDtypeStructs with shardings."""
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    target = jax.tree.map(shape, _tree(like))
    with self._explained():
      tree = self.manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target)))["state"]
    leaves = jax.tree.leaves(TrainState(**tree))
    return jax.tree.unflatten(jax.tree.structure(like), leaves)

  def restore_trainable(self, step: int, like: dict[str, Any]) -> dict[str, jax.Array]:
    """Only the trainable arrays of a step; `like` has a ShapeDtypeStruct with its sharding for each."""
    return self._some(
      step,
      {
        path: ocp.ArrayRestoreArgs(sharding=x.sharding, global_shape=x.shape, dtype=x.dtype) for path, x in like.items()
      },
    )

  def read_trainable(self, step: int, paths: Iterable[str]) -> dict[str, np.ndarray]:
    """Some trainable arrays of a step, whole and in the host's memory."""
    return self._some(step, {path: ocp.RestoreArgs(restore_type=np.ndarray) for path in paths})

  def trainable(self, step: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """{path: (shape, type)} of what was trained, without reading it."""
    with self._explained():
      saved = self._handler().metadata(self._state(step)).tree["trainable"]
    return {path: (tuple(array.shape), np.dtype(array.dtype)) for path, array in saved.items()}

  def _some(self, step: int, wanted: dict[str, ocp.RestoreArgs]) -> dict[str, Any]:
    args = ocp.args.PyTreeRestore(
      item={"trainable": dict.fromkeys(wanted, 0)}, partial_restore=True, restore_args={"trainable": wanted}
    )
    with self._explained():
      return self._reader().restore(self._state(step), args=args)["trainable"]

  def _state(self, step: int) -> Path:
    return self.folder / str(step) / "state"

  def _reader(self) -> ocp.Checkpointer:
    return ocp.Checkpointer(self._handler(), multiprocessing_options=self.processes)

  def _handler(self) -> ocp.PyTreeCheckpointHandler:
    return ocp.PyTreeCheckpointHandler(multiprocessing_options=self.processes)

  def close(self) -> None:
    self.manager.close()

  def _explained(self) -> "_Explained":
    return _Explained(self.folder)


class Trained:
  """The trainable arrays of a step, read from the disk when they are asked for (a `weights.tensors.Tensors`).

  A few are held at a time, whole, until they are released: a part of one is no cheaper to read.
  """

  HELD = 4  # an adapter's two factors, for each of two threads

  def __init__(self, checkpoints: Checkpoints, step: int):
    self.checkpoints, self.step = checkpoints, step
    self.arrays = checkpoints.trainable(step)
    self.held: dict[str, np.ndarray] = {}
    self.lock = threading.Lock()

  def names(self) -> list[str]:
    return list(self.arrays)

  def shape(self, name: str) -> tuple[int, ...]:
    return self.arrays[name][0]

  def dtype(self, name: str) -> np.dtype:
    return self.arrays[name][1]

  def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
    with self.lock:
      if name not in self.held:
        while len(self.held) >= self.HELD:
          del self.held[next(iter(self.held))]
        self.held |= self.checkpoints.read_trainable(self.step, [name])
      return self.held[name][index]

  def release(self, name: str) -> None:
    with self.lock:
      self.held.pop(name, None)


class _Explained:
  """Turns what orbax and tensorstore raise into a CheckpointError that says what to do."""

  def __init__(self, folder: Path):
    self.folder = folder

  def __enter__(self) -> None:
    return None

  def __exit__(self, kind, error, traceback) -> bool:
    if error is None or isinstance(error, CheckpointError) or not isinstance(error, Exception):
      return False
    text = " ".join(str(error).split())
    if "No space left" in text or "RESOURCE_EXHAUSTED" in text or "Disk quota" in text:
      raise CheckpointError(
        f"{self.folder}: the disk is full; what was saved before is still there. Make room and start the "
        "same command again"
      ) from error
    raise CheckpointError(
      f"{self.folder}: {type(error).__name__}: {text[:600]}. If the checkpoint is of another model or "
      "version, use another --workdir; if it is damaged, remove the folder of its step, and the one before it counts"
    ) from error


def _tree(state: TrainState) -> dict[str, Any]:
  return {
    "step": state.step,
    "trainable": state.trainable,
    "optimizer": state.optimizer,
    "skipped": state.skipped,
    "skipped_in_row": state.skipped_in_row,
  }
