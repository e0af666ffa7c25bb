"""The rows of a run's metrics.jsonl, and the curves in them."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

POINTS = 600  # of a curve; about what a screen can show


def read_log(path: str) -> list[dict[str, Any]]:
  """The rows of a metrics.jsonl; an unfinished last line, from a run that was killed while writing, is left out.

  Raises:
    OSError: the file cannot be read. ValueError: another line is not JSON.
  """
  with open(path, encoding="utf-8") as file:
    lines = file.read().splitlines()
  rows = []
  for number, line in enumerate(lines, start=1):
    try:
      rows.append(json.loads(line))
    except json.JSONDecodeError as error:
      if number < len(lines):
        raise ValueError(f"{path}: line {number} is not JSON ({error.msg}); take it out") from error
  return rows


def curve_of(log: Sequence[Mapping], stage: str, key: str) -> list[tuple[int, float]]:
  """The finite values of a stage by step, the last row of each step counting, thinned by averaging neighbours."""
  by_step = {row["step"]: row[key] for row in log if row.get("stage") == stage and key in row and "step" in row}
  points = sorted((step, value) for step, value in by_step.items() if math.isfinite(value))
  width = -(-len(points) // POINTS) or 1
  groups = [points[i : i + width] for i in range(0, len(points), width)]
  return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]
