"""Text: from token ids that arrive one by one to text that can be printed as it arrives."""

from collections.abc import Callable, Sequence

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer decodes incomplete UTF-8 to


class Detokenizer:
  """Turns a stream of token ids into pieces of text that, joined, are the text of all ids.

  That holds for valid UTF-8. The tokenizers library replaces a whole run of byte tokens if one of them is wrong; here
  what was complete before the wrong one has been given out already, and stays.

  A token by itself cannot be decoded: a character may be spread over several byte tokens, and SentencePiece drops the
  space before the first token it is given. So new tokens are decoded together with those of the piece before them,
  the piece's text is cut off, and nothing is given out while the last character is incomplete.

  Args:
    decode: token ids -> text, such as `data.chat.ChatTokenizer.decode`.
  """

  def __init__(self, decode: Callable[[Sequence[int]], str]):
    self._decode = decode
    self._before: list[int] = []  # the tokens of the last piece that was given out
    self._pending: list[int] = []

  def push(self, token: int) -> str:
    """The text that became complete with this token, or ""."""
    self._pending.append(token)
    text = self._text()
    return "" if text.endswith(REPLACEMENT) else self._give(text)

  def finish(self) -> str:
    """What was held back; bytes that never became a character are replacement characters."""
    return self._give(self._text())

  def _text(self) -> str:
    known = len(self._decode(self._before)) if self._before else 0
    return self._decode([*self._before, *self._pending])[known:] if self._pending else ""

  def _give(self, text: str) -> str:
    if text:  # tokens without text (special ones, a bare space) stay: alone they would make the next token a first one
      self._before, self._pending = self._pending, []
    return text


class Stops:
  """Ends a text before the first of some texts in it, and holds back what may become one.

  Args:
    stops: none of them empty.
  """

  def __init__(self, stops: Sequence[str]):
    self._stops = tuple(stops)
    self._held = ""
    self.found = False

  def push(self, text: str) -> str:
    """What can be given out now that `text` has come; nothing follows once `found`."""
    self._held += text
    places = [place for place in map(self._held.find, self._stops) if place >= 0]
    if places:
      self.found = True
    return self._give(min(places) if places else len(self._held) - self._possible())

  def finish(self) -> str:
    """What was held back; nothing if a stop was found."""
    return "" if self.found else self._give(len(self._held))

  def _possible(self) -> int:
    """How many of the last characters may be the beginning of a stop."""
    longest = min(len(self._held), max(map(len, self._stops), default=1) - 1)
    ends = (length for length in range(longest, 0, -1) if any(s.startswith(self._held[-length:]) for s in self._stops))
    return next(ends, 0)

  def _give(self, count: int) -> str:
    given, self._held = self._held[:count], self._held[count:]
    return given
