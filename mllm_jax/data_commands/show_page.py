"""The page of `show`: HTML without scripts and without anything from elsewhere."""

import base64
import collections
import html
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from mllm_jax.batch import NEWLINE
from mllm_jax.data import chat
from mllm_jax.data.layout import RowArrays
from mllm_jax.data.processor import Processor
from mllm_jax.data.records import DataError, Sample
from mllm_jax.page import PAGE

escape = html.escape
SHOWN_IDS = 12  # of a long run of visual tokens, on hover


class Run(NamedTuple):
  """Neighbouring places that look the same. kind: "text", "trained", "visual"; cut: past max_length."""

  kind: str
  cut: bool
  start: int
  stop: int


def page(
  title: str,
  facts: Mapping[str, str],
  records: Sequence,
  chosen: Sequence[int],
  processor: Processor,
  limited: bool = True,
  seed: int = 0,
) -> str:
  """The whole page. A sample that cannot be used is shown with what is wrong with it; `limited`: having more images
  than a row of the processor has room for is wrong too. `seed`: of pictures that training enlarges."""
  cards = [_card(records, place, processor, limited, seed) for place in chosen]
  bad = sum("class='problem'" in card for card in cards)
  listed = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
  note = f"<p class='bad'>{bad} of these samples cannot be used.</p>" if bad else ""
  legend = "".join(
    f"<span class='key'><i class='t {kind}'></i>{text}</span>"
    for kind, text in (
      ("trained", "trained on"),
      ("text", "read only"),
      ("visual", "visual tokens"),
      ("text cut", "cut off"),
    )
  )
  body = (
    f"<header><h1>{escape(title)}</h1><dl class='facts'>{listed}</dl>{note}"
    f"<p class='legend'>{legend}<span class='soft'>Point at a token for its place and id.</span></p></header>"
    + "\n".join(cards)
  )
  return PAGE.format(title=escape(title), style=STYLE, body=body)


def _card(records: Sequence, place: int, processor: Processor, limited: bool, seed: int) -> str:
  try:
    sample = records[place]
  except DataError as error:
    return _article(f"sample {place}", "", "", _problem(error))
  name = f"sample {sample.index}"
  try:
    pictures = processor.pictures(sample, seed)
    encoded = chat.encode(sample.turns, processor.template, processor.tokenizer, len(pictures), sample.system)
    sizes = [picture.size for picture in pictures]
    places = processor.places(encoded, sizes)
    shown = "".join(_picture(picture, name, processor) for picture, name in zip(pictures, _names(sample)))
  except DataError as error:
    return _article(name, sample.id, "", _problem(error) + _raw(sample))
  problem = ""
  try:
    (processor if limited else processor.with_room(len(pictures))).row(sample, seed)
  except DataError as error:
    problem = _problem(error)
  tokens = f"<div class='tokens'>{''.join(_tokens(places, processor))}</div>"
  body = f"<div class='columns'><div class='pictures'>{shown}</div>{tokens}</div>" if shown else tokens
  return _article(name, sample.id, _counts(places, processor), problem + body)


def _article(name: str, identity: str, counts: str, body: str) -> str:
  title = f"<b>{escape(name)}</b>" + (f" <code>{escape(identity)}</code>" if identity else "")
  return f"<article><div class='top'><span>{title}</span>{counts}</div>{body}</article>"


def _problem(error: Exception) -> str:
  return f"<p class='problem'>{escape(str(error))}</p>"


def _raw(sample: Sample) -> str:
  """A sample that has no tokens, as it is in the file."""
  turns = "".join(f"<dt>{turn.role}</dt><dd>{escape(turn.text)}</dd>" for turn in sample.turns)
  names = "".join(f"<dt>image</dt><dd>{escape(name)}</dd>" for name in _names(sample))
  return f"<dl class='raw'>{names}{turns}</dl>"


def _names(sample: Sample) -> list[str]:
  """The paths of a sample's images; of images inside a record those that they came from."""
  known = sample.names or [""] * len(sample.images)
  return [image if isinstance(image, str) else name or "in the record" for image, name in zip(sample.images, known)]


