"""What came of the runs of a suite: figures of each, and of each row over its seeds."""

import dataclasses
import json
import statistics
from collections.abc import Sequence
from typing import Any

from mllm_jax.ablation.plan import SUMMARY, Run

SCORE, BLANK = "eval/exact_match", "eval/blank"


@dataclasses.dataclass(frozen=True)
class Figure:
  """A number over seeds. spread: the standard deviation of a sample (n - 1); None of one seed."""

  values: tuple[float, ...]

  @property
  def mean(self) -> float:
    return statistics.fmean(self.values)

  @property
  def spread(self) -> float | None:
    return statistics.stdev(self.values) if len(self.values) > 1 else None

  def to_json(self) -> dict[str, Any]:
    return {"mean": self.mean, "spread": self.spread, "values": list(self.values)}


@dataclasses.dataclass(frozen=True)
class Result:
  """A row. failed: seeds whose run did; waiting: those that are not done yet. Without a seed that is done, `scores` is
  empty and the rest 0.

  scores: exact match and, where it was asked for, that of blanked pictures, by the names in the log: the whole
  (eval/exact_match, eval/blank) and by kind of question (eval/exact_match/KIND). seconds_a_step, trained_tokens: of the
  last stage; tokens are those predicted in all its steps.
  """

  label: str
  seeds: tuple[int, ...] = ()
  failed: tuple[int, ...] = ()
  waiting: tuple[int, ...] = ()
  scores: dict[str, Figure] = dataclasses.field(default_factory=dict)
  seconds_a_step: Figure | None = None
  trained_tokens: Figure | None = None
  questions: int = 0
  projector_parameters: int = 0
  visual_tokens: int = 0
  flops: float = 0.0

  def to_json(self) -> dict[str, Any]:
    own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    figures = {name: value.to_json() for name, value in own.items() if isinstance(value, Figure)}
    return own | figures | {"scores": {name: figure.to_json() for name, figure in self.scores.items()}}


def of_row(runs: Sequence[Run], failed: Sequence[Run]) -> Result:
  """A row's result from the folders of its runs, one a seed."""
  done = [run for run in runs if run.finished()]
  left = [run for run in runs if run not in done]
  common = dict(
    label=runs[0].label,
    seeds=tuple(run.seed for run in done),
    failed=tuple(run.seed for run in left if run in failed),
    waiting=tuple(run.seed for run in left if run not in failed),
  )
  if not done:
    return Result(**common)
  logs = [_log(run) for run in done]
  evaluations = [[row for row in log if SCORE in row][-1] for log in logs]
  names = [name for name in evaluations[0] if name.startswith((SCORE, BLANK))]
  summary = json.loads((done[0].folder / SUMMARY).read_text(encoding="utf-8"))
  stage = evaluations[0]["stage"]
  asked = json.loads((done[0].folder / stage / "evaluation.json").read_text(encoding="utf-8"))
  steps = [[row for row in log if row["stage"] == stage and "loss" in row] for log in logs]
  return Result(
    **common,
    scores={name: Figure(tuple(row[name] for row in evaluations)) for name in names},
    seconds_a_step=Figure(tuple(map(_seconds_a_step, steps))),
    trained_tokens=Figure(tuple(statistics.fmean(row["tokens"] for row in rows) * rows[-1]["step"] for rows in steps)),
    questions=len(asked),
    projector_parameters=summary["parameters"]["projector"]["count"],
    visual_tokens=summary["visual_tokens"],
    flops=summary["flops"]["total"],
  )


def _log(run: Run) -> list[dict[str, Any]]:
  with open(run.folder / "metrics.jsonl", encoding="utf-8") as file:
    return [json.loads(line) for line in file]


def _seconds_a_step(rows: Sequence[dict[str, Any]]) -> float:
  """A row of the log has the predicted tokens of its step, and how many a second there were since the row before. The
  median leaves out the steps that were compiled, saved or disturbed."""
  tokens = statistics.fmean(row["tokens"] for row in rows)
  return tokens * statistics.median(1 / row["tokens_per_s"] for row in rows)
