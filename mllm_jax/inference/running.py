"""A request while it is answered: its tokens so far, its text, and when it ends."""

from collections.abc import Callable, Sequence

import numpy as np

from mllm_jax.inference.beams import BeamSearch
from mllm_jax.inference.requests import Answer, Event, Request
from mllm_jax.inference.text import Detokenizer, Stops


class Running:
  """A request that has rows of a cache.

  Args:
    slots: its rows, one for each beam.
    decode: token ids -> text.
    end_ids: tokens that end an answer.
  """

  def __init__(
    self,
    ticket: int,
    request: Request,
    slots: list[int],
    decode: Callable[[Sequence[int]], str],
    end_ids: frozenset[int],
  ):
    self.ticket, self.request, self.slots = ticket, request, slots
    self.count = 0  # tokens so far
    self._decode, self._end_ids = decode, end_ids
    self._text, self._stops = Detokenizer(decode), Stops(request.stop)
    self._ids: list[int] = []
    self._pieces: list[str] = []
    self.search = BeamSearch(request.beams, self._ends, request.max_new_tokens) if request.beams > 1 else None

  @property
  def last(self) -> list[int]:
    """The last token of each of its rows."""
    return self._ids[-1:] if self.search is None else self.search.tokens

  def take(self, token: int) -> Event:
    """What comes of its next token."""
    self.count += 1
    ended, text = token in self._end_ids, ""
    if not ended:
      self._ids.append(token)
      text = self._stops.push(self._text.push(token))
    over = ended or self.count == self.request.max_new_tokens
    if over and not self._stops.found:
      text += self._stops.push(self._text.finish())
      text += self._stops.finish()
    self._pieces.append(text)
    if not (over or self._stops.found):
      return Event(self.ticket, text)
    reason = "stop" if ended or self._stops.found else "length"
    return Event(self.ticket, text, Answer("".join(self._pieces), tuple(self._ids), reason))

  def search_on(self, log_probabilities: np.ndarray, ids: np.ndarray) -> tuple[Event, list[int]]:
    """(what comes of the candidates of its beams, the beam that each goes on from). All text comes at the end."""
    self.count += 1
    parents = self.search.advance(log_probabilities, ids)
    if not self.search.done:
      return Event(self.ticket, ""), parents
    self.search, best = None, self.search.best
    self.count, event = 0, None
    for token in best:
      event = self.take(token)
    return Event(self.ticket, event.answer.text, event.answer), parents

  def _ends(self, ids: Sequence[int]) -> bool:
    """Whether these tokens end an answer."""
    if ids[-1] in self._end_ids:
      return True
    return bool(self.request.stop) and any(stop in self._decode(ids) for stop in self.request.stop)
