"""Scan: where the elements of a JSON list, or the lines of a JSON Lines file, begin and end.

One pass over the bytes with NumPy. Nothing is parsed: a list's separators are the commas and brackets that stand in no
string and at its own depth. So a file of a gigabyte takes seconds and two integers for each sample.
"""

import codecs
from typing import BinaryIO, NamedTuple

import numpy as np

CHUNK_BYTES = 2**20
BOM = codecs.BOM_UTF8
QUOTE, BACKSLASH, COMMA, OPEN, CLOSE = 1, 2, 3, 4, 5
KINDS = np.zeros(256, np.uint8)
for _characters, _kind in ((b'"', QUOTE), (b"\\", BACKSLASH), (b",", COMMA), (b"[{", OPEN), (b"]}", CLOSE)):
  KINDS[list(_characters)] = _kind
TABLE = KINDS.tobytes()


class NotAList(Exception):
  """The bytes do not have the structure of one JSON list.

  elements: those that came before; behind the last one there may be another that does not end.
  byte: where it shows; -1: at the file's end.
  """

  def __init__(self, elements: "Elements", byte: int):
    super().__init__()
    self.elements = elements
    self.byte = byte


class Elements(NamedTuple):
  """Byte ranges: element i is bytes starts[i] to stops[i], perhaps with space around it; both int64 [N].

  odd: int64, the elements that are not clearly one object or list, so that only a parser can say what they are.
  """

  starts: np.ndarray
  stops: np.ndarray
  odd: np.ndarray


def json_list(file: BinaryIO) -> Elements:
  """The elements of a file that is one JSON list.

  Raises:
    NotAList: it is something else, ends too early, or goes on behind the list's end.
    UnicodeDecodeError: it is not UTF-8; `start` is the byte in the file.
  """
  separators, openings = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
  inside = depth = 0
  closed_at = -1
  for start, chunk in _chunks(file):
    places, kinds = _marks(chunk)
    quoted = (np.cumsum(kinds == QUOTE, dtype=np.uint8) + np.uint8(inside)) & 1  # odd or even: uint8 may run over
    inside = int(quoted[-1]) if len(quoted) else inside
    structure = (quoted == 0) & (kinds >= COMMA)
    places, kinds = places[structure] + start, kinds[structure]
    steps = (kinds == OPEN).astype(np.int64) - (kinds == CLOSE)
    depths = depth + np.cumsum(steps)
    depth = int(depths[-1]) if len(depths) else depth
    # A separator is the list's own bracket or a comma between its elements.
    at_top = ((kinds == COMMA) & (depths == 1)) | ((kinds == OPEN) & (depths == 1)) | ((kinds == CLOSE) & (depths == 0))
    separators.append(places[at_top])
    openings.append(places[(kinds == OPEN) & (depths == 2)])
    ends = np.flatnonzero(depths <= 0)
    if len(ends):
      closed_at = int(places[ends[0]])
      if len(ends) > 1 or len(depths) > ends[0] + 1:
        raise NotAList(_elements(separators, openings, closed_at), closed_at + 1)
      if chunk[closed_at - start] != ord("]"):
        raise NotAList(_elements(separators, openings), closed_at)
      _only_space(file, start, chunk, closed_at, separators, openings)
      break
  elements = _elements(separators, openings)
  if closed_at < 0 or not len(elements.starts):
    raise NotAList(elements, -1)
  opened_at = int(elements.starts[0]) - 1
  if not _blank(file, 0, opened_at) or _bytes(file, opened_at, opened_at + 1) != b"[":
    raise NotAList(elements, opened_at)
  if len(elements.starts) == 1 and len(elements.odd) and _blank(file, opened_at + 1, closed_at):
    nothing = np.zeros(0, np.int64)
    return Elements(nothing, nothing, nothing)
  return elements


def _only_space(file: BinaryIO, start: int, chunk: np.ndarray, closed_at: int, separators, openings) -> None:
  rest = chunk[closed_at + 1 - start :].tobytes()
  while rest:
    if rest.strip(b" \t\r\n"):
      raise NotAList(_elements(separators, openings), closed_at + 1)
    rest = file.read(CHUNK_BYTES)


