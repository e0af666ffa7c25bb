"""What an evaluation found: report.json for programs, report.html for people, one file with its pictures inside."""

import base64
import collections
import html
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from mllm_jax.benchmarks.average import averages
from mllm_jax.benchmarks.question import Result
from mllm_jax.benchmarks.scoring import Scored
from mllm_jax.page import PAGE

FAILURES = 6  # shown of each benchmark
PICTURE_SIZE = 320  # pixels along the longer side
TEXT = 600  # characters of a question or an answer that are shown

escape = html.escape


def write(folder: Path, model: str, fingerprint: str, scored: Sequence[Scored], others: Mapping[str, float]) -> None:
  """Writes both files whole.

  Args:
    folder: where they go.
    model: its name.
    fingerprint: of its parameters.
    scored: the benchmarks.
    others: scores by name that servers gave, for the averages.
  """
  means = averages(scores(scored) | others)
  content = {
    "model": model,
    "fingerprint": fingerprint,
    "averages": means,
    "from_servers": dict(others),
    "benchmarks": {entry.benchmark.name: _entry(entry) for entry in scored},
  }
  _replace(folder / "report.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
  sections = {entry.benchmark.name: _section(entry) for entry in scored}
  body = [_header(model, fingerprint, means, scored), _table(scored, others, sections), *sections.values()]
  _replace(folder / "report.html", PAGE.format(title=escape(f"{model}: benchmarks"), style=STYLE, body="\n".join(body)))


def scores(scored: Sequence[Scored]) -> dict[str, float]:
  """Every score of a whole benchmark by its name, and those of categories by NAME/CATEGORY."""
  found = {}
  for entry in scored:
    if entry.summary is not None and len(entry.results) == entry.of:
      found[entry.benchmark.name] = entry.summary.score
      found |= {f"{entry.benchmark.name}/{name}": value for name, value in entry.summary.categories.items()}
  return found


def _entry(entry: Scored) -> dict:
  benchmark, summary = entry.benchmark, entry.summary
  content = {
    "title": benchmark.title,
    "metric": benchmark.metric,
    "prompt": benchmark.prompt,
    "questions": len(entry.results),
    "of": entry.of,
    "settings": dict(entry.settings),
  }
  if summary is not None:
    content |= {
      "score": summary.score,
      "highest": benchmark.full,
      "details": dict(summary.details),
      "categories": dict(summary.categories),
    }
  return content | ({"submission": entry.submission} if entry.submission else {})


def _replace(path: Path, text: str) -> None:
  beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
  beside.write_text(text, encoding="utf-8")
  os.replace(beside, path)


def _facts(scored: Sequence[Scored]) -> list[str]:
  """The settings, and which benchmarks have which where they differ."""
  facts = []
  for name in scored[0].settings:
    values = {entry.settings[name]: [] for entry in scored}
    for entry in scored:
      values[entry.settings[name]].append(entry.benchmark.name)
    told = [f"{value} ({', '.join(names)})" if len(values) > 1 else f"{value}" for value, names in values.items()]
    facts.append(f"{name} {'; '.join(told)}")
  return facts


def _header(model: str, fingerprint: str, means: Mapping[str, float], scored: Sequence[Scored]) -> str:
  tiles = [(name, f"{value:.1f}", "mean of its benchmarks") for name, value in means.items()]
  count = sum(len(entry.results) for entry in scored)
  tiles.append(("Questions", f"{count:,}", f"of {len(scored)} benchmark{'s' * (len(scored) != 1)}"))
  cards = "".join(
    f"<div class='tile'><span>{escape(name)}</span><strong>{value}</strong><small>{note}</small></div>"
    for name, value, note in tiles
  )
  facts = ", ".join([f"fingerprint {fingerprint}", *_facts(scored)])
  return f"<header><h1>{escape(model)}</h1><p class='note'>{escape(facts)}</p><div class='tiles'>{cards}</div></header>"


def _table(scored: Sequence[Scored], others: Mapping[str, float], sections: Mapping[str, str]) -> str:
  rows = []
  for entry in scored:
    benchmark, summary = entry.benchmark, entry.summary
    part = "" if len(entry.results) == entry.of else f" of {entry.of:,}"
    if summary is None:
      cell = f"<td class='note'>{escape(entry.submission)}</td>"
    else:
      cell = f"<td>{_bar(summary.score, benchmark.full)}</td>"
    title = escape(benchmark.title)
    linked = f"<a href='#{escape(benchmark.name)}'>{title}</a>" if sections[benchmark.name] else title
    cells = (
      f"<td class='number'>{len(entry.results):,}{part}</td>{cell}<td class='note'>{escape(benchmark.metric)}</td>"
    )
    rows.append(f"<tr><th scope='row'>{linked}</th>{cells}</tr>")
  for name, value in others.items():
    cells = f"<td class='number'>&ndash;</td><td>{_bar(value, 100)}</td><td class='note'>given by its server</td>"
    rows.append(f"<tr><th scope='row'>{escape(name)}</th>{cells}</tr>")
  head = "<th>benchmark</th><th class='number'>questions</th><th class='wide'>score</th><th>metric</th>"
  return (
    f"<section><h2>Scores</h2><div class='scroll'><table><thead><tr>{head}</tr></thead>"
    f"<tbody>{''.join(rows)}</tbody></table></div></section>"
  )


def _bar(value: float, full: float) -> str:
  share = min(100.0, max(0.0, 100 * value / full))
  return (
    f"<div class='score'><div class='bar'><b style='width:{share:.1f}%'></b></div>"
    f"<span>{_number(value)}{'' if full == 100 else f' / {full:g}'}</span></div>"
  )


def _number(value: float) -> str:
  return f"{value:.1f}"


def _section(entry: Scored) -> str:
  benchmark, summary = entry.benchmark, entry.summary
  parts = []
  if summary is not None and summary.details:
    facts = "".join(
      f"<div><dt>{escape(name)}</dt><dd>{_number(value)}</dd></div>" for name, value in summary.details.items()
    )
    parts.append(f"<dl class='facts'>{facts}</dl>")
  if summary is not None and len(summary.categories) > 1:
    full = 200 if benchmark.name == "mme" else 100
    rows = "".join(
      f"<tr><th scope='row'>{escape(name)}</th><td class='wide'>{_bar(value, full)}</td></tr>"
      for name, value in summary.categories.items()
    )
    parts.append(f"<div class='scroll'><table><tbody>{rows}</tbody></table></div>")
  shown = _failures(entry.results)
  if shown:
    wrong = sum(result.credit is not None and result.credit < 0.5 for result in entry.results)
    parts.append(
      f"<h3>{len(shown)} of {wrong:,} wrong answers</h3><div class='gallery'>{''.join(map(_card, shown))}</div>"
    )
  if not parts:
    return ""
  title = f"<h2>{escape(benchmark.title)}</h2><p class='note'>Asked: {escape(benchmark.prompt)}.</p>"
  return f"<section id='{escape(benchmark.name)}'>{title}{''.join(parts)}</section>"


def _failures(results: Sequence[Result]) -> list[Result]:
  """Up to FAILURES answers with less than half the credit, at even distances through the benchmark."""
  wrong = [result for result in results if result.credit is not None and result.credit < 0.5]
  count = min(FAILURES, len(wrong))
  return [wrong[number * len(wrong) // count] for number in range(count)]


def _card(result: Result) -> str:
  question = result.question
  pictures = "".join(f"<img src='{_thumbnail(picture)}' alt=''>" for picture in question.images[:3])
  lines = [("answer", result.answer), ("gold", _gold(question.gold)), ("verdict", result.verdict)]
  facts = "".join(
    f"<dt>{name}</dt><dd class='{name}'>{escape(_short(text)) or '<em>nothing</em>'}</dd>"
    for name, text in lines
    if text or name != "verdict"
  )
  chip = f"<span class='chip'>{escape(question.category)}</span>" if question.category else ""
  asked = f"<p>{escape(_short(question.prompt))}</p>"
  return f"<article><div class='pictures'>{pictures}</div>{chip}{asked}<dl>{facts}</dl></article>"


def _gold(gold) -> str:
  """A gold answer as text; of many people's each once, with how many gave it."""
  if isinstance(gold, list):
    counts = collections.Counter(gold).most_common()
    return ", ".join(f"{text} ({count})" if count > 1 else text for text, count in counts)
  return gold if isinstance(gold, str) else json.dumps(gold)


def _short(text: str) -> str:
  return text if len(text) <= TEXT else f"{text[:TEXT]} ..."


def _thumbnail(picture) -> str:
  image = picture.load()
  image.thumbnail((PICTURE_SIZE, PICTURE_SIZE), Image.Resampling.LANCZOS)
  buffer = io.BytesIO()
  image.save(buffer, "JPEG", quality=82)
  return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


STYLE = """
:root { --page:#f6f5f2; --card:#fffefb; --ink:#1c1b19; --soft:#66635d; --line:#e2dfd8; --accent:#2a6fc9;
  --track:#e9e6df; --wrong:#b3261e; --shade:0 1px 2px rgb(40 35 20/.06), 0 6px 20px rgb(40 35 20/.05) }
@media (prefers-color-scheme: dark) { :root { --page:#141413; --card:#1e1e1c; --ink:#efede8; --soft:#a39f97;
  --line:#34332f; --accent:#6aa6f0; --track:#33322e; --wrong:#ff8a80; --shade:none } }
* { box-sizing:border-box }
body { margin:0; background:var(--page); color:var(--ink);
  font:16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif }
main { max-width:1180px; margin:0 auto; padding:56px 24px 80px }
h1 { font-size:2.1rem; line-height:1.2; letter-spacing:-.02em; margin:0 0 .4rem; overflow-wrap:anywhere }
h2 { font-size:1.3rem; letter-spacing:-.01em; margin:0 0 .4rem } h3 { font-size:1rem; margin:1.6rem 0 .8rem }
section { margin-top:52px } .note { color:var(--soft); margin:0 0 1rem; font-size:.92rem } td.note { min-width:12em }
.tiles { display:grid; grid-template-columns:repeat(auto-fill, minmax(190px, 1fr)); gap:16px; margin-top:26px }
.tile, .scroll, article { background:var(--card); border:1px solid var(--line); border-radius:12px;
  box-shadow:var(--shade) }
.tile { padding:16px 20px; display:flex; flex-direction:column }
.tile span, .tile small { color:var(--soft); font-size:.86rem }
.tile strong { font-size:2.1rem; line-height:1.3; font-weight:600 }
.scroll { overflow-x:auto } table { border-collapse:collapse; width:100%; font-size:.93rem }
th, td { text-align:left; padding:9px 16px; border-bottom:1px solid var(--line); font-weight:400 }
thead th { color:var(--soft); font-size:.84rem; padding-block:7px } tbody tr:last-child > * { border-bottom:0 }
.number { text-align:right; white-space:nowrap; font-variant-numeric:tabular-nums } .wide { width:45% }
.score { display:flex; align-items:center; gap:12px }
.score span { white-space:nowrap; font-variant-numeric:tabular-nums; min-width:6.4em; text-align:right }
.bar { flex:1; min-width:90px; height:10px; border-radius:5px; background:var(--track) }
.bar b { display:block; height:100%; border-radius:5px; background:var(--accent) }
.facts { display:flex; flex-wrap:wrap; gap:10px 36px; margin:0 0 1.2rem }
.facts dt { color:var(--soft); font-size:.84rem }
.facts dd { margin:0; font-variant-numeric:tabular-nums }
.gallery { display:grid; grid-template-columns:repeat(auto-fill, minmax(260px, 1fr)); gap:20px }
article { overflow:hidden; padding-bottom:14px }
.pictures { display:flex; background:#0d0d0c }
.pictures img { flex:1; min-width:0; width:100%; aspect-ratio:4/3; object-fit:contain }
.chip { display:inline-block; margin:12px 16px 0; color:var(--soft); border:1px solid var(--line); border-radius:99px;
  padding:1px 9px; font-size:.82rem; overflow-wrap:anywhere }
article p { margin:8px 16px 10px; font-weight:500; font-size:.93rem; line-height:1.4; white-space:pre-line;
  overflow-wrap:anywhere }
article dl { display:grid; grid-template-columns:auto 1fr; gap:2px 12px; margin:0 16px; font-size:.92rem }
article dt, em { color:var(--soft) } article dd { margin:0; overflow-wrap:anywhere }
dd.answer { text-decoration:underline wavy var(--wrong) 1px }
a { color:inherit; text-decoration-color:var(--line) }
@media print { body { background:none } article { break-inside:avoid } }
"""
