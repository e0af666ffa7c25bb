"""What all stages of a run have in common: going on where they were, taking steps, saving, and being stopped."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from mllm_jax import distributed, sharding
from mllm_jax.config import Config, to_dict
from mllm_jax.continuation import check_identity
from mllm_jax.data.records import DataError
from mllm_jax.run_control import Stop, Stopped, say, write_json
from mllm_jax.training.checkpoint import Checkpoints
from mllm_jax.training.loop import NotFinite, Reporter, run_steps
from mllm_jax.training.metrics import NoLog
from mllm_jax.training.step import TrainState
from mllm_jax.weights.folder import versions


@dataclasses.dataclass
class StageRun:
  """A stage under way: what it reads and writes, and on which devices."""

  config: Config
  name: str
  workdir: Path
  mesh: object
  log: NoLog
  stop: Stop

  @property
  def stage(self):
    return getattr(self.config, self.name)

  @property
  def folder(self) -> Path:
    return self.workdir / self.name

  def open(self, identity: dict) -> int | None:
    """Opens the checkpoints of the run that `identity` tells from others: the step of the last, None without one.

    Raises ConfigError where they are of another run.
    """
    self.identity = identity
    self.checkpoints = Checkpoints(self.folder / "checkpoints", self.config.keep_checkpoints)
    start = self.checkpoints.latest()
    if start is not None:
      check_identity(self.checkpoints.meta(start), self.identity, self.folder)
    return start

  def begin(self, batches, unit: str, rows: str) -> None:
    """Writes down the configuration, not before all checks: a mistyped command must not spoil a run. Says what is about
    to be done with the `unit`s of data, in `rows` a step."""
    start = self.checkpoints.latest() or 0
    with distributed.agreed("configuration"):
      if distributed.is_first():
        self.log.forget_after(self.name, start)
        write_json(self.workdir / "config.json", to_dict(self.config))
    say(
      f"{batches.samples:,} {unit}, {batches.steps:,} steps of {rows}"
      + (f" in {self.stage.accumulation} micro-batches" if self.stage.accumulation > 1 else "")
      + (f", continuing after step {start:,}" if start else "")
    )

  def train(self, train_step, state: TrainState, frozen: dict, batches, flops: Callable[[Any], float]) -> TrainState:
    """The steps that are left, and a last checkpoint. `flops` is the `Reporter`'s. Raises Stopped where that is before
    the end."""
    start, shares = int(state.step), sharding.row_share(self.mesh, jax.process_index())[1]
    try:
      state = run_steps(
        train_step,
        state,
        frozen,
        batches.iterate(start),
        steps=batches.steps,
        mesh=self.mesh,
        save=self._save,
        save_every=self.config.checkpoint_every,
        stop=self.stop,
        reporter=Reporter(self.config, self.name, self.folder, self.log, start, batches.steps, flops, shares),
      )
      self._save(state)
    except (DataError, NotFinite) as error:
      raise Stopped(1, str(error)) from error
    finally:
      self.checkpoints.wait()
      self.checkpoints.close()
    done = int(state.step)
    if done < batches.steps:
      text = f"{self.name}: saved after step {done} of {batches.steps}; the same command continues"
      raise Stopped(128 + self.stop.signal, text if distributed.is_first() else "")
    return state

  def _save(self, state: TrainState) -> None:
    self.checkpoints.save(state, self.identity | {"config": to_dict(self.config), "versions": versions()})
