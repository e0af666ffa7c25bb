"""Our chat templates in Jinja, so that transformers' processor makes the same ids of a conversation as we do.

We tokenize the text between two images by itself, as the released code does, and a Llama tokenizer puts a space before
every text: after an image come "▁" and a newline. transformers tokenizes the whole prompt at once, and whether a space
is put after a special token there depends on the tokenizer. Where it is not, the template must write one. Which spaces
are needed is found out by trying, and so is whether a template can be had at all.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from mllm_jax.config import ConfigError
from mllm_jax.data import chat, jinja_template, templates
from mllm_jax.data.records import DataError, Turn
from mllm_jax.weights.side_files.tokenizer import IMAGE_TOKEN


class Marks(NamedTuple):
  """What is written around one turn's text: `opening` and `closing` always, the other two where there is a text."""

  opening: str
  before: str
  after: str
  closing: str


class Form(NamedTuple):
  """How a template writes a conversation.

  system: its own system text; around_system: what stands before and after one.
  joined: a system text stands in the first question, in the place of that one's opening.
  EOS stands for the tokenizer's end-of-sequence token.
  """

  question: Marks
  answer: Marks
  system: str = ""
  around_system: tuple[str, str] = ("", "")
  joined: bool = False


EOS = "\0"


def blocks(header: str, end: str, system: str) -> Form:
  """A template of blocks, each a header with its role, a text and an end."""
  block = lambda role: Marks(header.format(role), "", "", end)
  return Form(block("user"), block("assistant"), system, (header.format("system"), end))


VICUNA = Form(
  Marks("USER:", " ", " ", ""), Marks("ASSISTANT:", " ", EOS, ""), templates.VICUNA_SYSTEM, around_system=("", " ")
)
CHATML, LLAMA_3 = "<|im_start|>{}\n", "<|start_header_id|>{}<|end_header_id|>\n\n"
FORMS = {
  "vicuna_v1": VICUNA,
  "plain": VICUNA,  # a model of the plain stage is asked in the chat template too
  "chatml": blocks(CHATML, "<|im_end|>\n", templates.QWEN_SYSTEM),
  "chatml_released": blocks(CHATML, "<|im_end|>\n", templates.QWEN_SYSTEM),  # other labels, the same text
  "qwen2_5": blocks(CHATML, "<|im_end|>\n", templates.QWEN2_5_SYSTEM),
  "internvl2": blocks(CHATML, "<|im_end|>", templates.INTERNVL2_SYSTEM),
  "llava_llama_3": blocks(LLAMA_3, "<|eot_id|>", templates.LLAMA_3_SYSTEM),
  "mistral_instruct": Form(
    Marks("[INST] ", "", "", " [/INST]"), Marks("", " ", EOS, ""), around_system=("[INST] ", "\n\n"), joined=True
  ),
}
SHORT, SYSTEM = (Turn("human", "<image>\nWhat is it?"),), "Answer in one word."
TRIALS = (  # turns, the system's text
  ((Turn("human", "<image>\nWhat is in the picture?"),), None),
  ((Turn("human", "What is in it?\n<image>"), Turn("gpt", "A red car."), Turn("human", "How many?")), None),
  ((Turn("human", "Hello, who are you?"),), None),
  ((Turn("human", "Name 3 colours."), Turn("gpt", "Red, green, blue."), Turn("human", "  And a fourth?\n")), None),
  ((Turn("human", "<image>"),), None),
  ((Turn("human", "<image>\n<image>\nCompare the two."), Turn("gpt", "They differ."), Turn("human", "<image>")), None),
  (SHORT, SYSTEM),
  (SHORT, ""),
)
# Contents are texts, in which `<image>` stands for an image, or lists of {"type": "image"} and {"type": "text"}; images
# come first.
CONTENTS = """\
{%- macro text_of(content) -%}
{%- set texts = [] if content is string else content | selectattr("type", "equalto", "text") -%}
{{ content if content is string else texts | map(attribute="text") | join("\\n") }}
{%- endmacro -%}
{%- macro question_of(content) -%}
{%- set text = text_of(content) -%}
{%- set parts = [] if content is string else content | selectattr("type", "equalto", "image") | list -%}
{%- set n_images = parts | length + text.split(image) | length - 1 -%}
{%- set rest = text.replace(image, "").strip() if n_images else text -%}
{%- for _ in range(n_images) -%}
{{ image }}{{ before_newline ~ "\\n" if rest or not loop.last else before_closing }}
{%- endfor -%}
{{ rest }}
{%- endmacro -%}
"""
OURS = """\
{%- if messages and messages[0]["role"] == "system" -%}
{%- set system, turns = text_of(messages[0]["content"]), messages[1:] -%}
{%- else -%}
{%- set turns = messages -%}
{%- endif -%}
{{ around_system[0] ~ system ~ around_system[1] if system else "" }}
{%- for message in turns -%}
{%- if message["role"] == "user" -%}
{%- set text, marks = question_of(message["content"]), question -%}
{%- elif message["role"] == "assistant" -%}
{%- set text, marks = text_of(message["content"]), answer -%}
{%- else -%}
{{ raise_exception("role " ~ message["role"] ~ " is unknown; known are user, assistant and, first, system") }}
{%- endif -%}
{{ "" if joined and system and loop.first else marks[0] }}{{ marks[1] ~ text ~ marks[2] if text else "" }}{{ marks[3] }}
{%- endfor -%}
{{ answer[0] if add_generation_prompt else "" }}"""
# The tokenizer's own template takes texts only. A token that begins every text is the tokenizer's to write.
THEIRS = """\
{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- set text = question_of(message["content"]) if message["role"] == "user" else text_of(message["content"]) -%}
{%- set flat.messages = flat.messages + [{"role": message["role"], "content": text}] -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
"""


