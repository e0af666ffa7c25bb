"""Sampling settings: how the next token is chosen. Without jax, so that a command line can check them at once."""

import dataclasses
import math

COLDEST = 1e-6  # logits divided by less could leave float32's range


@dataclasses.dataclass(frozen=True)
class Sampling:
  """The default is greedy decoding.

  temperature: the logits are divided by it; 0 takes the most likely token, whatever the other two fields say.
  top_p: only the most likely tokens that together reach this probability are drawn from; 1 draws from all.
  top_k: only this many of the most likely tokens are drawn from; 0 draws from all. Applied before top_p.

  Raises:
    ValueError: a field outside its range; the message begins with the field's name.
  """

  temperature: float = 0.0
  top_p: float = 1.0
  top_k: int = 0

  def __post_init__(self):
    if self.temperature != 0 and not (math.isfinite(self.temperature) and self.temperature >= COLDEST):
      raise ValueError(f"temperature is {self.temperature}; it must be 0 (greedy) or a number of at least {COLDEST}")
    if not 0 < self.top_p <= 1:
      raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
    if self.top_k < 0:
      raise ValueError(f"top_k is {self.top_k}; it must be 0 (no limit) or a positive number of tokens")


GREEDY = Sampling()
