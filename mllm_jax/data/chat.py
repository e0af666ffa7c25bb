"""Chat: from turns to token ids, and which of them are trained on.

A template turns a conversation into pieces of text that already know whether they are trained on. The text between
two image placeholders is tokenized in one go, so that the ids are those of the released code, and the offsets of the
tokens say which piece each belongs to. The released code instead searches the finished prompt for its separators and
counts tokens again; it loses a whole sample when an answer contains a separator, or when two ways of tokenizing
differ in length.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import AddedToken, Tokenizer

from mllm_jax.data.records import IMAGE_PLACEHOLDER, DataError, Turn, placeholder_problem

IMAGE_TOKEN_INDEX = -200  # stands in the ids where an image's visual tokens will be; LLaVA's number
VICUNA_SYSTEM = (
  "A chat between a curious user and an artificial intelligence assistant. "
  "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")  # one of these is the tokenizer itself
TOKENIZER_FILES = (
  *VOCABULARY_FILES,
  "merges.txt",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "added_tokens.json",
  "chat_template.jinja",
)
# What the language model is in a model of LLaVA's own types.
DECODER_TYPES = {"llava": "llama", "llava_llama": "llama", "llava_qwen": "qwen2", "llava_qwen2": "qwen2"}
PRIVATE_USE = range(0xE000, 0xF900)  # Unicode's characters without a meaning


class Piece(NamedTuple):
  """A part of a prompt: "text", "end" (the end-of-sequence token) or "image" (one image's visual tokens)."""

  kind: str
  text: str = ""
  trained_on: bool = False


IMAGE = Piece("image")
END = Piece("end", trained_on=True)


class Encoded(NamedTuple):
  """ids: int32 [N], IMAGE_TOKEN_INDEX for an image. trained_on: bool [N], whether the loss asks for this token."""

  ids: np.ndarray
  trained_on: np.ndarray


class ChatTokenizer:
  """A Hugging Face tokenizer that tells a template's end-of-sequence token from the same characters in a text.

  Special tokens inside a text stay text. The template's own "</s>" cannot be cut out and tokenized apart, because what
  follows it is tokenized differently there than at the start of a text (that is what the "legacy" flag of Llama's
  tokenizers decides). So a private-use character, made known to the tokenizer as a token, takes its place during
  tokenization.

  bos_id: the token that the tokenizer puts in front of a text, or None if it puts none.
  eos_id: the end-of-sequence token. pad_id: the padding token, or None. vocab_size: ids, added ones included.
  """

  def __init__(self, backend_json: str, bos_id: int | None, eos_id: int, pad_id: int | None, vocab_size: int):
    self.bos_id, self.eos_id, self.pad_id, self.vocab_size = bos_id, eos_id, pad_id, vocab_size
    self._json = backend_json
    self._plain = _backend(backend_json)
    self._marker = chr(PRIVATE_USE[0])
    self._with_marker = _backend(backend_json, self._marker)
    self._swallows_space = self._ids(" a") == self._ids("a")

  def __reduce__(self):
    # The library's own pickling forgets that special tokens are to stay text.
    return ChatTokenizer, (self._json, self.bos_id, self.eos_id, self.pad_id, self.vocab_size)

  def encode_chunk(self, pieces: Sequence[Piece]) -> Encoded:
    """Tokenizes "text" and "end" pieces as one text, without a beginning-of-sequence token.

    A token is trained on if it holds any character of a piece that is: the space before an answer merges into the
    answer's first token, or stands alone before it, and belongs to it either way.
    """
    marker, tokenizer = self._marker, self._with_marker
    pieces = [piece for piece in pieces if piece.text or piece.kind == "end"]
    if any(marker in piece.text for piece in pieces):
      marker = next(chr(code) for code in PRIVATE_USE if not any(chr(code) in piece.text for piece in pieces))
      tokenizer = _backend(self._json, marker)
    if self._swallows_space and pieces and pieces[0].text.startswith((" ", "\u2581")):
      # SentencePiece puts a space before every text; the tokenizers library makes do with the text's own first space.
      pieces = [Piece("text", " ", pieces[0].trained_on), *pieces]
    texts = [marker if piece.kind == "end" else piece.text for piece in pieces]
    encoding = tokenizer.encode("".join(texts), add_special_tokens=False)
    ids = np.array(encoding.ids, np.int32)
    ids[ids == tokenizer.token_to_id(marker)] = self.eos_id

    trained_characters = np.repeat([piece.trained_on for piece in pieces], [len(text) for text in texts])
    count = np.concatenate([[0], np.cumsum(trained_characters, dtype=np.int64)])
    start, stop = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
    # A token of no characters, which some tokenizers make of a lone space, belongs to the character that follows.
    stop = np.minimum(np.maximum(stop, start + 1), len(trained_characters))
    return Encoded(ids, count[stop] > count[start])

  def _ids(self, text: str) -> list[int]:
    return self._plain.encode(text, add_special_tokens=False).ids

  def decode(self, ids: Sequence[int]) -> str:
    """The text of generated ids, without special tokens."""
    return self._plain.decode([int(i) for i in ids], skip_special_tokens=True)


def _backend(backend_json: str, marker: str = "") -> Tokenizer:
  """A tokenizer to which special tokens in a text are text, and `marker`, where given, is one token."""
  tokenizer = Tokenizer.from_str(backend_json)
  tokenizer.no_truncation()
  tokenizer.no_padding()
  if marker:
    tokenizer.add_tokens([AddedToken(marker, special=False, normalized=False)])
  tokenizer.encode_special_tokens = True
  return tokenizer


def load_tokenizer(folder: str) -> ChatTokenizer:
  """Reads the tokenizer of a local Hugging Face folder; nothing is downloaded.

  Raises:
    DataError: the folder is missing, holds no tokenizer, or holds one that cannot be used here.
  """
  tokenizer = hf_tokenizer(folder)
  if tokenizer.eos_token_id is None:
    raise DataError(f"{folder}: the tokenizer has no end-of-sequence token; set eos_token in tokenizer_config.json")
  first = tokenizer("a").input_ids[0]
  bos_id = first if first == tokenizer.bos_token_id else None
  backend = tokenizer.backend_tokenizer
  return ChatTokenizer(backend.to_str(), bos_id, tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer))


