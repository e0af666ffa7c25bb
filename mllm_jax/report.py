"""Report: one HTML file that shows a run, with everything in it: no scripts, nothing fetched from elsewhere.

From top to bottom: the result in numbers, the loss of each stage, exact match by kind of question beside what the
text alone gives, held-out pictures with questions and answers, and the configuration.
"""

import base64
import collections
import dataclasses
import html
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from mllm_jax.config import Config, VdimStage
from mllm_jax.data import images
from mllm_jax.inference.evaluate import Prediction
from mllm_jax.page import PAGE

PICTURES = 24
PICTURE_SIZE = 320  # pixels along the longer side; larger pictures are shrunk to it
POINTS = 600  # of a curve; about what a screen can show

escape = html.escape


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
  curves = {stage: curve for stage in stages if (curve := _curve(log, stage, "loss"))}
  body = [
    _header(title, config),
    _tiles(curves, scores),
    _training(log, curves),
    _scores(scores, predictions),
    _gallery(predictions),
    _configuration(config),
  ]
  beside = f"{path}.{os.getpid()}.tmp"
  try:
    with open(beside, "w", encoding="utf-8") as file:
      file.write(PAGE.format(title=escape(title), style=STYLE, body="\n".join(filter(None, body))))
    os.replace(beside, path)
  finally:
    if os.path.exists(beside):
      os.remove(beside)


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


def _header(title: str, config: Config) -> str:
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


