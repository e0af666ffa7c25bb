"""Which option an answer chooses."""

import re
from collections.abc import Sequence

from mllm_jax.benchmarks.prompts import LETTERS

WORDS_AROUND_A = 3  # in a longer sentence "A" may be the article


def scienceqa_letter(answer: str, count: int) -> str | None:
  """The letter as LLaVA's ScienceQA script reads it: the letter alone, "X. ...", or "The answer is X." just once.

  The letter stands at the answer's very beginning; of five options at most; None where the answer has another form or
  the letter is beyond `count` options, which counts as wrong.
  """
  known = LETTERS[:5]
  if answer in tuple(known) or (answer[:1] in tuple(known) and answer[1:3] == ". "):
    letter = answer[0]
  else:
    found = re.findall(r"The answer is ([A-Z]).", answer)
    letter = found[0] if len(found) == 1 else None
  return letter if letter is not None and letter in LETTERS[:count] else None


def letter_of(answer: str, options: Sequence[str]) -> str | None:
  """The letter of the option that a free answer chooses, None where it chooses none or several.

  In this order: the answer begins with a letter, alone or before one of . ) : ,; one letter alone among its words;
  the words of one option alone stand in it. A letter beyond the options is none.
  """
  answer, letters = answer.strip(), LETTERS[: len(options)]
  begins = re.match(r"\(?([A-Z])(?:[.):,]|$)", answer)
  if begins:
    return begins[1] if begins[1] in letters else None
  words = re.sub(r"[.()\[\],:;!*#{}\"'?]", " ", answer).split()
  named = {word for word in words if word in tuple(letters)}
  article = named == {"A"} and len(words) > WORDS_AROUND_A
  if named and not (article and not re.search(r"(?i)\b(answer|option|choice)\b", answer)):
    return named.pop() if len(named) == 1 else None
  said = [
    letter
    for letter, option in zip(letters, options)
    if option.strip() and re.search(rf"(?<!\w){re.escape(option.strip().lower())}(?!\w)", answer.lower())
  ]
  return said[0] if len(said) == 1 else None
