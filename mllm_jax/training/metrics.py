"""Where a run's numbers go: metrics.jsonl always, TensorBoard always, Weights & Biases where asked for."""

import json
import os
from pathlib import Path
from typing import Any

from mllm_jax.config import ConfigError


class NoLog:
  """What the processes of a run have that do not write its log."""

  def write(self, row: dict[str, Any]) -> None:
    pass

  def forget_after(self, stage: str, step: int) -> None:
    pass

  def close(self) -> None:
    pass


class MetricsLog(NoLog):
  """Flat rows of numbers, appended to `folder`/metrics.jsonl and to the TensorBoard files beside it."""

  def __init__(self, folder: Path, *, wandb_project: str = "", name: str = "", config: dict[str, Any] | None = None):
    # Imported here: tests and tools that only read a log need no TensorBoard.
    from tensorboardX import SummaryWriter

    self.path = Path(folder) / "metrics.jsonl"
    self.path.touch()
    self.writer = SummaryWriter(str(Path(folder) / "tensorboard"))
    self.wandb = None
    if wandb_project:
      try:
        import wandb
      except ImportError as error:
        raise ConfigError(
          f"wandb_project={wandb_project!r} needs the package wandb; run `pip install wandb`"
        ) from error
      self.wandb = wandb.init(project=wandb_project, name=name, config=config, dir=str(folder), resume="allow")

  def write(self, row: dict[str, Any]) -> None:
    """One row; `stage` and `step` say where it belongs."""
    # Closed each time: a mounted bucket keeps what was closed, and a machine may be taken away at any moment.
    with open(self.path, "a", encoding="utf-8") as file:
      file.write(json.dumps(row) + "\n")
    numbers = {f"{row['stage']}/{key}": value for key, value in row.items() if key not in ("stage", "step")}
    for key, value in numbers.items():
      self.writer.add_scalar(key, value, row["step"])
    if self.wandb is not None:
      self.wandb.log({**numbers, f"{row['stage']}/step": row["step"]})

  def forget_after(self, stage: str, step: int) -> None:
    """Takes the rows of `stage` with a later step than `step` out of metrics.jsonl, and a half-written last line.

    A run that was killed has logged steps after its last checkpoint, and is about to log them again. The new file is
    written beside the old one and renamed.
    """
    kept = []
    for line in self.path.read_text(encoding="utf-8").splitlines():
      try:
        row = json.loads(line)
      except json.JSONDecodeError:
        continue
      if row.get("stage") != stage or row.get("step", 0) <= step:
        kept.append(line)
    partial = self.path.with_suffix(".partial")
    partial.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    os.replace(partial, self.path)

  def close(self) -> None:
    self.writer.close()
    if self.wandb is not None:
      self.wandb.finish()