def _tiles(curves: Mapping[str, list], scores: Mapping[str, Mapping]) -> str:
  tiles = []
  if scores:
    stage, row = list(scores.items())[-1]
    tiles.append(("Exact match", _percent(row["eval/exact_match"]), f"after {stage}"))
    if "eval/blank" in row:
      tiles.append(("Pictures blanked", _percent(row["eval/blank"]), "what the text alone gives"))
  for stage, curve in curves.items():
    tail = [loss for _, loss in curve[-max(1, len(curve) // 20) :]]
    note = f"from {curve[0][1]:.3f} in {curve[-1][0]:,} steps"
    tiles.append((f"Loss, {stage}", f"{sum(tail) / len(tail):.3f}", note))
  cards = "".join(
    f"<div class='tile'><span>{escape(name)}</span><strong>{value}</strong><small>{escape(note)}</small></div>"
    for name, value, note in tiles
  )
  return f"<section class='tiles'>{cards}</section>" if cards else ""


def _training(log: Sequence[Mapping], curves: Mapping[str, list]) -> str:
  panels = []
  for stage, curve in curves.items():
    rate = _curve(log, stage, "learning_rate")
    lost = sum(row.get("stage") == stage and "loss" in row and not math.isfinite(row["loss"]) for row in log)
    note = f"<p class='note'>{lost} logged steps had no finite loss and are left out.</p>" if lost else ""
    chart = _chart(curve, height=240, label=f"Loss of the stage {stage}", smooth=True)
    for name in sorted({key for row in log if row.get("stage") == stage for key in row if key.startswith("rec_")}):
      part = _curve(log, stage, name)
      chart += f"<h4>Reconstruction at {escape(name[4:])}</h4>"
      chart += _chart(part, height=110, label=f"Reconstruction at {name[4:]} of the stage {stage}", smooth=True)
    if rate:
      label = f"Learning rate of the stage {stage}"
      chart += "<h4>Learning rate</h4>" + _chart(rate, height=90, label=label, smooth=False)
    panels.append(f"<figure class='panel'><figcaption>{escape(stage)}</figcaption><h4>Loss</h4>{chart}{note}</figure>")
  return f"<section><h2>Training</h2><div class='panels'>{''.join(panels)}</div></section>" if panels else ""


def _curve(log: Sequence[Mapping], stage: str, key: str) -> list[tuple[int, float]]:
  """The finite values of a stage by step, the last row of each step counting, thinned by averaging neighbours."""
  by_step = {row["step"]: row[key] for row in log if row.get("stage") == stage and key in row and "step" in row}
  points = sorted((step, value) for step, value in by_step.items() if math.isfinite(value))
  width = -(-len(points) // POINTS) or 1
  groups = [points[i : i + width] for i in range(0, len(points), width)]
  return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


def _chart(points: Sequence[tuple[int, float]], *, height: int, label: str, smooth: bool) -> str:
  """A line over steps as SVG; `smooth` draws it faintly and a moving average over it."""
  width, left, right, top, bottom = 560, 52, 12, 8, 24
  last, highest = max(points[-1][0], 1), max(value for _, value in points)
  lowest = min(0.0, *(value for _, value in points))
  ticks = _ticks(lowest, highest, 4) if smooth else [lowest, highest]
  span = highest - lowest or 1.0
  x = lambda step: left + (width - left - right) * step / last
  y = lambda value: top + (height - top - bottom) * (1 - (value - lowest) / span)
  line = lambda values: " ".join(f"{x(step):.1f},{y(value):.1f}" for (step, _), value in zip(points, values))

  parts = []
  for tick in ticks:
    parts.append(
      f"<line class='grid' x1='{left}' x2='{width - right}' y1='{y(tick):.1f}' y2='{y(tick):.1f}'/>"
      f"<text x='{left - 8}' y='{y(tick) + 4:.1f}' text-anchor='end'>{_tick(tick)}</text>"
    )
  for tick in _ticks(0, last, 5):
    parts.append(f"<text x='{x(tick):.1f}' y='{height - 6}' text-anchor='middle'>{tick:,.0f}</text>")
  values = [value for _, value in points]
  if smooth and len(points) >= 20:
    parts.append(f"<polyline class='raw' points='{line(values)}'/>")
    values = _moving_average(values)
  parts.append(f"<polyline class='line' points='{line(values)}'/>")
  end = f"<circle class='end' cx='{x(points[-1][0]):.1f}' cy='{y(values[-1]):.1f}' r='4'/>"
  return (
    f"<svg viewBox='0 0 {width} {height}' role='img' aria-label='{escape(label)}'>"
    f"<title>{escape(label)}: {points[0][1]:.4g} at step {points[0][0]:,}, "
    f"{points[-1][1]:.4g} at step {points[-1][0]:,}</title>{''.join(parts)}{end}</svg>"
  )


def _moving_average(values: Sequence[float]) -> list[float]:
  """The mean of each value's neighbours, as many on both sides, so that the curve is not moved along the steps."""
  radius = max(2, len(values) // 40)
  means = []
  for i in range(len(values)):
    reach = min(radius, i, len(values) - 1 - i)
    means.append(sum(values[i - reach : i + reach + 1]) / (2 * reach + 1))
  return means


def _ticks(low: float, high: float, count: int) -> list[float]:
  """About `count` round numbers from `low` to `high`."""
  if high <= low:
    return [low]
  rough = (high - low) / count
  unit = 10.0 ** math.floor(math.log10(rough))
  step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough * 0.999)
  return [round(i * step, 12) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _tick(value: float) -> str:
  return f"{value:.1e}" if 0 < abs(value) < 0.01 else f"{value:g}"


def _scores(scores: Mapping[str, Mapping], predictions: Sequence[Prediction]) -> str:
  """The table of exact match: a row for each kind of question, two columns for each stage."""
  if not scores:
    return ""
  prefix = "eval/exact_match/"
  kinds = sorted({key.removeprefix(prefix) for row in scores.values() for key in row if key.startswith(prefix)})
  counts = collections.Counter(prediction.question.category for prediction in predictions)
  head = "".join(f"<th colspan='2' scope='colgroup'>{escape(stage)}</th>" for stage in scores)
  subhead = "<th scope='col'>exact match</th><th scope='col' class='number'>blanked</th>" * len(scores)
  lines = []
  for kind in ["", *kinds]:
    suffix, count = (f"/{kind}", counts[kind]) if kind else ("", len(predictions))
    cells = "".join(
      _score_cells(row.get(f"eval/exact_match{suffix}"), row.get(f"eval/blank{suffix}")) for row in scores.values()
    )
    lines.append(
      f"<tr{'' if kind else ' class=total'}><th scope='row'>{escape(kind or 'all questions')}</th>"
      f"<td class='number'>{f'{count:,}' if count else '&ndash;'}</td>{cells}</tr>"
    )
  return (
    f"<section><h2>Exact match by kind of question</h2><p class='note'>Held-out questions, answered greedily. "
    f"The bar is the share of answers that are exactly the gold answer; the mark on it, and the column beside "
    f"it, is the same with every picture replaced by a plain one: what can be guessed from the text alone.</p>"
    f"<div class='scroll'><table><thead><tr><th rowspan='2' scope='col'>kind</th>"
    f"<th rowspan='2' scope='col' class='number'>questions</th>{head}</tr>"
    f"<tr>{subhead}</tr></thead><tbody>{''.join(lines)}</tbody></table></div></section>"
  )


def _score_cells(score: float | None, blank: float | None) -> str:
  if score is None:
    return "<td>&ndash;</td><td class='number'>&ndash;</td>"
  mark = "" if blank is None else f"<i style='left:{100 * blank:.1f}%'></i>"
  return (
    f"<td><div class='score'><div class='bar'><b style='width:{100 * score:.1f}%'></b>{mark}</div>"
    f"<span>{_percent(score)}</span></div></td>"
    f"<td class='number'>{'&ndash;' if blank is None else _percent(blank)}</td>"
  )


def _gallery(predictions: Sequence[Prediction]) -> str:
  shown = _choose(predictions, PICTURES)
  if not shown:
    return ""
  right = sum(prediction.correct for prediction in shown)
  return (
    f"<section><h2>Held-out pictures</h2><p class='note'>{len(shown)} questions at even distances through each "
    f"kind, not picked by their answers; {right} of them are right.</p>"
    f"<div class='gallery'>{''.join(map(_card, shown))}</div></section>"
  )


def _choose(predictions: Sequence[Prediction], count: int) -> list[Prediction]:
  """Up to `count` predictions with pictures, kinds in turn, each kind's at even distances, new pictures first."""
  kinds = collections.defaultdict(list)
  for prediction in predictions:
    if prediction.question.images:
      kinds[prediction.question.category].append(prediction)
  share = -(-count // len(kinds)) if kinds else 0
  chosen, pictures = [], set()
  for turn in range(share):
    for kind in sorted(kinds):
      group = kinds[kind]
      start, stop = turn * len(group) // share, (turn + 1) * len(group) // share
      if start < stop and len(chosen) < count:
        fresh = [prediction for prediction in group[start:stop] if prediction.question.images not in pictures]
        chosen.append((fresh or group[start:stop])[0])
        pictures.add(chosen[-1].question.images)
  return chosen


def _card(prediction: Prediction) -> str:
  question = prediction.question
  pictures = "".join(
    f"<img src='{_data_uri(path)}' alt='{escape(os.path.basename(path))}'>" for path in question.images
  )
  status, word = ("right", "&#10003; right") if prediction.correct else ("wrong", "&#10007; wrong")
  lines = [("answer", prediction.answer), ("gold", question.gold)]
  if prediction.blank_answer is not None:
    lines.append(("blanked", prediction.blank_answer))
  facts = "".join(
    f"<dt>{name}</dt><dd class='{name}'>{escape(text.strip()) or '<em>nothing</em>'}</dd>" for name, text in lines
  )
  chip = f"<span class='chip'>{escape(question.category)}</span>" if question.category else "<span></span>"
  return (
    f"<article class='{status}'><div class='pictures'>{pictures}</div><div class='top'>{chip}"
    f"<span class='status'>{word}</span></div><p>{escape(question.text)}</p><dl>{facts}</dl></article>"
  )


def _data_uri(path: str) -> str:
  picture = images.load(path)
  picture.thumbnail((PICTURE_SIZE, PICTURE_SIZE), Image.Resampling.LANCZOS)
  buffer = io.BytesIO()
  picture.save(buffer, "PNG", optimize=True)
  return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _configuration(config: Config) -> str:
  """Every field of the configuration by its dotted path, as the command line would name it, folded away."""

  def fields(value, path):
    if isinstance(value, dict):
      return [entry for name, inner in value.items() for entry in fields(inner, f"{path}.{name}" if path else name)]
    return [(path, value)]

  rows = "".join(
    f"<tr><th scope='row'>{escape(path)}</th><td>{_setting(value)}</td></tr>"
    for path, value in fields(dataclasses.asdict(config), "")
  )
  stages = "".join(
    f"<tr><th scope='row'>{escape(stage)}</th>{_stage_cells(getattr(config, stage))}</tr>"
    for stage in filter(None, config.stages.split(","))
    if hasattr(config, stage)
  )
  columns = "".join(f"<th scope='col'>{name}</th>" for name in ("stage", "data", "batch", "length", "LoRA", "trained"))
  return (
    f"<section><h2>Configuration</h2><div class='scroll'><table class='stages'><thead><tr>{columns}</tr></thead>"
    f"<tbody>{stages}</tbody></table></div><details><summary>Every field</summary><div class='scroll'>"
    f"<table class='fields'><tbody>{rows}</tbody></table></div></details></section>"
  )


def _stage_cells(stage) -> str:
  if isinstance(stage, VdimStage):
    data = f"<code>{escape(stage.data.path)}</code><br>{stage.steps:,} steps, {stage.jitters} views of each image"
    trained = f"VDIM and its heads at {stage.learning_rate:g}, {escape(stage.optimizer)}"
    cells = (data, f"{stage.batch_size:,}", "&ndash;", "none", trained)
    return "".join(f"<td>{cell}</td>" for cell in cells)
  amount = f"{stage.steps:,} steps" if stage.steps else f"{stage.epochs:g} epoch{'' if stage.epochs == 1 else 's'}"
  lora = f"rank {stage.lora.rank}, alpha {stage.lora.alpha:g}" if stage.lora.rank else "none"
  trained = "<br>".join(f"<code>{escape(pattern)}</code> at {rate:g}" for pattern, rate in stage.parameters if rate)
  data = f"<code>{escape(stage.data.path)}</code><br>{amount}, {escape(stage.data.template)}"
  cells = (data, f"{stage.batch_size:,}", f"{stage.data.max_length:,}", lora, trained or "nothing")
  return "".join(f"<td>{cell}</td>" for cell in cells)


def _setting(value: Any) -> str:
  return "<em>empty</em>" if value in ("", ()) else escape(str(value))


def _percent(fraction: float) -> str:
  return f"{100 * fraction:.1f}&thinsp;%"


STYLE = """
:root { --page:#f6f5f2; --card:#fffefb; --ink:#1c1b19; --soft:#66635d; --line:#e2dfd8; --accent:#2a6fc9;
  --track:#e9e6df;
  --right:#1d7a3c; --wrong:#b3261e; --shade:0 1px 2px rgb(40 35 20/.06), 0 6px 20px rgb(40 35 20/.05) }
@media (prefers-color-scheme: dark) { :root { --page:#141413; --card:#1e1e1c; --ink:#efede8; --soft:#a39f97;
  --line:#34332f;
  --accent:#6aa6f0; --track:#33322e; --right:#6ccf8c; --wrong:#ff8a80; --shade:none } }
* { box-sizing:border-box }
body { margin:0; background:var(--page); color:var(--ink);
  font:16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif }
main { max-width:1180px; margin:0 auto; padding:56px 24px 80px }
h1 { font-size:2.3rem; line-height:1.15; letter-spacing:-.02em; margin:0 0 .5rem; text-wrap:balance }
h2 { font-size:1.3rem; letter-spacing:-.01em; margin:0 0 .6rem }
h4 { margin:.9rem 0 .2rem; font-size:.78rem; font-weight:500; color:var(--soft) }
section { margin-top:52px }
.flow { margin:0; color:var(--soft) } .flow b { font-weight:500; color:var(--ink) }
.note { color:var(--soft); max-width:72ch; margin:0 0 1.1rem; font-size:.94rem }
.tiles { display:grid; grid-template-columns:repeat(auto-fit, minmax(190px, 1fr)); gap:16px; margin-top:34px }
.tile, .panel, article, .scroll { background:var(--card); border:1px solid var(--line); border-radius:12px;
  box-shadow:var(--shade) }
.tile { padding:16px 20px; display:flex; flex-direction:column }
.tile span, .tile small { color:var(--soft); font-size:.86rem } .tile strong { font-size:2.1rem; line-height:1.3;
  font-weight:600 }
.panels { display:grid; grid-template-columns:repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap:20px }
.panel { margin:0; padding:18px 20px 12px; max-width:760px } figcaption { font-weight:600 }
svg { display:block; width:100%; height:auto } svg text { font-size:12px; fill:var(--soft);
  font-variant-numeric:tabular-nums }
.grid { stroke:var(--line) } polyline { fill:none; stroke:var(--accent); stroke-width:2; stroke-linejoin:round }
polyline.raw { opacity:.28; stroke-width:1.2 } .end { fill:var(--accent); stroke:var(--card); stroke-width:2 }
.scroll { overflow-x:auto } table { border-collapse:collapse; width:100%; font-size:.93rem }
th, td { text-align:left; padding:9px 16px; border-bottom:1px solid var(--line); font-weight:400;
  vertical-align:middle }
thead th { color:var(--soft); font-size:.84rem; padding-block:7px } thead th[colspan] { color:var(--ink);
  font-weight:600 }
tbody tr:last-child > * { border-bottom:0 } .total > * { font-weight:600; white-space:nowrap }
.number { text-align:right; white-space:nowrap; font-variant-numeric:tabular-nums } .score { display:flex;
  align-items:center; gap:12px }
.score span { white-space:nowrap; font-variant-numeric:tabular-nums; min-width:4.2em; text-align:right }
.bar { position:relative; flex:1; min-width:90px; height:10px; border-radius:5px; background:var(--track) }
.bar b { display:block; height:100%; border-radius:5px; background:var(--accent) }
.bar i { position:absolute; top:-4px; bottom:-4px; width:4px; margin-left:-2px; background:var(--ink);
  border:1px solid var(--card) }
.gallery { display:grid; grid-template-columns:repeat(auto-fill, minmax(240px, 1fr)); gap:20px }
article { overflow:hidden; display:flex; flex-direction:column; padding-bottom:14px }
.pictures { display:flex; background:#0d0d0c } .pictures img { flex:1; min-width:0; width:100%; aspect-ratio:1;
  object-fit:contain }
.top { display:flex; justify-content:space-between; align-items:center; gap:8px; padding:12px 16px 0; font-size:.82rem }
.chip { color:var(--soft); border:1px solid var(--line); border-radius:99px; padding:1px 9px; overflow-wrap:anywhere }
.status { font-weight:600; white-space:nowrap } .right .status { color:var(--right) }
.wrong .status { color:var(--wrong) }
article.wrong { border-style:dashed; border-color:var(--wrong) }
article p { margin:8px 16px 10px; font-weight:500; line-height:1.4; overflow-wrap:anywhere }
dl { display:grid; grid-template-columns:auto 1fr; gap:2px 12px; margin:auto 16px 0; font-size:.92rem }
dt { color:var(--soft) } dd { margin:0; overflow-wrap:anywhere }
.wrong dd.answer { text-decoration:underline wavy var(--wrong) 1px }
dd.blanked, em { color:var(--soft) } code { font:.88em/1.4 ui-monospace, "SF Mono", Menlo, Consolas, monospace;
  overflow-wrap:anywhere }
.stages td, .stages th { vertical-align:top } .stages tbody th { font-weight:600 }
details { margin-top:16px } summary { cursor:pointer; color:var(--soft); margin-bottom:12px }
.fields th { font:.84em ui-monospace, "SF Mono", Menlo, Consolas, monospace; color:var(--soft); width:1%;
  white-space:nowrap }
.fields td { font:.84em ui-monospace, "SF Mono", Menlo, Consolas, monospace; overflow-wrap:anywhere }
  .fields :is(th, td) { padding-block:4px }
@media print { body { background:none } section { break-inside:avoid } }
"""
