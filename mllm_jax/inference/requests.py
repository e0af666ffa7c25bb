"""What an engine is asked and what it answers. Without jax, so that the front of a server can be without it too."""

import dataclasses

from mllm_jax.data.processor import Row
from mllm_jax.inference.settings import GREEDY, Sampling


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
  """A prompt and how it is to be answered.

  row: as `data.processor.Processor.prompt` makes it, as long as the prompt is and with room for its own crops alone.
  max_new_tokens: the longest answer, the end-of-sequence token not counted.
  seed: of the draws, where sampling.temperature is not 0; the same seed draws the same answer beside any other request.
  stop: the answer ends before the first place where one of these texts stands.
  beams: of beam search; 1 is none. Goes with sampling.temperature=0 alone.

  Raises:
    ValueError: a field outside its range; the message begins with the field's name.
  """

  row: Row
  max_new_tokens: int = 128
  sampling: Sampling = GREEDY
  seed: int = 0
  stop: tuple[str, ...] = ()
  beams: int = 1

  def __post_init__(self):
    if self.max_new_tokens < 1:
      raise ValueError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
    if not 0 <= self.seed < 2**32:
      raise ValueError(f"seed is {self.seed}; it must lie between 0 and 2**32 - 1")
    if not all(self.stop):
      raise ValueError("stop holds an empty text, before which every answer would end; leave it out")
    if self.beams < 1:
      raise ValueError(f"beams is {self.beams}; it must be at least 1")
    if self.beams > 1 and self.sampling.temperature != 0:
      raise ValueError(f"beams is {self.beams}, which goes with temperature 0 alone")

  @property
  def prompt_tokens(self) -> int:
    """Places of the prompt, visual tokens among them."""
    return int((self.row.segment_ids > 0).sum())

  @property
  def visual_tokens(self) -> int:
    """Places of the prompt that visual tokens take."""
    return int((self.row.visual_index >= 0).sum())


@dataclasses.dataclass(frozen=True)
class Answer:
  """text: without what ended it. ids: the tokens up to and without the end-of-sequence token; where a stop text ended
  it, with the tokens that it stood in. finish_reason: "stop" (the model or a stop text ended it) or "length"."""

  text: str
  ids: tuple[int, ...]
  finish_reason: str


@dataclasses.dataclass(frozen=True)
class Event:
  """What became of a request in one step.

  ticket: of the request. text: what can be printed now ("" while a character or a possible stop text is incomplete);
  an answer's events joined are its text. answer: the whole, with the last event; None before.
  """

  ticket: int
  text: str
  answer: Answer | None = None