def hf_tokenizer(folder: str | os.PathLike) -> Any:
  """transformers' own tokenizer of a folder, made of the tokenizer's files alone.

  transformers 5 makes another tokenizer, with other ids, of the same files where config.json beside them is a LLaVA
  model's; so that is not shown to it.

  Raises:
    DataError: the folder is missing, holds no tokenizer, or holds one that cannot be loaded.
  """
  if not os.path.isdir(folder):
    raise DataError(
      f"{folder}: no such folder; name a local Hugging Face folder with one of {', '.join(VOCABULARY_FILES)} in it"
    )
  if not any(os.path.isfile(os.path.join(folder, name)) for name in VOCABULARY_FILES):
    raise DataError(
      f"{folder}: holds no tokenizer; looked for {', '.join(VOCABULARY_FILES)}; copy the language model's there"
    )
  os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # PyTorch is not missing here: tokenizers need none
  from transformers import AutoTokenizer  # takes a second, and most of this package does without it

  try:
    with tempfile.TemporaryDirectory() as alone:
      copy_tokenizer(folder, alone)
      tokenizer = AutoTokenizer.from_pretrained(alone, local_files_only=True)
    tokenizer.backend_tokenizer  # noqa: B018 - absent in a slow tokenizer
  except Exception as error:  # the library raises whatever the file formats below it raise
    raise DataError(
      f"{folder}: the tokenizer cannot be loaded ({type(error).__name__}: {error}); "
      "copy the language model's tokenizer files again"
    ) from error
  tokenizer.name_or_path = str(folder)
  return tokenizer


def copy_tokenizer(folder: str | os.PathLike, to: str | os.PathLike) -> None:
  """Copies a tokenizer's files out of a model's folder into another, which is made if it is not there.

  Of config.json only the language model's type comes along, and only where tokenizer_config.json names no class, which
  then follows from it.

  Raises:
    ValueError: a file is no JSON object.
  """
  folder, to = Path(folder), Path(to)
  to.mkdir(parents=True, exist_ok=True)
  for name in TOKENIZER_FILES:
    if (folder / name).is_file():
      shutil.copyfile(folder / name, to / name)
  read = lambda file: json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
  if read(folder / "tokenizer_config.json").get("tokenizer_class") or not (folder / "config.json").is_file():
    return
  whole = read(folder / "config.json")
  kind = whole.get("text_config", whole).get("model_type", "llama")
  (to / "config.json").write_text(json.dumps({"model_type": DECODER_TYPES.get(kind, kind)}), encoding="utf-8")


