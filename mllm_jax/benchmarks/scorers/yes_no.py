"""Yes or no: POPE and MME."""

import dataclasses
from collections.abc import Sequence


def pope_says_yes(answer: str) -> bool:
  """As POPE's script reads an answer: no where the first sentence has the word No, no or not, else yes."""
  words = answer.split(".")[0].replace(",", "").split(" ")
  return not {"No", "no", "not"} & set(words)


def mme_answer(answer: str) -> str:
  """ "yes", "no" or "other", as MME's script reads an answer: by what its first four characters hold."""
  text = answer.strip().lower()
  beginning = text if text in ("yes", "no") else text[:4]
  return "yes" if "yes" in beginning else "no" if "no" in beginning else "other"


@dataclasses.dataclass(frozen=True)
class Binary:
  """Fractions; "yes" is what is to be found. yes: the share of answers that say it."""

  accuracy: float
  precision: float
  recall: float
  f1: float
  yes: float


def binary(said: Sequence[bool], gold: Sequence[bool]) -> Binary:
  """Of at least one answer. A fraction of nothing counts as 0."""
  fraction = lambda part, whole: part / whole if whole else 0.0
  both = sum(a and b for a, b in zip(said, gold, strict=True))
  precision, recall = fraction(both, sum(said)), fraction(both, sum(gold))
  return Binary(
    accuracy=sum(a == b for a, b in zip(said, gold)) / len(said),
    precision=precision,
    recall=recall,
    f1=fraction(2 * precision * recall, precision + recall),
    yes=sum(said) / len(said),
  )
