"""The loop over steps: batches in, numbers out, checkpoints on the way, and an orderly end whatever happens."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from tqdm import tqdm

from mllm_jax import chips, distributed, sharding
from mllm_jax.batch import Batch
from mllm_jax.config import Config
from mllm_jax.data.records import DataError
from mllm_jax.run_control import Stop
from mllm_jax.training.metrics import MetricsLog
from mllm_jax.training.step import TrainState

FAILED = 1000  # above every signal's number


class NotFinite(RuntimeError):
  """Too many steps in a row had a loss or a gradient that is not finite."""


def run_steps(
  train_step: Callable,
  state: TrainState,
  frozen: dict[str, jax.Array],
  batches: Iterator[tuple[list[str], Batch | tuple[Batch, ...]]],
  *,
  steps: int,
  mesh: Mesh,
  reporter: "Reporter",
  save: Callable[[TrainState], None],
  save_every: int,
  stop: Stop,
) -> TrainState:
  """Takes steps until `steps` are done or some process is told to stop, and returns the state; `stop` then has the
  signal, in every process.

  While the device computes one step the next batch is made and handed over; a step's numbers are read after that. On a
  bad sample, a disk without room for the log, or when too many steps were not finite, what was reached is saved before
  the error is raised, as `distributed.share` does: all processes end after the same step.
  """
  done, problem = int(state.step), None
  in_flight = []
  # Several CPU devices in one process can block each other for good when two programs are under way.
  depth = 0 if mesh.size > 1 and mesh.devices.flat[0].platform == "cpu" else 1
  flags = distributed.Flags(mesh)

  def fetch() -> tuple[list[str], Any, Callable[[], int]]:
    """The next batch, and what the processes say: 0 to take it, a signal's number to stop, FAILED."""
    nonlocal problem
    ids, batch = [], None
    try:
      if problem is None:
        ids, batch = next(batches, (ids, batch))
    except DataError as error:
      problem = error
    return ids, batch, flags.ask(lambda: FAILED if problem else stop.signal, now=depth == 0)

  def settle(count: int) -> None:
    """Reports steps until `count` are in flight."""
    nonlocal problem
    while len(in_flight) > count:
      try:
        reporter.settle(*in_flight.pop(0))
      except OSError as error:
        problem = problem or error

  with jax.set_mesh(mesh), reporter:
    try:
      ids, batch, verdict = fetch()
      while done < steps and not verdict():
        placed, taken, work = sharding.to_device(batch, mesh, leading=1), ids, reporter.flops(batch)
        ids, batch, verdict = fetch()  # before the step is handed over: see Flags
        state, numbers = train_step(state, frozen, placed)
        done += 1
        in_flight.append((done, taken, numbers, work))
        settle(depth)
        if done % save_every == 0 and done < steps:
          save(state)
      settle(0)
    except NotFinite:
      save(state)
      raise
    said = flags.ask(lambda: FAILED if problem else stop.signal)()
    if said == FAILED:
      save(state)
      distributed.share(problem, status=1)
    stop.signal = stop.signal or said
  return state


class Reporter:
  """Shows and logs the numbers of finished steps: progress bar, metrics.jsonl, the ids of batches that went wrong.

  flops: the model FLOPs of a host batch, this process' rows of it.
  shares: that a step's rows are made in, see `sharding.row_share`.
  """

  def __init__(
    self,
    config: Config,
    name: str,
    folder: Path,
    log: MetricsLog,
    start: int,
    steps: int,
    flops: Callable[[Any], float],
    shares: int = 1,
  ):
    self.config, self.name, self.folder, self.log, self.steps = config, name, folder, log, steps
    self.flops, self.shares = flops, shares
    self.clock = Clock()
    self.bar = tqdm(
      total=steps, initial=start, desc=name, unit="step", disable=jax.process_index() > 0, dynamic_ncols=True
    )

  def __enter__(self) -> "Reporter":
    return self

  def __exit__(self, *error) -> None:
    self.bar.close()

  def settle(self, step: int, ids: list[str], numbers: dict[str, jax.Array], flops: float) -> None:
    """Waits for a step's numbers. Raises NotFinite after config.max_nonfinite bad steps in a row."""
    values: dict[str, Any] = {key: value.item() for key, value in jax.device_get(numbers).items()}
    # The other processes may have some more or fewer samples, and shorter or longer ones.
    self.clock.tick(len(ids) * self.shares, values["tokens"], flops * self.shares)
    self.bar.update()
    bad = values["skipped_in_row"]
    if bad:
      path = self.folder / "nonfinite.jsonl"
      told = distributed.gather(json.dumps(ids))  # in the order of their processes, some of which have the same rows
      ids = [name for share in dict.fromkeys(told) for name in json.loads(share)]
      if distributed.is_first():
        row = {"step": step, "loss": str(values["loss"]), "grad_norm": str(values["grad_norm"]), "ids": ids}
        with open(path, "a", encoding="utf-8") as file:
          file.write(json.dumps(row) + "\n")
        self.bar.write(
          f"step {step}: loss or gradient is not finite; the step is not applied, its samples are named in {path}"
        )
    if bad or step % self.config.log_every == 0 or step == self.steps:
      self._write(step, values | self.clock.rates())
    if bad >= self.config.max_nonfinite:
      raise NotFinite(
        f"{self.name}, step {step}: {bad} steps in a row had a loss or gradient that is not finite (max_nonfinite="
        f"{self.config.max_nonfinite}); saved. Look at the samples named in {self.folder / 'nonfinite.jsonl'}, or "
        "lower the learning rate and use another --workdir"
      )

  def _write(self, step: int, values: dict[str, Any]) -> None:
    # JSON has no infinities: a number that is not finite is left out of its row.
    self.log.write(
      {"stage": self.name, "step": step} | {key: value for key, value in values.items() if abs(value) < float("inf")}
    )
    self.bar.set_postfix(
      loss=f"{values['loss']:.3f}",
      lr=f"{values['learning_rate']:.1e}",
      samples_per_s=f"{values['samples_per_s']:.1f}",
      tokens_per_s=f"{values['tokens_per_s']:.0f}",
      **({"mfu": f"{values['mfu']:.1%}"} if "mfu" in values else {}),
    )


class Clock:
  """Samples, trained tokens and model FLOPs a second since the rates were last asked for.

  tflops_per_s: of one chip, 10^12. mfu: that over what the chip can do at most in bfloat16, where that is known.
  """

  def __init__(self):
    chip = chips.lookup(jax.devices()[0].device_kind)
    self.peak = chip.flops if chip else 0.0
    self._restart()

  def _restart(self) -> None:
    self.since, self.samples, self.tokens, self.flops = time.perf_counter(), 0, 0.0, 0.0

  def tick(self, samples: int, tokens: float, flops: float) -> None:
    self.samples += samples
    self.tokens += tokens
    self.flops += flops

  def rates(self) -> dict[str, float]:
    seconds = max(time.perf_counter() - self.since, 1e-9)
    speed = self.flops / seconds / jax.device_count()
    rates = {
      "samples_per_s": self.samples / seconds,
      "tokens_per_s": self.tokens / seconds,
      "tflops_per_s": speed / 1e12,
    }
    self._restart()
    return rates | ({"mfu": speed / self.peak} if self.peak else {})
