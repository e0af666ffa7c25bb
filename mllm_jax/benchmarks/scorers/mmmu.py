"""MMMU: what an answer says, by the benchmark's published rules.

Where an answer to a multiple-choice question names no option, those rules draw one at random, and so it is here: from a
generator seeded with the question, so that scoring again gives the same score.
"""

import random
import re
from collections.abc import Sequence

from mllm_jax.benchmarks.prompts import LETTERS

ENDS = ",.!?;:'"
LEADS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
NUMBERS = (
  r"-?\b\d{1,3}(?:,\d{3})+\b",  # 1,234
  r"-?\d+(?:\.\d+)?[eE][+-]?\d+",  # 1.2e3
  r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)


def choice(answer: str, options: Sequence[str], seed: str) -> str:
  """The letter that an answer chooses.

  "(B)" goes before " B ", and both before an option's words, which count in answers of more than five words. Of several
  found in the same way the last counts; of none a random one, seeded by `seed`.
  """
  text = answer
  for mark in ENDS:
    text = text.strip(mark)
  text = f" {text} "
  letters = LETTERS[: len(options)]
  forms = [{letter: f"({letter})" for letter in letters}, {letter: f" {letter} " for letter in letters}]
  if len(text.split()) > 5:
    forms.append({letter: option.lower() for letter, option in zip(letters, options)})
  for form, inside in zip(forms, (text, text, text.lower())):
    places = {letter: inside.rfind(written) for letter, written in form.items() if written in inside}
    if places:
      return max(places, key=places.get)
  return random.Random(seed).choice(letters)


def open_match(answer: str, golds: Sequence[str]) -> bool:
  """Whether an open answer says one of the golds: a gold text stands in one of its conclusions, or a gold number, to
  two decimals, is one of its numbers."""
  conclusions = _conclusions(answer)
  said = [text for conclusion in conclusions for text in [conclusion, *_numbers(conclusion)]]
  said = {value for text in said for value in _normalised(text)}
  true = [value for gold in golds for value in _normalised(gold)]
  texts = [value for value in true if isinstance(value, str)]
  return any(any(text in value for text in texts) if isinstance(value, str) else value in true for value in said)


def _conclusions(answer: str) -> list[str]:
  """The shortest end of each line behind a word that leads to a result; the whole answer where there is none."""
  whole = answer.strip().strip(".").lower()
  lines, found = whole.split("\n"), []
  for number, line in enumerate(lines, start=1):
    leads = LEADS + (("=",) if number == len(lines) else ())
    ends = [line.split(lead)[-1].strip() for lead in leads if lead in line]
    if ends and min(ends, key=len) not in ("", *ENDS):
      found.append(min(ends, key=len))
  return found or [whole]


def _numbers(text: str) -> list[str]:
  return [number for pattern in NUMBERS for number in re.findall(pattern, text)]


def _normalised(text: str) -> list[str | float]:
  """A number to two decimals; a text in lower case, a single character with a space on either side of it."""
  text = text.strip()
  try:
    return [round(float(text.replace(",", "")), 2)]
  except ValueError:
    text = text.lower()
  return [f" {text}", f"{text} "] if len(text) == 1 else [text]
