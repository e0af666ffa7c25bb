"""Store: answers or verdicts as JSON lines, one appended for each question, so that a run can be taken up again."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mllm_jax.config import ConfigError


class Store:
  """A file whose first line says what the others were made with.

  Args:
    path: of the file; made, with its folder, when something is first appended.
    head: what the lines depend on.

  Raises:
    ConfigError: the file was made with something else, or is no such file. An unfinished last line, of a run that was
      killed, is cut off.
  """

  def __init__(self, path: Path, head: Mapping[str, Any]):
    self.path, self.head = path, json.loads(json.dumps(head))
    self.rows: dict[str, dict] = {}
    if path.exists():
      whole = path.read_bytes()
      ended = whole.rfind(b"\n") + 1
      if ended < len(whole):
        os.truncate(path, ended)
      self._read(whole[:ended].split(b"\n")[:-1])

  def _read(self, lines: list[bytes]) -> None:
    if not lines:
      return
    try:
      head, *rows = map(json.loads, lines)
      self.rows = {row["id"]: row for row in rows}
      differ = sorted(key for key in head | self.head if head.get(key) != self.head.get(key))
    except (ValueError, TypeError, KeyError) as error:
      raise ConfigError(f"{self.path} is damaged ({error}); take it away, and its questions are asked again") from error
    if differ:
      told = "; ".join(f"{key} was {head.get(key)!r} and is {self.head.get(key)!r}" for key in differ)
      raise ConfigError(f"{self.path} was made otherwise: {told}. Use another --out, or take the file away")

  def append(self, row: Mapping[str, Any]) -> None:
    """Adds a row, which has an `id`, as a whole line."""
    self.path.parent.mkdir(parents=True, exist_ok=True)
    new = not self.path.exists() or not self.path.stat().st_size
    lines = [*([self.head] if new else []), row]
    with self.path.open("a", encoding="ascii") as file:
      file.write("".join(json.dumps(line) + "\n" for line in lines))
    self.rows[row["id"]] = dict(row)
