"""The page: one HTML file with its pictures inside, without scripts, and the same pictures as files beside it."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from mllm_jax.page import PAGE

escape = html.escape


class Figure(NamedTuple):
  """A picture uint8 [H, W, 3 or 4] that becomes NAME.png. Names are unique on a page."""

  name: str
  pixels: np.ndarray
  title: str
  caption: str = ""


class Section(NamedTuple):
  """Figures side by side, as rows of them; what they show is said in a few sentences before."""

  title: str
  text: str
  rows: Sequence[Sequence[Figure]]


def files(title: str, facts: Mapping[str, str], sections: Sequence[Section]) -> dict[str, bytes]:
  """Everything that is written, by file name: a PNG for each figure, and index.html that holds them all."""
  pictures = {}
  for section in sections:
    for figure in (figure for row in section.rows for figure in row):
      if f"{figure.name}.png" in pictures:
        raise ValueError(f"two figures are called {figure.name}")
      pictures[f"{figure.name}.png"] = _png(figure.pixels)
  listed = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
  body = f"<header><h1>{escape(title)}</h1><dl class='facts'>{listed}</dl></header>"
  body += "\n".join(_section(section, pictures) for section in sections)
  page = PAGE.format(title=escape(title), style=STYLE, body=body)
  return pictures | {"index.html": page.encode("utf-8")}


def _section(section: Section, pictures: Mapping[str, bytes]) -> str:
  rows = "".join(
    f"<div class='row'>{''.join(_figure(figure, pictures[figure.name + '.png']) for figure in row)}</div>"
    for row in section.rows
  )
  return f"<section><h2>{escape(section.title)}</h2><p>{escape(section.text)}</p>{rows}</section>"


def _figure(figure: Figure, png: bytes) -> str:
  height, width = figure.pixels.shape[:2]
  uri = "data:image/png;base64," + base64.b64encode(png).decode("ascii")
  name = escape(figure.name)
  caption = f" {escape(figure.caption)}" if figure.caption else ""
  # No wider than its picture: a long caption would pull the figures of a row apart.
  return (
    f"<figure style='max-width:{max(width, 240)}px'><figcaption><b>{escape(figure.title)}</b>{caption}"
    f" <a href='{name}.png'>{name}.png</a></figcaption>"
    f"<img src='{uri}' width='{width}' height='{height}' alt='{escape(figure.title)}'></figure>"
  )


def _png(pixels: np.ndarray) -> bytes:
  buffer = io.BytesIO()
  Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
  return buffer.getvalue()


STYLE = """
:root { --page:#f6f5f2; --card:#fffefb; --ink:#1c1b19; --soft:#66635d; --line:#e2dfd8; --link:#1d4f91;
  --shade:0 1px 2px rgb(40 35 20/.06), 0 6px 20px rgb(40 35 20/.05) }
@media (prefers-color-scheme: dark) { :root { --page:#141413; --card:#1e1e1c; --ink:#efede8; --soft:#a39f97;
  --line:#34332f; --link:#9cc2f2; --shade:none } }
* { box-sizing:border-box }
body { margin:0; background:var(--page); color:var(--ink);
  font:16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif }
main { max-width:1180px; margin:0 auto; padding:48px 24px 80px }
h1 { font-size:1.9rem; line-height:1.2; letter-spacing:-.02em; margin:0 0 1rem; overflow-wrap:anywhere }
h2 { font-size:1.2rem; letter-spacing:-.01em; margin:0 0 .3rem }
.facts { display:flex; flex-wrap:wrap; gap:10px 36px; margin:0 0 2rem }
.facts dt { color:var(--soft); font-size:.82rem } .facts dd { margin:0; overflow-wrap:anywhere }
section { background:var(--card); border:1px solid var(--line); border-radius:12px; box-shadow:var(--shade);
  margin-bottom:20px; padding:20px 22px 24px }
section > p { max-width:76ch; margin:0 0 16px; color:var(--soft); font-size:.95rem }
.row { display:flex; flex-wrap:wrap; gap:18px 20px; align-items:flex-end } .row + .row { margin-top:20px }
figure { margin:0; min-width:0 } img { display:block; max-width:100%; height:auto; border-radius:4px }
figcaption { font-size:.82rem; color:var(--soft); margin-bottom:6px; line-height:1.4 }
figcaption b { color:var(--ink); font-weight:600 }
a { color:var(--link); text-decoration:none; white-space:nowrap } a:hover { text-decoration:underline }
@media print { body { background:none } section { break-inside:avoid } }
"""