def _counts(places: RowArrays, processor: Processor) -> str:
  """How long the sample is, and how much of it is trained on and cut off."""
  length, room = len(places.tokens), processor.max_length
  visual = int((places.visual_index != -1).sum())
  trained = int(places.loss_weights[: max(0, room - 1)].sum())  # the place before the first one past the end is not
  lost = int(places.loss_weights.sum()) - trained
  parts = [f"<b>{min(length, room):,}</b> of {room:,} places", f"{visual:,} visual", f"<b>{trained:,}</b> trained on"]
  if length > room:
    parts.append(f"<span class='bad'>{length - room:,} cut off, {lost:,} of them answers</span>")
  share = lambda count: f"{100 * min(count, room) / max(room, 1):.2f}%"
  bar = (
    f"<span class='meter' aria-hidden='true'><i class='visual' style='width:{share(visual)}'></i>"
    f"<i class='plain' style='width:{share(max(0, min(length, room) - visual - trained))}'></i>"
    f"<i class='trained' style='width:{share(trained)}'></i></span>"
  )
  return f"<span class='counts'>{' &middot; '.join(parts)}{bar}</span>"


def _runs(places: RowArrays, room: int) -> Iterator[Run]:
  """Places as they are drawn: each token of text by itself, neighbouring visual ones together."""
  trained = np.concatenate([[False], places.loss_weights[:-1] > 0])
  length = len(places.tokens)
  place = 0
  while place < length:
    stop = place + 1
    if places.visual_index[place] != -1:
      while stop < length and places.visual_index[stop] != -1 and (stop < room) == (place < room):
        stop += 1
      yield Run("visual", place >= room, place, stop)
    else:
      yield Run("trained" if trained[place] else "text", place >= room, place, stop)
    place = stop


def _tokens(places: RowArrays, processor: Processor) -> Iterator[str]:
  """Every place as a span, with line breaks where the text has them and a mark where the sample is cut."""
  texts, special = processor.tokenizer.token_texts(places.tokens), {*processor.tokenizer.specials.values()}
  marked = False
  for run in _runs(places, processor.max_length):
    if run.cut and not marked:
      marked = True
      yield f"<span class='end'>max_length {processor.max_length:,}</span>"
    kind = f"t {run.kind}{' cut' if run.cut else ''}"
    if run.kind == "visual":
      rows = places.visual_index[run.start : run.stop]
      newlines = int((rows == NEWLINE).sum())
      more = f", {newlines} of them newlines" if newlines else ""
      head = ", ".join(str(row) for row in rows[:SHOWN_IDS]) + (", ..." if len(rows) > SHOWN_IDS else "")
      title = f"places {run.start} to {run.stop - 1}: rows {head}"
      yield f"<span class='{kind}' title='{title}'>{len(rows):,} visual tokens{more}</span>"
      continue
    text, token = texts[run.start], int(places.tokens[run.start])
    title = f"place {run.start}: id {token}"
    classes = f"{kind} special" if token in special else kind
    shown = escape(text).replace("\n", "&#8629;").replace("\t", "&#8677;") or "&empty;"
    yield f"<span class='{classes}' title='{title}'>{shown}</span>" + "\n" * text.count("\n")


def _picture(picture: Image.Image, name: str, processor: Processor) -> str:
  """The crops of a picture as the tower gets them, a tiled one's in their grid."""
  aspect, (width, height) = processor.aspect, picture.size
  crops = aspect.crops(picture)
  shapes = collections.Counter(crop.shape[1::-1] for crop in crops)
  whole, grid = crops.pop(aspect.whole), ""
  if crops:
    pieces = "".join(f"<img src='{_data_uri(crop)}' alt=''>" for crop in crops)
    columns, _ = aspect.tiling(width, height)
    grid = f"<div class='grid' style='grid-template-columns:repeat({columns},1fr)'>{pieces}</div>"
  made = " + ".join(f"{count} &times; {w} &times; {h}" for (w, h), count in shapes.items())
  caption = f"{width} &times; {height} &rarr; {made}, {processor.image_cost(width, height)[1]:,} tokens"
  whole = f"<img src='{_data_uri(whole)}' alt='{escape(name)}'>"
  return f"<figure>{whole}{grid}<figcaption><code>{escape(name)}</code><br>{caption}</figcaption></figure>"


def _data_uri(pixels: np.ndarray) -> str:
  buffer = io.BytesIO()
  # Photographs as PNG make a page of 20 samples several megabytes; small pictures are kept to the pixel.
  if pixels.shape[0] > 128:
    Image.fromarray(pixels).save(buffer, "JPEG", quality=88)
    kind = "jpeg"
  else:
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    kind = "png"
  return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


