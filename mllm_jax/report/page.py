"""The page, from top to bottom."""

import math
import os
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from mllm_jax.config import Config
from mllm_jax.inference.evaluate import Prediction
from mllm_jax.page import PAGE
from mllm_jax.report.answers import gallery, percent, scores_table
from mllm_jax.report.chart import line_chart
from mllm_jax.report.configuration import configuration
from mllm_jax.report.curves import curve_of
from mllm_jax.report.style import STYLE


def write(
  path: str, *, config: Config, log: Sequence[Mapping[str, Any]], predictions: Sequence[Prediction], title: str = ""
) -> None:
  """Writes the report beside `path`, then moves it there: a reader never sees half a file.

  Args:
    path: of the HTML file; its folder must exist.
    config: of the run.
    log: the rows of metrics.jsonl (`read_log`): training rows with `stage`, `step`, `loss` and, if it is to be drawn,
      `learning_rate`; evaluation rows with `stage` and what `EvaluationResult.metrics` gives. Of rows for the same
      step the last one counts, as a resumed run writes steps again.
    predictions: of the last evaluation; their pictures are read again.
    title: the heading; "" takes the configuration's name.

  Raises:
    DataError: a picture that is to be shown cannot be read.
    OSError: the file cannot be written.
  """
  title = title or config.name or "Training report"
  stages = list(dict.fromkeys(row["stage"] for row in log if "stage" in row))
  scores = {
    stage: rows[-1]
    for stage in stages
    if (rows := [row for row in log if row.get("stage") == stage and "eval/exact_match" in row])
  }
  curves = {stage: curve for stage in stages if (curve := curve_of(log, stage, "loss"))}
  body = [
    header(title, config),
    result_tiles(curves, scores),
    training(log, curves),
    scores_table(scores, predictions),
    gallery(predictions),
    configuration(config),
  ]
  beside = f"{path}.{os.getpid()}.tmp"
  try:
    with open(beside, "w", encoding="utf-8") as file:
      file.write(PAGE.format(title=escape(title), style=STYLE, body="\n".join(filter(None, body))))
    os.replace(beside, path)
  finally:
    if os.path.exists(beside):
      os.remove(beside)


def header(title: str, config: Config) -> str:
  """The title, and what lies between picture and answer."""
  projector = config.model.projector
  if projector.kind == "spatial":
    kernel = projector.dfi_kernel
    detail = f"with detail integration (kernel {kernel})" if kernel else "without detail integration"
    between = f"spatial projector, {projector.variant}, {detail}"
  elif config.stages == "vdim":
    tower = escape(os.path.basename(os.path.normpath(config.model.vision)))
    return f"<header><h1>{escape(title)}</h1><p class='flow'><b>{tower}</b> &rarr; <b>VDIM</b></p></header>"
  else:
    between = f"{projector.kind} projector"
  towers = [os.path.basename(os.path.normpath(path)) for path in (config.model.vision, config.model.llm)]
  line = " &rarr; ".join(f"<b>{escape(part)}</b>" for part in (towers[0], between, towers[1]))
  return f"<header><h1>{escape(title)}</h1><p class='flow'>{line}</p></header>"


def result_tiles(curves: Mapping[str, list], scores: Mapping[str, Mapping]) -> str:
  """The result in a few large numbers."""
  tiles = []
  if scores:
    stage, row = list(scores.items())[-1]
    tiles.append(("Exact match", percent(row["eval/exact_match"]), f"after {stage}"))
    if "eval/blank" in row:
      tiles.append(("Pictures blanked", percent(row["eval/blank"]), "what the text alone gives"))
  for stage, curve in curves.items():
    tail = [loss for _, loss in curve[-max(1, len(curve) // 20) :]]
    note = f"from {curve[0][1]:.3f} in {curve[-1][0]:,} steps"
    tiles.append((f"Loss, {stage}", f"{sum(tail) / len(tail):.3f}", note))
  cards = "".join(
    f"<div class='tile'><span>{escape(name)}</span><strong>{value}</strong><small>{escape(note)}</small></div>"
    for name, value, note in tiles
  )
  return f"<section class='tiles'>{cards}</section>" if cards else ""


def training(log: Sequence[Mapping], curves: Mapping[str, list]) -> str:
  """The curves of each stage."""
  panels = []
  for stage, curve in curves.items():
    rate = curve_of(log, stage, "learning_rate")
    lost = sum(row.get("stage") == stage and "loss" in row and not math.isfinite(row["loss"]) for row in log)
    note = f"<p class='note'>{lost} logged steps had no finite loss and are left out.</p>" if lost else ""
    chart = line_chart(curve, height=240, label=f"Loss of the stage {stage}", smooth=True)
    for name in sorted({key for row in log if row.get("stage") == stage for key in row if key.startswith("rec_")}):
      part = curve_of(log, stage, name)
      chart += f"<h4>Reconstruction at {escape(name[4:])}</h4>"
      chart += line_chart(part, height=110, label=f"Reconstruction at {name[4:]} of the stage {stage}", smooth=True)
    if rate:
      label = f"Learning rate of the stage {stage}"
      chart += "<h4>Learning rate</h4>" + line_chart(rate, height=90, label=label, smooth=False)
    panels.append(f"<figure class='panel'><figcaption>{escape(stage)}</figcaption><h4>Loss</h4>{chart}{note}</figure>")
  return f"<section><h2>Training</h2><div class='panels'>{''.join(panels)}</div></section>" if panels else ""
