"""Our chat template in Jinja, so that transformers' processor makes the same ids of a conversation as we do.

We tokenize the text between two images by itself, as the released code does, and a Llama tokenizer puts a space before
every text: after an image come "▁" and a newline. transformers tokenizes the whole prompt at once, and whether a space
is put after a special token there depends on the tokenizer. Where it is not, the template must write one. Which spaces
are needed is found out by trying.
"""

import itertools
import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from mllm_jax.config import ConfigError
from mllm_jax.data import chat
from mllm_jax.data.records import Turn
from mllm_jax.weights.side_files.tokenizer import IMAGE_TOKEN

TEMPLATES = ("vicuna_v1", "plain")  # a model of the plain stage is asked in the chat template too
TRIALS = (
  (Turn("human", "<image>\nWhat is in the picture?"),),
  (Turn("human", "What is in the picture?\n<image>"), Turn("gpt", "A red car."), Turn("human", "How many?")),
  (Turn("human", "Hello, who are you?"),),
  (Turn("human", "Name 3 colours."), Turn("gpt", "Red, green, blue."), Turn("human", "  And a fourth?\n")),
  (Turn("human", "<image>"),),
  (Turn("human", "<image>\n<image>\nCompare the two."), Turn("gpt", "They differ."), Turn("human", "<image>")),
)


class Spaces(NamedTuple):
  """What is written after an image, before what follows it there: a newline, or, after an image without a question,
  the space before "ASSISTANT:"."""

  before_newline: str
  before_space: str


def matching_spaces(backend: Tokenizer, tokenizer: chat.ChatTokenizer, image_id: int, eos: str) -> Spaces:
  """The spaces with which the exported tokenizer `backend` gives the ids of our `tokenizer` for every trial.

  Raises ConfigError where none does.
  """
  for spaces in itertools.starmap(Spaces, itertools.product(("", " "), repeat=2)):
    if all(_same_ids(turns, spaces, backend, tokenizer, image_id, eos) for turns in TRIALS):
      return spaces
  raise ConfigError(
    "no chat template gives our token ids in transformers: the tokenizer treats the text after a special token in a "
    "way that is not known here; export the model in the official layout, or use another tokenizer"
  )


def prompt_text(turns: Sequence[Turn], spaces: Spaces, eos: str) -> str:
  """The text that the Jinja template makes of a conversation whose next answer is due."""
  parts, after_image = [], False
  for piece in chat.vicuna_v1([*turns, Turn("gpt", "")], None):
    if after_image:
      parts.append(spaces.before_newline if piece.text.startswith("\n") else spaces.before_space)
    parts.append({"image": IMAGE_TOKEN, "end": eos, "text": piece.text}[piece.kind])
    after_image = piece.kind == "image"
  return "".join(parts)


def jinja(spaces: Spaces, eos: str) -> str:
  """The template `vicuna_v1` in Jinja.

  Contents are texts, in which `<image>` stands for an image, or lists of {"type": "image"} and {"type": "text"}; images
  come first. There is no beginning-of-sequence token in it: the processor puts one before the text. Special tokens in a
  text of the user's are special to transformers, and text to us.
  """
  image, first, alone = (json.dumps(text) for text in (IMAGE_TOKEN, spaces.before_newline, spaces.before_space))
  return f"""\
{{%- macro text_of(content) -%}}
{{%- set texts = [] if content is string else content | selectattr("type", "equalto", "text") -%}}
{{{{ content if content is string else texts | map(attribute="text") | join("\\n") }}}}
{{%- endmacro -%}}
{{%- if messages and messages[0]["role"] == "system" -%}}
{{%- set system, turns = text_of(messages[0]["content"]), messages[1:] -%}}
{{%- else -%}}
{{%- set system, turns = {json.dumps(chat.VICUNA_SYSTEM)}, messages -%}}
{{%- endif -%}}
{{{{ system ~ " " if system else "" }}}}
{{%- for message in turns -%}}
{{%- set content = message["content"] -%}}
{{%- set text = text_of(content) -%}}
{{%- if message["role"] == "user" -%}}
{{%- set parts = [] if content is string else content | selectattr("type", "equalto", "image") | list -%}}
{{%- set n_images = parts | length + text.split({image}) | length - 1 -%}}
{{{{ "USER:" }}}}
{{%- if n_images -%}}
{{%- set question = text.replace({image}, "").strip() -%}}
{{{{ " " }}}}
{{%- for _ in range(n_images) -%}}
{{{{ {image} }}}}{{{{ {first} ~ "\\n" if question or not loop.last else {alone} }}}}
{{%- endfor -%}}
{{{{ question ~ " " }}}}
{{%- elif text -%}}
{{{{ " " ~ text ~ " " }}}}
{{%- endif -%}}
{{%- elif message["role"] == "assistant" -%}}
{{{{ "ASSISTANT:" }}}}{{{{ " " ~ text ~ {json.dumps(eos)} if text else "" }}}}
{{%- else -%}}
{{{{ raise_exception("role " ~ message["role"] ~ " is unknown; known are user, assistant and, first, system") }}}}
{{%- endif -%}}
{{%- endfor -%}}
{{{{ "ASSISTANT:" if add_generation_prompt else "" }}}}"""


def _same_ids(
  turns: Sequence[Turn], spaces: Spaces, backend: Tokenizer, tokenizer: chat.ChatTokenizer, image_id: int, eos: str
) -> bool:
  n_images = sum(turn.text.count(IMAGE_TOKEN) for turn in turns)
  ours = chat.encode_prompt(turns, "vicuna_v1", tokenizer, n_images)
  return backend.encode(prompt_text(turns, spaces, eos)).ids == np.where(ours < 0, image_id, ours).tolist()
