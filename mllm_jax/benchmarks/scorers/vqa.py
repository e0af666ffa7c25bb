"""VQA accuracy: an answer is as good as the number of people who gave it, after EvalAI's normalisation."""

import re
import statistics
from collections.abc import Sequence

# Words with apostrophes; each is also recognised with any one of its apostrophes left out.
CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've
they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's
where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll
y'all'd've you'd you'd've you'll you're you've
""".split()
REPAIRED = {
  word[:place] + word[place + 1 :]: word
  for word in CONTRACTIONS
  for place, character in enumerate(word)
  if character == "'"
} | {"somebody'd": "somebodyd", "'ows'at": "'ow's'at"}  # so in the published table
NUMBERS = {word: str(n) for n, word in enumerate("zero one two three four five six seven eight nine ten".split())}
NUMBERS["none"] = "0"
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'


def normalise(answer: str) -> str:
  """An answer as EvalAI compares it: lower case, without punctuation and articles, number words as digits.

  Commas and question marks are taken out and 's is split off first. Another punctuation mark goes without a trace where
  it once stands beside a space; else a space takes its place. Full stops stay before digits only.
  """
  text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
  text = text.replace("\n", " ").replace("\t", " ").strip()
  plain = text
  for mark in PUNCTUATION:
    plain = plain.replace(mark, "" if f"{mark} " in text or f" {mark}" in text else " ")
  plain = re.sub(r"\.(?!\d)", "", plain)
  words = [NUMBERS.get(word, word) for word in plain.split()]
  return " ".join(REPAIRED.get(word, word) for word in words if word not in ARTICLES)


def soft_accuracy(answer: str, given: Sequence[str]) -> float:
  """0 to 1: the mean over all people of min(1, others who gave this answer / 3).

  Source: Antol et al., "VQA", 2015, as in EvalAI: each of the (ten) people is left out once. 0.3, 0.6, 0.9 and 1 for an
  answer given by one, two, three and four or more of ten.
  """
  answer, given = normalise(answer), [normalise(text) for text in given]
  matches = given.count(answer)
  return statistics.fmean(min(1.0, (matches - (person == answer)) / 3) for person in given)
