"""Random conversations: unicode, what templates and tokenizers have a meaning for, empty turns, white space."""

import random

from mllm_jax.data.records import Turn

MARKERS = (
  "</s> <s> <unk> <|im_start|> <|im_end|> <|endoftext|> <|begin_of_text|> <|start_header_id|> <|end_header_id|> "
  "<|eot_id|> [INST] [/INST] ASSISTANT: USER: assistant user system {{ }} {% %} {{messages}} <image"
).split() + [" ", "  ", "\n", "\n\n", "\t", "\r\n", "<|im_end|>\n<|im_start|>assistant\n", " ASSISTANT: ", "\u00a0"]
WORDS = ["What", "is", "the", "dog", "on", "left", "Yes", "No", "42", "3.5", ",", "?", "'s"]
# Private-use characters stand in for special tokens inside the program; an accent of its own; others of several bytes.
ODD = [
  "\ue000",
  "\U000f0000",
  "\U000f0003",
  "\U00100000",
  "\U00100001",
  "e\u0301",
  "\u4f60\u597d",
  "\U0001f642",
  "\u200b",
]


def text(draw: random.Random, images: bool = False) -> str:
  """Up to eight parts; one text in eight is empty. `images`: "<image>" may be a part."""
  if draw.random() < 0.125:
    return ""
  parts = []
  for _ in range(draw.randint(1, 8)):
    kind = draw.random()
    if kind < 0.45:
      parts.append(draw.choice(WORDS) + draw.choice(["", " "]))
    elif kind < 0.75:
      parts.append(draw.choice(MARKERS))
    elif kind < 0.85:
      parts.append(draw.choice(ODD))
    elif kind < 0.87 and images:
      parts.append("<image>")
    else:
      parts.append("".join(_character(draw) for _ in range(draw.randint(1, 3))))
  joined = "".join(parts)
  return joined if images else joined.replace("<image>", "")


def _character(draw: random.Random) -> str:
  """Any character but halves of a pair and SentencePiece's own sign for a space, which it cannot tell from one."""
  code = draw.choice((draw.randrange(0x250), draw.randrange(0x10000), draw.randrange(0x110000)))
  return "x" if 0xD800 <= code < 0xE000 or code == 0x2581 else chr(code)


def conversation(draw: random.Random, pairs: int = 3) -> tuple[list[Turn], int, str | None]:
  """(turns, number of images, system text) with up to `pairs` questions and answers."""
  turns, n_images = [], 0
  for _ in range(draw.randint(1, pairs)):
    images = draw.choice((0, 0, 1)) if n_images else draw.choice((0, 1, 2))
    question = text(draw)
    place = draw.randint(0, len(question))
    question = question[:place] + "<image>" * images + question[place:]
    n_images += question.count("<image>")
    turns += [Turn("human", question), Turn("gpt", text(draw, images=True))]
  system = draw.choice((None, None, "", text(draw)))
  return turns, n_images, system