def jinja(template: str, tokenizer: chat.ChatTokenizer, backend: Tokenizer, image_id: int) -> str:
  """A template in Jinja with which `backend`, the exported tokenizer, gives the ids of our `tokenizer` for every trial.

  There is no beginning-of-sequence token in it: the processor puts one before the text. Special tokens in a text of the
  user's are special to transformers, and text to us.

  Raises ConfigError where there is none, and DataError where the tokenizer does not fit the template.
  """
  chat.end_id(template, tokenizer)
  for spaces in itertools.product(("", " "), repeat=2):
    text = written(template, tokenizer, spaces)
    if all(same_ids(text, template, turns, system, tokenizer, backend, image_id) for turns, system in TRIALS):
      return text
  raise ConfigError(
    "no chat template gives our token ids in transformers: the tokenizer treats the text after a special token in a "
    "way that is not known here; export the model in the official layout, or use another tokenizer"
  )


def written(template: str, tokenizer: chat.ChatTokenizer, spaces: tuple[str, str]) -> str:
  """The Jinja text.

  spaces: what is written after an image before a newline, and, after an image without a question, before what closes
    its turn.
  """
  known: dict[str, Any] = {"image": IMAGE_TOKEN, "before_newline": spaces[0], "before_closing": spaces[1]}
  if template not in FORMS:
    known |= {"bos_token": ""} if tokenizer.bos_id is not None else {}
    return settings(known) + CONTENTS + THEIRS + tokenizer.chat_template
  quoted = lambda text: json.dumps(text)[1:-1]
  form = settings(known | FORMS[template]._asdict()).replace(quoted(EOS), quoted(tokenizer.named["eos_token"]))
  return form + CONTENTS + OURS


def settings(values: Mapping[str, Any]) -> str:
  """Lines of Jinja that give names to values."""
  texts = {name: json.dumps(value, ensure_ascii=False) for name, value in values.items()}
  return "".join(f"{{%- set {name} = {text} -%}}\n" for name, text in texts.items())


def messages(turns: Sequence[Turn], system: str | None) -> list[dict[str, str]]:
  """A conversation as transformers has it."""
  first = [] if system is None else [{"role": "system", "content": system}]
  return first + [{"role": templates.ROLES[turn.role], "content": turn.text} for turn in turns]


def same_ids(
  text: str,
  template: str,
  turns: Sequence[Turn],
  system: str | None,
  tokenizer: chat.ChatTokenizer,
  backend: Tokenizer,
  image_id: int,
) -> bool:
  """Whether the Jinja `text` and `backend` give our ids of a prompt. One that a tokenizer's own template does not take
  has none."""
  n_images = sum(turn.text.count(IMAGE_TOKEN) for turn in turns)
  asked = "vicuna_v1" if template == "plain" else template
  try:
    ours = chat.encode_prompt(turns, asked, tokenizer, n_images, system)
  except DataError:
    return True
  rendered = jinja_template.compiled(text).render(
    messages=messages(turns, system), add_generation_prompt=True, tools=None, documents=None, **tokenizer.named
  )
  return backend.encode(rendered).ids == np.where(ours < 0, image_id, ours).tolist()
