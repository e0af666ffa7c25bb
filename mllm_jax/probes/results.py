"""What finished probes leave in a workdir, and the table and the page of all that are there.

TASK/FEATURES/result.json, head.npz, examples.npz      a probe; result.json is written last
results.json, results.md, page/index.html              all of them side by side
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mllm_jax.config import ConfigError
from mllm_jax.probes.features import KINDS
from mllm_jax.probes.run import Outcome
from mllm_jax.probes.tasks import Classes, Segmentation, Text
from mllm_jax.run_control import write_json
from mllm_jax.visualization import folder
from mllm_jax.visualization.page import Figure, Section, files

TASKS = {
  "text": (Text, "Words read by a linear head with CTC from the mean and the maximum of each column of the map."),
  "segmentation": (Segmentation, "The class of each pixel, told by a linear head from its cell of the map."),
  "classes": (Classes, "The class of a picture, told by a linear head from the map's mean and maximum."),
}
RESULT = "result.json"
SIDE = 170  # pixels of a picture's longer side on the page
GOLDEN = 0.618034


def finished(workdir: Path, task: str, kind: str, identity: Mapping[str, Any]) -> dict | None:
  """The result of the probe that `identity` tells from others; None where it is still to be made.

  Raises ConfigError where its place is taken by another.
  """
  path = workdir / task / kind / RESULT
  if not path.is_file():
    return None
  try:
    content = json.loads(path.read_text(encoding="utf-8"))
    there = content["probe"]
  except (ValueError, KeyError, TypeError) as error:
    raise ConfigError(f"{path} is damaged ({error}); remove it") from error
  wrong = [
    f"{name}: {there.get(name)} there, {value} now" for name, value in identity.items() if there.get(name) != value
  ]
  if wrong:
    raise ConfigError(f"{path} is of another probe ({'; '.join(wrong)}); use another --workdir")
  return content


def save(workdir: Path, task: str, kind: str, identity: Mapping[str, Any], outcome: Outcome) -> None:
  """Keeps a finished probe."""
  place = workdir / task / kind
  place.mkdir(parents=True, exist_ok=True)
  np.savez(place / "head.npz", **outcome.head)
  arrays = {}
  for number, (picture, true, said) in enumerate(outcome.shown):
    arrays |= {f"picture_{number}": picture, f"true_{number}": true, f"said_{number}": said}
  np.savez_compressed(place / "examples.npz", **arrays)
  content = {
    "probe": dict(identity),
    "metrics": outcome.metrics,
    "tested": outcome.tested,
    "unreadable": outcome.unreadable,
    "seconds": round(outcome.seconds, 1),
  }
  write_json(place / RESULT, content)


def summarise(workdir: Path) -> str:
  """Writes the table and the page of all finished probes in a workdir, and gives the table in Markdown."""
  there = {}
  for task in TASKS:
    paths = {kind: workdir / task / kind / RESULT for kind in KINDS}
    found = {kind: json.loads(path.read_text(encoding="utf-8")) for kind, path in paths.items() if path.is_file()}
    if found:
      there[task] = found
  table = markdown(there)
  write_json(workdir / "results.json", there)
  (workdir / "results.md").write_text(table, encoding="utf-8")
  facts = {"folder": str(workdir), "towers": ", ".join(sorted({one["probe"]["vision"] for one in _all(there)}))}
  sections = [_section(workdir, task, found) for task, found in there.items()]
  folder.write(workdir / "page", files("Linear probes on frozen features", facts, sections), facts)
  return table


def _all(there: Mapping[str, Mapping[str, dict]]) -> list[dict]:
  return [result for found in there.values() for result in found.values()]


def markdown(there: Mapping[str, Mapping[str, dict]]) -> str:
  """The metrics of tasks, a line each, and a column for each kind of features; "-" where there is no result yet."""
  levels = {result["probe"]["level"] for result in _all(there)} - {0}
  times = " and ".join(f"{2**level}x" for level in sorted(levels))
  heads = ["none", *(f"{kind} {times}".strip() for kind in KINDS[1:])]
  lines = [f"| probe | metric | {' | '.join(heads)} |", f"|{'---|' * (len(heads) + 2)}"]
  for task, found in there.items():
    for metric in TASKS[task][0].metrics:
      cells = [f"{found[kind]['metrics'][metric]:.1%}" if kind in found else "-" for kind in KINDS]
      lines.append(f"| {task} | {metric} | {' | '.join(cells)} |")
  return "\n".join(lines) + "\n"


def _section(workdir: Path, task: str, found: Mapping[str, dict]) -> Section:
  """A task's numbers, and its first tests: the picture and what each probe said."""
  numbers = "; ".join(
    f"{kind}: " + ", ".join(f"{name} {value:.1%}" for name, value in result["metrics"].items())
    for kind, result in found.items()
  )
  rows: dict[int, list[Figure]] = {}
  for kind in found:
    with np.load(workdir / task / kind / "examples.npz") as stored:
      for number in range(len(stored.files) // 3):
        picture, true, said = (stored[f"{name}_{number}"] for name in ("picture", "true", "said"))
        row = rows.setdefault(number, [])
        if not row:
          row.append(Figure(f"{task}-{number}", _small(picture), "picture", "" if true.ndim else f"it is {true}"))
          if true.ndim:
            row.append(Figure(f"{task}-{number}-true", _small(colours(true)), "labels"))
        if said.ndim:
          row.append(Figure(f"{task}-{number}-{kind}", _small(colours(said)), kind))
        else:
          row[0] = row[0]._replace(caption=f"{row[0].caption}; {kind}: {str(said) or 'nothing'}")
  figures = list(rows.values())
  if figures and task != "segmentation":
    figures = [[row[0] for row in figures]]
  return Section(task, f"{TASKS[task][1]} {numbers}.", figures)


def colours(labels: np.ndarray) -> np.ndarray:
  """A colour for each class, uint8 [H, W, 3]: class 0 is dark, and so is VOID; others go around by the golden ratio."""
  hues = (np.arange(256) * GOLDEN) % 1
  waves = np.stack([np.cos(2 * np.pi * (hues - third / 3)) for third in range(3)], -1)
  palette = (150 + 90 * waves).astype(np.uint8)
  palette[[0, 255]] = 30
  return palette[labels]


def _small(pixels: np.ndarray) -> np.ndarray:
  image = Image.fromarray(pixels)
  scale = SIDE / max(image.size)
  size = tuple(max(round(length * scale), 1) for length in image.size)
  return np.asarray(image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC))
