"""The tables of a suite: table.json for programs, table.md for papers, table.html with a plot for people."""

import html
import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

from mllm_jax.ablation.plan import Run, budgets
from mllm_jax.ablation.results import BLANK, SCORE, Figure, Result, of_row
from mllm_jax.page import PAGE

escape = html.escape
HEADS = (
  "Exact match, %",
  "Blanked, %",
  "Projector, M",
  "Visual tokens",
  "GFLOP an image",
  "Seconds a step",
  "Trained tokens, k",
  "Seeds",
)


def write(suite: str, workdir: Path, runs: Sequence[Run], failed: Sequence[Run], kinds: bool) -> str:
  """Writes the three files of all rows, done or not, and returns the Markdown.

  runs: of the suite, all of them. failed: those of them that failed now. kinds: whether the Markdown has a table by
  kind of question too; the others always have the figures.
  """
  by_label = {}
  for run in runs:
    if not run.trains_vdim:
      by_label.setdefault(run.label, []).append(run)
  found = [of_row(of_label, failed) for of_label in by_label.values()]
  equal, differ = budgets(runs)
  options = {label: list(of_label[0].options) for label, of_label in by_label.items()}
  content = {
    "suite": suite,
    "equal": equal,
    "different": differ,
    "rows": [row.to_json() | {"options": options[row.label]} for row in found],
  }
  text = markdown(suite, found, equal, differ, kinds)
  _replace(workdir / "table.json", json.dumps(content, indent=1) + "\n")
  _replace(workdir / "table.md", text)
  _replace(workdir / "table.html", page(suite, found, equal, differ, options))
  return text


def markdown(suite: str, rows: Sequence[Result], equal: dict, differ: dict, kinds: bool) -> str:
  lines = [f"# {suite}", "", *_markdown_table(["", *HEADS], [[row.label, *cells(row)] for row in rows])]
  if kinds and (names := kinds_of(rows)):
    table = [[row.label, *(score(row, f"{SCORE}/{name}") for name in names)] for row in rows]
    lines += ["", *_markdown_table(["Exact match, %", *names], table)]
  return "\n".join([*lines, "", *notes(rows, equal, differ)]) + "\n"


def _markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
  line = lambda parts: "| " + " | ".join(parts) + " |"
  return [line(heads), "|---" * len(heads) + "|", *map(line, rows)]


def cells(row: Result) -> list[str]:
  """A row's figures as people read them, under HEADS."""
  states = [", ".join(map(str, row.seeds))]
  states += [f"{word}: {', '.join(map(str, seeds))}" for word, seeds in _undone(row) if seeds]
  seeds = "; ".join(filter(None, states))
  if not row.seeds:
    return ["–"] * (len(HEADS) - 1) + [seeds]
  return [
    score(row, SCORE),
    score(row, BLANK),
    f"{row.projector_parameters / 1e6:.3g}",
    f"{row.visual_tokens:,}",
    f"{row.flops / 1e9:.3g}",
    f"{row.seconds_a_step.mean:.3g}",
    f"{row.trained_tokens.mean / 1e3:.0f}",
    seeds,
  ]


def _undone(row: Result) -> tuple[tuple[str, tuple[int, ...]], ...]:
  return ("failed", row.failed), ("not done", row.waiting)


def score(row: Result, name: str) -> str:
  """Mean and spread of a share in percent."""
  figure = row.scores.get(name)
  return percent(figure) if figure else "–"


def percent(figure: Figure) -> str:
  text = f"{100 * figure.mean:.1f}"
  return text if figure.spread is None else f"{text} ± {100 * figure.spread:.1f}"


def kinds_of(rows: Sequence[Result]) -> list[str]:
  """Kinds of question that were asked."""
  names = {name for row in rows for name in row.scores}
  return sorted(name.removeprefix(f"{SCORE}/") for name in names if name.startswith(f"{SCORE}/"))


def sampling_error(row: Result) -> float:
  """Standard error of a row's score by the choice of questions alone, which its seeds share."""
  share = row.scores[SCORE].mean
  return math.sqrt(share * (1 - share) / row.questions)


