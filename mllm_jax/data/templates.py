"""Templates: from turns to the pieces of a prompt, which know whether they are trained on.

A special token is a piece of its own kind, so that the same characters in somebody's text never become one.
"""

import dataclasses
from collections.abc import Callable, Sequence

from mllm_jax.data import jinja_template
from mllm_jax.data.records import IMAGE_PLACEHOLDER, DataError, Turn
from mllm_jax.data.tokenizer import CUT, END, IMAGE, ChatTokenizer, Piece

VICUNA_SYSTEM = (
  "A chat between a curious user and an artificial intelligence assistant. "
  "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
QWEN_SYSTEM = "You are a helpful assistant."
QWEN2_5_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
# InternVL 2's conversation `Hermes-2`: "You are InternVL, a multimodal model that Shanghai AI Laboratory and SenseTime
# developed together, a helpful and harmless assistant."
INTERNVL2_SYSTEM = (
  "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
)
# LLaVA-NeXT's conversation `llava_llama_3`.
LLAMA_3_SYSTEM = (
  "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
  "provides, and assist the user with a variety of tasks using natural language."
)
ROLES = {"human": "user", "gpt": "assistant"}
USER, ASSISTANT, SPACE = Piece("text", "USER:"), Piece("text", "ASSISTANT:"), Piece("text", " ")


@dataclasses.dataclass(frozen=True)
class Template:
  """How conversations are written for one kind of language model.

  pieces: (turns, the sample's system text, tokenizer) -> the prompt's pieces. The turns alternate, human first; a last
    answer without text is one that is waited for.
  end: the special token that ends an answer; "" for the tokenizer's end-of-sequence token.
  needs: other special tokens without which the tokenizer cannot be used.
  always_trained: texts of one token each, trained on wherever they stand.
  """

  pieces: Callable[[Sequence[Turn], str | None, ChatTokenizer], list[Piece]]
  end: str = ""
  needs: tuple[str, ...] = ()
  always_trained: tuple[str, ...] = ()

  def end_id(self, tokenizer: ChatTokenizer) -> int:
    """The id at which an answer is over. Raises DataError where the tokenizer does not fit the template."""
    for name in self.needs:
      tokenizer.token_id(name)
    self.always_trained_ids(tokenizer)
    if self.pieces is jinja:
      return jinja_template.end_id(tokenizer)
    return tokenizer.token_id(self.end) if self.end else tokenizer.eos_id

  def always_trained_ids(self, tokenizer: ChatTokenizer) -> list[int]:
    """The ids of `always_trained`. Raises DataError where one of them is not a single token."""
    special = tokenizer.specials
    return [special[text] if text in special else tokenizer.single_id(text) for text in self.always_trained]


def question(text: str) -> list[Piece]:
  """A human turn with its placeholders moved to the front, each on a line of its own (LLaVA's rule, for any number)."""
  n_images = text.count(IMAGE_PLACEHOLDER)
  if not n_images:
    return [Piece("text", text)]
  rest = text.replace(IMAGE_PLACEHOLDER, "").strip()
  pieces = [IMAGE, Piece("text", "\n")] * n_images
  return [*pieces, Piece("text", rest)] if rest else pieces[:-1]


def vicuna_v1(turns: Sequence[Turn], system: str | None, tokenizer: ChatTokenizer | None = None) -> list[Piece]:
  """Vicuna v1.1: "SYSTEM USER: q ASSISTANT: a</s>USER: ..."; trained on are " a</s>".

  A turn without text ends at its colon, as in the released code: this is where a prompt waits for its answer.
  """
  del tokenizer
  system = VICUNA_SYSTEM if system is None else system
  pieces = [Piece("text", system + " ")] if system else []
  for turn in turns:
    pieces.append(USER if turn.role == "human" else ASSISTANT)
    if turn.role == "human" and turn.text:
      pieces += [SPACE, *question(turn.text), SPACE]
    elif turn.text:
      pieces += [Piece("text", " " + turn.text, True), END]
  return pieces


def plain(turns: Sequence[Turn], system: str | None, tokenizer: ChatTokenizer | None = None) -> list[Piece]:
  """LLaVA's pretraining: the images, then the caption and a newline, which are trained on. The question is left out.

  An empty answer is a caption still to be written. Raises DataError unless there is one question with one answer.
  """
  del system, tokenizer
  if len(turns) != 2:
    raise DataError(f"the template 'plain' takes one question and one answer, not {len(turns)} turns; use 'vicuna_v1'")
  images = [IMAGE] * turns[0].text.count(IMAGE_PLACEHOLDER)
  return [*images, Piece("text", turns[1].text + "\n", trained_on=True)] if turns[1].text else images


def chatml(turns: Sequence[Turn], system: str | None, tokenizer: ChatTokenizer | None = None) -> list[Piece]:
  """Qwen2's: "<|im_start|>user\\nq<|im_end|>\\n<|im_start|>assistant\\na<|im_end|>\\n"; trained on are "a<|im_end|>".

  Qwen2's own system text stands in front where the sample has none, and nothing does where the sample's is empty.
  """
  del tokenizer
  return _chatml(turns, QWEN_SYSTEM if system is None else system, "\n")


def qwen2_5(turns: Sequence[Turn], system: str | None, tokenizer: ChatTokenizer | None = None) -> list[Piece]:
  """`chatml` with Qwen2.5's own system text."""
  del tokenizer
  return _chatml(turns, QWEN2_5_SYSTEM if system is None else system, "\n")


def internvl2(turns: Sequence[Turn], system: str | None, tokenizer: ChatTokenizer | None = None) -> list[Piece]:
  """`chatml` as InternVL 2 writes it: with its own system text, and without a newline between the blocks."""
  del tokenizer
  return _chatml(turns, INTERNVL2_SYSTEM if system is None else system, "")


def mistral_instruct(turns: Sequence[Turn], system: str | None, tokenizer: ChatTokenizer | None = None) -> list[Piece]:
  """Mistral 7B's, up to version 0.2: "[INST] q [/INST] a</s>[INST] ..."; trained on are " a</s>".

  It has no place for a system text: the sample's stands before the first question, with an empty line between.
  """
  del tokenizer
  pieces = []
  for number, turn in enumerate(turns):
    if turn.role == "human":
      first = [Piece("text", f"{system}\n\n")] if system and not number else []
      pieces += [Piece("text", "[INST] "), *first, *question(turn.text), Piece("text", " [/INST]")]
    elif turn.text:
      pieces += [Piece("text", " " + turn.text, True), END]
  return pieces


def chatml_released(turns: Sequence[Turn], system: str | None, tokenizer: ChatTokenizer | None = None) -> list[Piece]:
  """`chatml` with the labels of LLaVA-NeXT's and LLaVA-UHD v2's released code: an assistant's block is trained on with
  its header and the newline after it, and every "<|im_start|>", "<|im_end|>" and newline token wherever it stands."""
  del tokenizer
  header = lambda role, trained_on: _chatml_header(role, trained_on)
  system = QWEN_SYSTEM if system is None else system
  return _blocks(turns, system, header, "<|im_end|>", "\n", whole=True)


def llava_llama_3(turns: Sequence[Turn], system: str | None, tokenizer: ChatTokenizer | None = None) -> list[Piece]:
  """Llama 3's: "<|start_header_id|>user<|end_header_id|>\\n\\nq<|eot_id|>..."; trained on are "a<|eot_id|>".

  Texts keep their outer spaces, which Llama 3's own template takes off.
  """
  del tokenizer

  def header(role, trained_on):
    del trained_on
    start, end = Piece("special", "<|start_header_id|>"), Piece("special", "<|end_header_id|>")
    return [start, Piece("text", role), end, Piece("text", "\n\n")]

  return _blocks(turns, LLAMA_3_SYSTEM if system is None else system, header, "<|eot_id|>", "")


def jinja(turns: Sequence[Turn], system: str | None, tokenizer: ChatTokenizer) -> list[Piece]:
  """The chat template beside the tokenizer; trained on are each answer and the special token that ends it."""
  return jinja_template.pieces([(ROLES[turn.role], _contents(turn)) for turn in turns], system, tokenizer)


def _chatml(turns: Sequence[Turn], system: str, after: str) -> list[Piece]:
  return _blocks(turns, system, lambda role, trained_on: _chatml_header(role), "<|im_end|>", after)


def _contents(turn: Turn) -> list[Piece]:
  return question(turn.text) if turn.role == "human" else [Piece("text", turn.text)]


def _chatml_header(role: str, trained_on: bool = False) -> list[Piece]:
  return [Piece("special", "<|im_start|>", trained_on), Piece("text", f"{role}\n", trained_on)]


def _blocks(
  turns: Sequence[Turn],
  system: str,
  header: Callable[[str, bool], list[Piece]],
  end: str,
  after: str,
  whole: bool = False,
) -> list[Piece]:
  """Blocks of a header, a text, the token `end` and the text `after`; `whole`: an assistant's block is trained on from
  its first token to its last. A last answer without text is left open."""
  untrained = [Piece("special", end), Piece("text", after)]
  pieces = [*header("system", False), Piece("text", system), *untrained] if system else []
  for number, turn in enumerate(turns):
    if turn.role == "human":
      pieces += [*header("user", False), *question(turn.text), *untrained]
      continue
    # A prompt ends with the header; a token that reached from it into the answer could never be generated.
    pieces += header("assistant", whole) + ([] if whole else [CUT])
    if turn.text:
      pieces += [Piece("text", turn.text, True), Piece("special", end, True), Piece("text", after, whole)]
    elif number < len(turns) - 1:
      pieces += [Piece("special", end, whole), Piece("text", after, whole)]
  return pieces


CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
LLAMA_3_TOKENS = ("<|start_header_id|>", "<|end_header_id|>")
TEMPLATES: dict[str, Template] = {
  "vicuna_v1": Template(vicuna_v1),
  "plain": Template(plain),
  "chatml": Template(chatml, "<|im_end|>", CHATML_TOKENS),
  "qwen2_5": Template(qwen2_5, "<|im_end|>", CHATML_TOKENS),
  "internvl2": Template(internvl2, "<|im_end|>", CHATML_TOKENS),
  "mistral_instruct": Template(mistral_instruct),
  "chatml_released": Template(chatml_released, "<|im_end|>", CHATML_TOKENS, (*CHATML_TOKENS, "\n")),
  "llava_llama_3": Template(llava_llama_3, "<|eot_id|>", LLAMA_3_TOKENS),
  "jinja": Template(jinja),
}


def find(name: str) -> Template:
  """The template of a name. Raises DataError where there is none."""
  if name not in TEMPLATES:
    raise DataError(f"unknown template {name!r}; data.template must be one of {', '.join(TEMPLATES)}")
  return TEMPLATES[name]