STYLE = """
:root { --page:#f6f5f2; --card:#fffefb; --ink:#1c1b19; --soft:#66635d; --line:#e2dfd8; --wrong:#b3261e;
  --trained:#cdebd3; --trained-ink:#0f4a22; --visual:#d9e6f8; --visual-ink:#1d4f91; --text:#efece5; --track:#e9e6df;
  --bar-trained:#3f9b5c; --bar-visual:#7aa7e0; --bar-text:#bdb8ad;
  --shade:0 1px 2px rgb(40 35 20/.06), 0 6px 20px rgb(40 35 20/.05) }
@media (prefers-color-scheme: dark) { :root { --page:#141413; --card:#1e1e1c; --ink:#efede8; --soft:#a39f97;
  --line:#34332f; --wrong:#ff8a80; --trained:#1f4a2c; --trained-ink:#c5f0d1; --visual:#213a5c; --visual-ink:#b9d4f7;
  --text:#2b2a27; --track:#33322e; --bar-trained:#58b877; --bar-visual:#5688c7; --bar-text:#6b675f; --shade:none } }
* { box-sizing:border-box }
body { margin:0; background:var(--page); color:var(--ink);
  font:16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif }
main { max-width:1180px; margin:0 auto; padding:48px 24px 80px }
h1 { font-size:1.9rem; line-height:1.2; letter-spacing:-.02em; margin:0 0 1rem; overflow-wrap:anywhere }
code { font:.86em/1.4 ui-monospace, "SF Mono", Menlo, Consolas, monospace; overflow-wrap:anywhere }
.facts { display:flex; flex-wrap:wrap; gap:10px 36px; margin:0 0 1.2rem } .facts dt { color:var(--soft);
  font-size:.82rem } .facts dd { margin:0; overflow-wrap:anywhere }
.legend { display:flex; flex-wrap:wrap; gap:6px 22px; align-items:center; font-size:.9rem; margin:0 0 28px }
.key i { display:inline-block; width:1.5em; height:1.05em; vertical-align:-.15em; margin-right:8px }
.soft { color:var(--soft) } .bad { color:var(--wrong) }
article { background:var(--card); border:1px solid var(--line); border-radius:12px; box-shadow:var(--shade);
  margin-bottom:20px; overflow:hidden }
.top { display:flex; flex-wrap:wrap; justify-content:space-between; gap:4px 24px; padding:12px 18px;
  border-bottom:1px solid var(--line); font-size:.92rem }
.counts { font-variant-numeric:tabular-nums; color:var(--soft) } .counts b { color:var(--ink); font-weight:600 }
.meter { display:flex; height:5px; margin-top:5px; border-radius:3px; background:var(--track); overflow:hidden }
.meter .visual { background:var(--bar-visual) } .meter .plain { background:var(--bar-text) }
.meter .trained { background:var(--bar-trained) }
.columns { display:grid; grid-template-columns:minmax(150px, 250px) 1fr }
.pictures { padding:16px 0 16px 18px; display:flex; flex-direction:column; gap:16px }
figure { margin:0 } img { display:block; width:100%; image-rendering:auto; background:#0d0d0c }
figure > img { border-radius:6px } .grid { display:grid; gap:2px; margin-top:6px }
figcaption { font-size:.8rem; color:var(--soft); margin-top:6px; line-height:1.4 }
.tokens { padding:14px 18px 18px; white-space:pre-wrap; overflow-wrap:anywhere; line-height:1.95; min-width:0;
  font:.88rem/1.95 ui-monospace, "SF Mono", Menlo, Consolas, monospace }
.t { padding:.16em 0; border-radius:3px; box-shadow:inset -1px 0 0 var(--card) } .t.text { background:var(--text) }
.t.trained { background:var(--trained); color:var(--trained-ink) }
.t.visual { background:var(--visual); color:var(--visual-ink); padding-inline:.5em }
.t.special { font-size:.82em; opacity:.92; border:1px solid currentColor; padding:.04em .25em; margin-inline:1px }
.t.cut { opacity:.5; text-decoration:line-through var(--wrong) } .t:hover { outline:1.5px solid var(--ink) }
.key .t.cut { background:linear-gradient(var(--wrong), var(--wrong)) center/100% 1.5px no-repeat, var(--text) }
.end { color:var(--wrong); border-left:2px solid var(--wrong); padding-left:.4em; margin:0 .5em; font-size:.82em }
.problem { margin:14px 18px; color:var(--wrong); overflow-wrap:anywhere }
.raw { display:grid; grid-template-columns:auto 1fr; gap:2px 14px; margin:0 18px 16px; font-size:.92rem }
.raw dt { color:var(--soft) } .raw dd { margin:0; white-space:pre-wrap; overflow-wrap:anywhere }
@media (max-width:640px) { .columns { grid-template-columns:1fr } .pictures { padding-right:18px } }
@media print { body { background:none } article { break-inside:avoid } }
"""