def notes(rows: Sequence[Result], equal: dict, differ: dict) -> list[str]:
  """What must be known to read the table."""
  done = [row for row in rows if row.seeds]
  many = any(len(row.seeds) > 1 for row in rows)
  lines = [
    "Greedy answers to held-out questions about the demo's digits"
    + (", mean ± standard deviation over seeds. " if many else ". ")
    + "Blanked: the same questions with every picture replaced by a plain one. FLOPs of one image at its largest "
    "resolution, as `python -m mllm_jax.compile --summary` counts them. Seconds a step and trained tokens are the last "
    "stage's, the seconds with whatever else this machine had to do.",
  ]
  if done:
    error = 100 * max(map(sampling_error, done))
    lines.append(
      f"{done[0].questions:,} questions leave a standard error of up to {error:.1f} in each "
      "score, whatever the seeds' spread" + ("." if many else ", of which one seed tells nothing.")
    )
  same = ", ".join(f"{name} {value}" for name, value in equal.items())
  data = "data, questions, " if "demo_shapes" in equal else ""
  lines.append(f"The same for all rows: seeds, {data}{same}.")
  for name, values in differ.items():
    lines.append(
      f"Not the same, {name}: " + "; ".join(f"{value} ({', '.join(of)})" for value, of in values.items()) + "."
    )
  return [part for line in lines for part in (line, "")][:-1]


def page(suite: str, rows: Sequence[Result], equal: dict, differ: dict, options: dict[str, list[str]]) -> str:
  """The HTML."""
  marked = [re.sub("`(.+?)`", r"<code>\1</code>", escape(line)) for line in notes(rows, equal, differ) if line]
  texts = "".join(f"<p class='note'>{line}</p>" for line in marked)
  names = kinds_of(rows)
  kinds = [[row.label, *(score(row, f"{SCORE}/{name}") for name in names)] for row in rows]
  commands = [[label, " ".join(each)] for label, each in options.items()]
  body = [
    f"<header><h1>{escape(suite)}</h1></header>",
    plot([row for row in rows if row.seeds]),
    _html_table(["", *HEADS], [[row.label, *cells(row)] for row in rows]),
    texts,
    "<details><summary>Exact match by kind of question, %</summary>" + _html_table(["", *names], kinds) + "</details>"
    if names
    else "",
    "<details><summary>The trainer's options</summary>" + _html_table(["", ""], commands, "left") + "</details>",
  ]
  return PAGE.format(title=escape(f"{suite}: ablation"), style=STYLE, body="\n".join(filter(None, body)))


def _html_table(heads: Sequence[str], rows: Sequence[Sequence[str]], style: str = "") -> str:
  head = "".join(f"<th scope='col'>{escape(name)}</th>" for name in heads)
  body = "".join(
    f"<tr><th scope='row'>{escape(label)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in rest)}</tr>"
    for label, *rest in rows
  )
  table = f"<table class='{style}'><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
  return f"<div class='scroll'>{table}</div>"


