"""Site: the page at /, one file without outside resources."""

import base64
import hashlib
import html
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

PARTS = Path(__file__).with_name("page")


class Site(NamedTuple):
  """html: the page. headers: that let it run its own script and style, talk to its own server, and nothing else."""

  html: str
  headers: Mapping[str, str]


def make(model: str, max_tokens: int, wants_key: bool) -> Site:
  """The page for a model of this name. wants_key: whether it must ask for the key."""
  frame, style, script = ((PARTS / name).read_text("utf-8") for name in ("index.html", "style.css", "script.js"))
  values = {"model": model, "max_tokens": str(max_tokens), "wants_key": "yes" if wants_key else "no"}
  for name, value in values.items():
    frame = frame.replace("{{" + name + "}}", html.escape(value, quote=True))
  policy = (
    f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; img-src data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
  )
  headers = {
    "Content-Security-Policy": policy,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
  }
  return Site(frame.replace("{{style}}", style).replace("{{script}}", script), headers)


def _hash(text: str) -> str:
  return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii") + "'"
