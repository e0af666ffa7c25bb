"""What a model answered: exact match by kind of question, and pictures with questions and answers."""

import base64
import collections
import io
import os
from collections.abc import Mapping, Sequence
from html import escape

from PIL import Image

from mllm_jax.data import images
from mllm_jax.inference.evaluate import Prediction

PICTURES = 24
PICTURE_SIZE = 320  # pixels along the longer side; larger pictures are shrunk to it


def scores_table(scores: Mapping[str, Mapping], predictions: Sequence[Prediction]) -> str:
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
      score_cells(row.get(f"eval/exact_match{suffix}"), row.get(f"eval/blank{suffix}")) for row in scores.values()
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


def score_cells(score: float | None, blank: float | None) -> str:
  """The two cells of one stage: a bar with its mark, and what the text alone gives."""
  if score is None:
    return "<td>&ndash;</td><td class='number'>&ndash;</td>"
  mark = "" if blank is None else f"<i style='left:{100 * blank:.1f}%'></i>"
  return (
    f"<td><div class='score'><div class='bar'><b style='width:{100 * score:.1f}%'></b>{mark}</div>"
    f"<span>{percent(score)}</span></div></td>"
    f"<td class='number'>{'&ndash;' if blank is None else percent(blank)}</td>"
  )


def gallery(predictions: Sequence[Prediction]) -> str:
  """Held-out pictures with their questions and answers."""
  shown = choose(predictions, PICTURES)
  if not shown:
    return ""
  right = sum(prediction.correct for prediction in shown)
  return (
    f"<section><h2>Held-out pictures</h2><p class='note'>{len(shown)} questions at even distances through each "
    f"kind, not picked by their answers; {right} of them are right.</p>"
    f"<div class='gallery'>{''.join(map(card, shown))}</div></section>"
  )


def choose(predictions: Sequence[Prediction], count: int) -> list[Prediction]:
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


def card(prediction: Prediction) -> str:
  """One question."""
  question = prediction.question
  pictures = "".join(f"<img src='{data_uri(path)}' alt='{escape(os.path.basename(path))}'>" for path in question.images)
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


def data_uri(path: str) -> str:
  """A picture as a part of the page."""
  picture = images.load(path)
  picture.thumbnail((PICTURE_SIZE, PICTURE_SIZE), Image.Resampling.LANCZOS)
  buffer = io.BytesIO()
  picture.save(buffer, "PNG", optimize=True)
  return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def percent(fraction: float) -> str:
  """A share for people."""
  return f"{100 * fraction:.1f}&thinsp;%"
