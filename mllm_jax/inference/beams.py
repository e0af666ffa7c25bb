"""Beam search over one prompt, as transformers' `generate` does it with its defaults: scores are the sum of log
probabilities over the number of tokens (length penalty 1), and the search ends when no open beam can still beat the
worst finished one by its score so far (early stopping false)."""

from collections.abc import Callable, Sequence

import numpy as np

NEVER = np.float32(-1e9)


class BeamSearch:
  """The beams of one prompt. Every step takes the likeliest continuations of each beam and says how to go on.

  Args:
    beams: how many are kept.
    ends: whether a sequence of tokens is finished.
    longest: tokens after which every sequence is.
  """

  def __init__(self, beams: int, ends: Callable[[Sequence[int]], bool], longest: int):
    self._ends, self._longest = ends, longest
    self._open = [()] * beams
    self._scores = np.array([0, *[NEVER] * (beams - 1)], np.float32)  # all begin as the same: only one counts
    self._finished = [(NEVER, (), False)] * beams  # (score a token, tokens, whether they ended)
    self.done = False

  @property
  def tokens(self) -> list[int]:
    """The last token of each open beam."""
    return [ids[-1] for ids in self._open]

  @property
  def best(self) -> tuple[int, ...]:
    """The best sequence that ended, with what ended it."""
    return self._finished[0][1]

  def advance(self, log_probabilities: np.ndarray, ids: np.ndarray) -> list[int]:
    """Goes on by a token; which beam each of the open ones comes from.

    log_probabilities [beams, C] of the tokens ids [beams, C], the C likeliest after each beam. For exactly the result
    of the whole vocabulary C is at least beams times one more than there are tokens that end a sequence, or all of it.
    """
    beams, width = len(self._open), ids.shape[1]
    scores = (log_probabilities.astype(np.float32) + self._scores[:, None]).ravel()
    order = np.argsort(-scores, kind="stable")[:width]
    parents = (order // width).tolist()
    sequences = [(*self._open[parent], int(token)) for parent, token in zip(parents, ids.ravel()[order])]
    length = len(sequences[0])
    ended = np.array([length == self._longest or self._ends(ids) for ids in sequences])

    # Beyond the first `beams` candidates stand spare ones, which may be gone on from and never finish.
    just = [(scores[at] / np.float32(length), sequences[i], True) for i, at in enumerate(order[:beams]) if ended[i]]
    self._finished = sorted([*self._finished, *just], key=lambda each: -each[0])[:beams]
    going = np.argsort(-np.where(ended, scores[order] + NEVER, scores[order]), kind="stable")[:beams]
    self._open = [sequences[i] for i in going]
    self._scores = np.where(ended, scores[order] + NEVER, scores[order])[going]
    full = all(finished for *_, finished in self._finished)
    improvable = not full or self._scores[0] / np.float32(length) > self._finished[-1][0]
    self.done = bool(ended.all() or not improvable)
    return [parents[i] for i in going]