def _elements(separators: list[np.ndarray], openings: list[np.ndarray], until: int | None = None) -> Elements:
  """The ranges between separators."""
  bounds = np.concatenate(separators)
  bounds = bounds if until is None else bounds[bounds <= until]
  starts, stops = bounds[:-1] + 1, bounds[1:]
  containers = np.diff(np.searchsorted(np.concatenate(openings), bounds))
  return Elements(starts, stops, np.flatnonzero(containers != 1))


def _marks(chunk: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(places, kinds) of the characters that matter in a chunk; quotes behind a backslash do not."""
  kinds = np.frombuffer(chunk.tobytes().translate(TABLE), np.uint8)  # three times as fast as indexing
  places = np.flatnonzero(kinds != 0)
  kinds = kinds[places]
  slashes = np.flatnonzero(kinds == BACKSLASH)
  if len(slashes):
    # A backslash counts unless another one that counts stands before it: every second one of an unbroken run.
    last = np.flatnonzero(np.append(np.diff(places[slashes]) != 1, True))
    lengths = np.diff(np.concatenate([[-1], last]))
    escaping = slashes[last[lengths % 2 == 1]]
    escaping = escaping[escaping + 1 < len(kinds)]
    escaped = escaping[places[escaping + 1] == places[escaping] + 1] + 1
    kinds[escaped] = BACKSLASH
  return places, kinds


def _chunks(file: BinaryIO):
  """(first byte's place, uint8 array) in file order. None ends in a backslash, whose run would be cut."""
  decoder = codecs.getincrementaldecoder("utf-8")()
  start = 0
  while True:
    data = file.read(CHUNK_BYTES)
    while data.endswith(b"\\"):
      more = file.read(4096)
      if not more:
        break
      data += more
    before = len(decoder.getstate()[0])
    try:
      decoder.decode(data, final=not data)
    except UnicodeDecodeError as error:
      error.start += start - before
      raise
    if not data:
      return
    chunk = np.frombuffer(data, np.uint8)
    if start == 0 and data.startswith(BOM):
      chunk = chunk.copy()
      chunk[: len(BOM)] = ord(" ")
    yield start, chunk
    start += len(data)


def json_lines(file: BinaryIO) -> Elements:
  """The lines of a file that are not blank. `odd` are those that do not begin with { and end with }.

  Raises:
    UnicodeDecodeError: it is not UTF-8; `start` is the byte in the file.
  """
  bounds, firsts, lasts = [], [], []
  length, tail = 0, b"\n\n"
  for start, chunk in _chunks(file):
    length = start + len(chunk)
    padded = np.concatenate([np.frombuffer(tail, np.uint8), chunk])  # so that what is before a newline is there
    newlines = np.flatnonzero(chunk == ord("\n"))
    before, earlier = padded[newlines + 1], padded[newlines]
    # Lines begin behind newlines; the one in front of this chunk's first byte belongs to this chunk.
    begins = np.flatnonzero(padded[1:-1] == ord("\n")) if len(chunk) else newlines
    bounds.append(newlines + start)
    firsts.append(chunk[begins])
    lasts.append(np.where(before == ord("\r"), earlier, before))
    tail = padded[-2:].tobytes()
  ends = np.concatenate(bounds) if bounds else np.zeros(0, np.int64)
  first = np.concatenate(firsts) if firsts else np.zeros(0, np.uint8)
  last = np.concatenate(lasts) if lasts else np.zeros(0, np.uint8)
  if length and tail[-1:] != b"\n":  # a last line without a newline
    ends, last = np.append(ends, length), np.append(last, np.uint8(tail[-1]))
  starts = np.concatenate([[0], ends[:-1] + 1]) if len(ends) else ends
  odd = np.flatnonzero((first[: len(ends)] != ord("{")) | (last != ord("}")))
  blank = np.array([line for line in odd if _blank(file, int(starts[line]), int(ends[line]))], np.int64)
  kept = np.setdiff1d(np.arange(len(starts)), blank)
  odd = np.searchsorted(kept, np.setdiff1d(odd, blank))
  return Elements(starts[kept], ends[kept], odd)


def _blank(file: BinaryIO, start: int, stop: int) -> bool:
  data = _bytes(file, start, stop)
  return not (data.removeprefix(BOM) if start == 0 else data).strip()


def _bytes(file: BinaryIO, start: int, stop: int) -> bytes:
  file.seek(start)
  return file.read(stop - start)