def plot(rows: Sequence[Result]) -> str:
  """Rows as lines of a plot: a bar at the mean score, a dot for each seed, and the interval in which 95 % of such
  samples of questions leave the score. The axis is cut to what is there."""
  if not rows:
    return ""
  reach = [1.96 * sampling_error(row) for row in rows]
  marks = [value for row in rows for value in row.scores[SCORE].values]
  means = [row.scores[SCORE].mean for row in rows]
  low = max(0, math.floor(100 * min([*marks, *(mean - r for mean, r in zip(means, reach))])))
  high = min(100, math.ceil(100 * max([*marks, *(mean + r for mean, r in zip(means, reach))])))
  high = max(high, low + 1)
  width, left, right, line, top = 900, 40 + 7 * max(len(row.label) for row in rows), 100, 36, 12
  bottom = top + line * len(rows)
  x = lambda share: left + (width - left - right) * (min(max(100 * share, low), high) - low) / (high - low)
  step = next(step for step in (1, 2, 5, 10, 20) if (high - low) / step <= 10)
  parts = [
    f"<line class='grid' x1='{x(tick / 100):.1f}' x2='{x(tick / 100):.1f}' y1='{top}' y2='{bottom}'/>"
    f"<text x='{x(tick / 100):.1f}' y='{bottom + 20}' text-anchor='middle'>{tick}</text>"
    for tick in range(-(-low // step) * step, high + 1, step)
  ]
  for i, (row, mean, r) in enumerate(zip(rows, means, reach)):
    y = top + line * (i + 0.5)
    seeds = "".join(f"<circle class='seed' cx='{x(v):.1f}' cy='{y}' r='4'/>" for v in row.scores[SCORE].values)
    parts.append(
      f"<g><title>{escape(row.label)}: {percent(row.scores[SCORE])} %</title>"
      f"<text class='label' x='{left - 14}' y='{y + 4}' text-anchor='end'>{escape(row.label)}</text>"
      f"<line class='reach' x1='{x(mean - r):.1f}' x2='{x(mean + r):.1f}' y1='{y}' y2='{y}'/>"
      f"<line class='mean' x1='{x(mean):.1f}' x2='{x(mean):.1f}' y1='{y - 11}' y2='{y + 11}'/>{seeds}"
      f"<text class='label' x='{width - right + 14}' y='{y + 4}'>{percent(row.scores[SCORE])}</text></g>"
    )
  caption = "Exact match, %: the mean, each seed, and the middle 95 % of what another choice of questions would give"
  return (
    f"<figure class='panel'><figcaption>{caption}</figcaption><svg viewBox='0 0 {width} {bottom + 28}' role='img' "
    f"aria-label='{caption}'>{''.join(parts)}</svg></figure>"
  )


def _replace(path: Path, text: str) -> None:
  partial = path.with_name(path.name + ".partial")
  partial.write_text(text, encoding="utf-8")
  os.replace(partial, path)


STYLE = """
:root { --page:#f6f5f2; --card:#fffefb; --ink:#1c1b19; --soft:#66635d; --line:#e2dfd8; --accent:#2a6fc9 }
@media (prefers-color-scheme: dark) { :root { --page:#141413; --card:#1e1e1c; --ink:#efede8; --soft:#a39f97;
  --line:#34332f; --accent:#6aa6f0 } }
* { box-sizing:border-box }
body { margin:0; background:var(--page); color:var(--ink);
  font:16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif }
main { max-width:1180px; margin:0 auto; padding:56px 24px 80px }
h1 { font-size:2.3rem; line-height:1.15; letter-spacing:-.02em; margin:0 0 1.4rem }
.panel, .scroll { background:var(--card); border:1px solid var(--line); border-radius:12px; margin:0 0 20px }
.panel { padding:18px 20px 12px } figcaption { font-weight:600; margin-bottom:8px }
svg { display:block; width:100%; height:auto } svg text { font-size:13px; fill:var(--soft);
  font-variant-numeric:tabular-nums } svg .label { fill:var(--ink) }
.grid { stroke:var(--line) } .reach { stroke:var(--soft); stroke-width:1.5 }
.mean { stroke:var(--accent); stroke-width:3 } .seed { fill:var(--accent); stroke:var(--card); stroke-width:1.5 }
.scroll { overflow-x:auto } table { border-collapse:collapse; width:100%; font-size:.93rem }
th, td { padding:9px 14px; border-bottom:1px solid var(--line); font-weight:400; text-align:right;
  white-space:nowrap; font-variant-numeric:tabular-nums }
thead th { color:var(--soft); font-size:.84rem; white-space:normal; vertical-align:bottom }
tbody th { text-align:left } tbody tr:last-child > * { border-bottom:0 }
.left td { text-align:left; white-space:normal; overflow-wrap:anywhere;
  font:.84em ui-monospace, "SF Mono", Menlo, Consolas, monospace }
.note { color:var(--soft); max-width:88ch; margin:0 0 .7rem; font-size:.94rem; overflow-wrap:anywhere }
details { margin-top:18px } summary { cursor:pointer; color:var(--soft); margin-bottom:12px }
"""
