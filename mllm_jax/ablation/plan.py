"""What a suite's rows are trained with: the trainer's options, the folders, and what is the same for all rows."""

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mllm_jax.command_line import parse
from mllm_jax.config import Config, ConfigError, to_dict
from mllm_jax.suites import SUITES, Row

CONFIGS = Path(__file__).parents[2] / "configs"
FINISHED = "finished.json"  # in a run's folder: what it was trained with, and how long that took
SUMMARY = "summary.json"  # beside it: parameters and FLOPs, as `python -m mllm_jax.compile --summary` counts them
# The comparison is made after the last stage, and a suite need not keep its models.
SHORTER = {"evaluation.stages": "finetune", "save_model": False, "keep_checkpoints": 1}
# What rows may share, and should as far as they can.
BUDGET = (
  "model.vision",
  "model.llm",
  "demo_shapes",
  "mesh.cpu_devices",
  *(
    f"{stage}.{field}"
    for stage in ("pretrain", "finetune")
    for field in ("steps", "batch_size", "data.batching", "data.image_aspect", "lora.rank", "parameters")
  ),
)


@dataclasses.dataclass(frozen=True)
class Run:
  """A row with a seed, or a VDIM that several rows share.

  options: of the trainer, but for what comes from `vdim`, the run whose VDIM it takes.
  """

  label: str
  seed: int
  folder: Path
  options: tuple[str, ...]
  config: Config
  vdim: "Run | None" = None

  @property
  def trains_vdim(self) -> bool:
    return self.config.stages == "vdim"

  @property
  def arguments(self) -> list[str]:
    """Those of the trainer."""
    given = []
    if self.vdim is not None:
      path = self.vdim.folder.resolve() / "vdim" / "vdim.safetensors"
      given = ["--config.stages=pretrain,finetune", f"--config.model.vdim_weights={path}"]
    return [*self.options, *given, f"--workdir={self.folder}"]

  def finished(self) -> dict[str, Any] | None:
    """What was written down when it had been trained with this very configuration; None otherwise."""
    try:
      content = json.loads((self.folder / FINISHED).read_text(encoding="utf-8"))
    except FileNotFoundError:
      return None
    return content if content["config"] == as_json(self.config) else None


def as_json(config: Config) -> dict[str, Any]:
  return json.loads(json.dumps(to_dict(config)))


def rows_of(suite: str, only: Sequence[str]) -> list[Row]:
  """The rows of a suite, or those of them with a label in `only`. Raises ConfigError where there is no such thing."""
  if suite not in SUITES:
    raise ConfigError(f"--suite={suite} is none; there are {', '.join(SUITES)}")
  unknown = set(only) - {row.label for row in SUITES[suite]}
  if unknown:
    labels = ", ".join(repr(row.label) for row in SUITES[suite])
    raise ConfigError(f"--only={min(unknown)}: the rows of {suite} are {labels}")
  return [row for row in SUITES[suite] if row.label in only or not only]


def plan(suite: str, seeds: int, workdir: Path) -> list[Run]:
  """The runs of a suite, with its first seed first, and a VDIM before the first row that takes it.

  VDIM is trained on pictures alone, before there is a projector behind it: rows with the same stage, tower and highest
  level would train the same one, and share it. Raises ConfigError where a row's recipe cannot be read.
  """
  runs, shared = [], {}
  for seed in range(seeds):
    for row in SUITES[suite]:
      options, config = settings(row, seed)
      vdim = None
      if "vdim" in config.stages.split(","):
        key = json.dumps([as_json(config)[name] for name in ("vdim", "demo_shapes", "seed")])
        key += f"{config.model.vision} {config.model.dtype} {max(config.model.projector.levels)}"
        if key not in shared:
          number = sum(run.seed == seed for run in shared.values())
          # No row's folder has an underscore; one called VDIM would else be trained into the shared stage's.
          name = "stage_vdim" + (f"_{number + 1}" if number else "")
          alone = dataclasses.replace(config, stages="vdim")
          folder = workdir / name / f"seed-{seed}"
          shared[key] = Run(name, seed, folder, (*options, "--config.stages=vdim"), alone)
          runs.append(shared[key])
        vdim = shared[key]
      folder = workdir / re.sub(r"[^a-z0-9]+", "-", row.label.lower()).strip("-") / f"seed-{seed}"
      runs.append(taken(Run(row.label, seed, folder, options, config, vdim), suite, workdir))
  return runs


def taken(run: Run, suite: str, workdir: Path) -> Run:
  """A run of a suite where another suite has finished just the same one, if that has its name for a folder and lies
  beside this one, as by default; else as it is."""
  if workdir.name != suite or run.finished():
    return run
  for other in SUITES:
    for file in sorted((workdir.parent / other).glob(f"*/{run.folder.name}/{FINISHED}")):
      there = dataclasses.replace(run, folder=file.parent)
      if there.finished():
        return there
  return run


def chosen(runs: Sequence[Run], labels: Sequence[str]) -> list[Run]:
  """The runs of rows with these labels, and the VDIMs that those of them take which are not done yet."""
  wanted = [run for run in runs if run.label in labels and not run.trains_vdim]
  needed = {run.vdim.folder for run in wanted if run.vdim is not None and not run.finished()}
  return [run for run in runs if run in wanted or run.folder in needed]


def settings(row: Row, seed: int) -> tuple[tuple[str, ...], Config]:
  """The trainer's options for a row of the demo, and the configuration that they make."""
  fields = row.overrides | row.demo | SHORTER | {"seed": seed}
  path = CONFIGS / f"{row.recipe}.py"
  options = (f"--config={path}:demo", *(f"--config.{name}={value}" for name, value in fields.items()))
  return options, parse(["ablate", *options])[0]


def budgets(runs: Sequence[Run]) -> tuple[dict[str, str], dict[str, dict[str, list[str]]]]:
  """What all rows have the same of, by field; and of the fields in which they differ, which values which rows have."""
  configs = {run.label: run.config for run in runs if not run.trains_vdim}
  equal, different = {}, {}
  for name in BUDGET:
    labels = {}
    for label, config in configs.items():
      labels.setdefault(_field(config, name), []).append(label)
    if len(labels) == 1:
      equal[name] = next(iter(labels))
    else:
      different[name] = labels
  return equal, different


def _field(config: Any, path: str) -> str:
  """A field's value in words: towers by their folder's name, of learning rates those of what is trained."""
  for name in path.split("."):
    config = getattr(config, name)
  if path.endswith(".parameters"):
    rates = {pattern.partition("/")[0]: rate for pattern, rate in config if rate}
    return " ".join(f"{part} {rate:g}" for part, rate in rates.items())
  return Path(config).name if path.startswith("model.") else str(config)