def vicuna_v1(turns: Sequence[Turn], system: str | None) -> list[Piece]:
  """Vicuna v1.1: "SYSTEM USER: q ASSISTANT: a</s>USER: ..."; trained on are " a</s>".

  A turn without text ends at its colon, as in the released code: this is where a prompt waits for its answer.
  """
  system = VICUNA_SYSTEM if system is None else system
  pieces = [Piece("text", system + " ")] if system else []
  for turn in turns:
    pieces.append(Piece("text", "USER:" if turn.role == "human" else "ASSISTANT:"))
    if turn.role == "human" and turn.text:
      pieces += [Piece("text", " "), *_question(turn.text), Piece("text", " ")]
    elif turn.text:
      pieces += [Piece("text", " " + turn.text, trained_on=True), END]
  return pieces


def plain(turns: Sequence[Turn], system: str | None) -> list[Piece]:
  """LLaVA's pretraining: the images, then the caption and a newline, which are trained on. The question is left out.

  An empty answer is a caption still to be written. Raises DataError unless there is one question with one answer.
  """
  del system
  if len(turns) != 2:
    raise DataError(f"the template 'plain' takes one question and one answer, not {len(turns)} turns; use 'vicuna_v1'")
  images = [IMAGE] * turns[0].text.count(IMAGE_PLACEHOLDER)
  return [*images, Piece("text", turns[1].text + "\n", trained_on=True)] if turns[1].text else images


# A template takes turns (human first, alternating) and the sample's system text, and returns the prompt's pieces.
TEMPLATES: dict[str, Callable[[Sequence[Turn], str | None], list[Piece]]] = {"vicuna_v1": vicuna_v1, "plain": plain}


def encode(
  turns: Sequence[Turn], template: str, tokenizer: ChatTokenizer, n_images: int, system: str | None = None
) -> Encoded:
  """Token ids of a conversation, and which of them are trained on.

  Args:
    turns: human and gpt turns in alternation, human first. `<image>` in a human turn is a placeholder, moved to the
      turn's front; in an answer it is text.
    template: a name in TEMPLATES.
    tokenizer: from `load_tokenizer`.
    n_images: images of the conversation, which must be as many as its placeholders.
    system: replaces the template's system text; None keeps it.

  Raises:
    DataError: unknown template, turns that do not alternate, placeholders that do not match the images.
  """
  if template not in TEMPLATES:
    raise DataError(f"unknown template {template!r}; data.template must be one of {', '.join(TEMPLATES)}")
  for i, turn in enumerate(turns):
    expected = ("human", "gpt")[i % 2]
    if turn.role != expected:
      raise DataError(
        f"turn {i} is of {turn.role!r} where one of {expected!r} is due; turns alternate and begin with 'human'"
      )
  problem = placeholder_problem(turns, n_images)
  if problem:
    raise DataError(problem)
  return _encode_pieces(TEMPLATES[template](turns, system), tokenizer)


def encode_prompt(
  turns: Sequence[Turn], template: str, tokenizer: ChatTokenizer, n_images: int, system: str | None = None
) -> np.ndarray:
  """int32 [N]: ids of a conversation up to where its next answer begins. Arguments and errors as in `encode`.

  Raises:
    DataError: also if the last turn is not a human one.
  """
  if not turns or turns[-1].role != "human":
    raise DataError("the last turn is not a question; end the conversation with a human turn")
  return encode([*turns, Turn("gpt", "")], template, tokenizer, n_images, system).ids


def _question(text: str) -> list[Piece]:
  """A human turn with its placeholders moved to the front, each on a line of its own (LLaVA's rule, for any number)."""
  n_images = text.count(IMAGE_PLACEHOLDER)
  if not n_images:
    return [Piece("text", text)]
  rest = text.replace(IMAGE_PLACEHOLDER, "").strip()
  pieces = [IMAGE, Piece("text", "\n")] * n_images
  return [*pieces, Piece("text", rest)] if rest else pieces[:-1]


def _encode_pieces(pieces: Sequence[Piece], tokenizer: ChatTokenizer) -> Encoded:
  """Each stretch between images is tokenized as a text of its own; one beginning-of-sequence token leads all."""
  parts = [] if tokenizer.bos_id is None else [_untrained(tokenizer.bos_id)]
  chunk = []
  for piece in [*pieces, None]:
    if piece is None or piece.kind == "image":
      parts.append(tokenizer.encode_chunk(chunk))
      chunk = []
      if piece is not None:
        parts.append(_untrained(IMAGE_TOKEN_INDEX))
    else:
      chunk.append(piece)
  return Encoded(*(np.concatenate(field) for field in zip(*parts, strict=True)))


def _untrained(token: int) -> Encoded:
  return Encoded(np.array([token], np.int32), np.array([False]))
