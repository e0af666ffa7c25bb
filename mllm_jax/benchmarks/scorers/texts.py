"""Text that is read off a picture: exact match, ANLS, relaxed accuracy, OCRBench."""

from collections.abc import Sequence


def gqa_answer(answer: str) -> str:
  """An answer as it is compared for GQA: lower case, without full stops at the end."""
  return answer.rstrip(".").lower()


def edit_distance(a: str, b: str) -> int:
  """Levenshtein: how many characters must be put in, taken out or replaced to make one text the other."""
  row = list(range(len(b) + 1))
  for i, x in enumerate(a, start=1):
    above, row[0] = row[0], i
    for j, y in enumerate(b, start=1):
      above, row[j] = row[j], min(above + (x != y), row[j] + 1, row[j - 1] + 1)
  return row[-1]


def anls(answer: str, golds: Sequence[str], threshold: float = 0.5) -> float:
  """0 to 1: 1 - edit distance / length of the longer text, 0 where that quotient is above the threshold; the best of
  the golds. Case and the amount of white space do not count.

  Source: Biten et al., "ST-VQA", 2019, eq. 1; there a quotient of just the threshold gives 0, in the public scripts,
  which the published numbers come from, it counts.
  """
  scores = []
  for gold in golds:
    a, b = (" ".join(text.lower().split()) for text in (answer, gold))
    distance = edit_distance(a, b) / max(len(a), len(b), 1)
    scores.append(1 - distance if distance <= threshold else 0.0)
  return max(scores)


def relaxed_match(answer: str, gold: str, tolerance: float = 0.05) -> bool:
  """Numbers within 5 % of the gold one, other answers equal but for case. Per cent count as hundredths.

  Source: Masry et al., "ChartQA", 2022, section 5.1; around a gold 0 no number is relaxed, as in the public scripts.
  """
  answer, gold = answer.strip(), gold.strip()
  said, true = _number(answer), _number(gold)
  if said is not None and true:
    return abs(said - true) / abs(true) <= tolerance
  return answer.lower() == gold.lower()


def _number(text: str) -> float | None:
  try:
    return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
  except ValueError:
    return None


def ocrbench_match(answer: str, golds: Sequence[str], formula: bool) -> bool:
  """Whether one of the golds stands in the answer. Of formulas (HME100k) spaces do not count, of other texts case."""
  read = lambda text: text.strip().replace("\n", " ")
  plain = (lambda text: read(text).replace(" ", "")) if formula else (lambda text: read(text).lower())
  return any(plain(gold) in plain(answer) for gold in golds)
