"""Sentences that prompts end in, as LLaVA's question files have them, and options as it lists them."""

from collections.abc import Mapping, Sequence

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
LETTER_CN = "\n请直接回答选项字母。"
UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def with_options(question: str, options: Sequence[str], last: str = LETTER) -> str:
  """The question, a line "A. ..." for each option, and the sentence that asks for the letter."""
  return question + "".join(f"\n{letter}. {option}" for letter, option in zip(LETTERS, options)) + last


def options_of(row: Mapping[str, str | None]) -> list[str]:
  """The cells A, B, C, ... of a row up to the first that is empty or that the released scripts take for empty."""
  options = []
  for letter in LETTERS:
    cell = row.get(letter)
    if cell is None or str(cell).strip().lower() in ("", "nan", "none"):
      break
    options.append(str(cell))
  return options
