"""Tokenizers: from pieces of a prompt to ids, with what a template says kept apart from what somebody typed."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import AddedToken, Tokenizer

from mllm_jax.data.records import DataError

VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")  # one of these is the tokenizer itself
TOKENIZER_FILES = (
  *VOCABULARY_FILES,
  "merges.txt",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "added_tokens.json",
  "chat_template.jinja",
  "chat_template.json",
  "generation_config.json",  # for the tokens that end answers
)
# What the language model is in a model of LLaVA's own types.
DECODER_TYPES = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral"}
DECODER_TYPES |= {"llava_qwen": "qwen2", "llava_qwen2": "qwen2"}
PRIVATE_USE = range(0xF0000, 0xFFFFE)  # characters without a meaning: Unicode's plane 15
STRUCTURAL = re.compile(r"<\|.*\|>")  # tokens of structure by their name, whether or not the files call them special


class Piece(NamedTuple):
  """A part of a prompt.

  kind: "text"; "special" (the special token that `text` names); "end" (the tokenizer's end-of-sequence token); "image"
    (one image's visual tokens); "cut" (nothing, but no token reaches across it).
  """

  kind: str
  text: str = ""
  trained_on: bool = False


IMAGE = Piece("image")
END = Piece("end", trained_on=True)
CUT = Piece("cut")


class Encoded(NamedTuple):
  """ids: int32 [N], IMAGE_TOKEN_INDEX for an image. trained_on: bool [N], whether the loss asks for this token."""

  ids: np.ndarray
  trained_on: np.ndarray


class ChatTokenizer:
  """A Hugging Face tokenizer that tells a template's special tokens from the same characters in a text.

  Special tokens inside a text stay text. The template's own cannot be cut out and the text between them tokenized
  apart, because what follows a special token is tokenized differently there than at the start of a text (that is what
  the "legacy" flag of Llama's tokenizers decides). So private-use characters, made known to the tokenizer as tokens,
  stand in for them during tokenization.

  bos_id: the token that the tokenizer puts in front of a text, or None if it puts none.
  eos_id: the end-of-sequence token. pad_id: the padding token, or None. vocab_size: ids, added ones included.
  end_ids: the end-of-sequence token and others at which the language model's answers end.
  specials: {content: id} of the special tokens.
  named: what a chat template may ask for by name, {"eos_token": "</s>", ...}.
  chat_template: the Jinja text beside the tokenizer, "" without one.
  """

  def __init__(
    self,
    backend_json: str,
    bos_id: int | None,
    eos_id: int,
    pad_id: int | None,
    vocab_size: int,
    named: Mapping[str, str] | None = None,
    chat_template: str = "",
    end_ids: Sequence[int] = (),
  ):
    self.bos_id, self.eos_id, self.pad_id, self.vocab_size = bos_id, eos_id, pad_id, vocab_size
    self.named, self.chat_template = dict(named or {}), chat_template
    self.end_ids = frozenset((eos_id, *end_ids))
    self._json, added = _prepared(backend_json, eos_id)
    self.specials = {token["content"]: token["id"] for token in added}
    self._flags = {token["id"]: (token["lstrip"], token["rstrip"]) for token in added}
    self._flags.setdefault(eos_id, (False, False))
    self._stand_in = {token: number for number, token in enumerate([*self._flags, None])}  # None: a cut
    self._standing_for = np.array([*self._flags, -1], np.int32)
    self._plain = _backend(self._json)
    self._marked: dict[int, tuple[Tokenizer, int]] = {}
    self._swallows_space = self._ids(" a") == self._ids("a")

  def __reduce__(self):
    # The library's own pickling forgets that special tokens are to stay text.
    fields = (
      self.bos_id,
      self.eos_id,
      self.pad_id,
      self.vocab_size,
      self.named,
      self.chat_template,
      tuple(sorted(self.end_ids)),
    )
    return ChatTokenizer, (self._json, *fields)

  def token_id(self, content: str) -> int:
    """The id of a special token. Raises DataError where the tokenizer has none of that name."""
    if content not in self.specials:
      known = ", ".join(list(self.specials)[:8])
      raise DataError(f"the tokenizer has no special token {content!r}; it has {known}; choose another data.template")
    return self.specials[content]

  def single_id(self, text: str) -> int:
    """The id of a text that is one token. Raises DataError where it is several."""
    ids = self._ids(text)
    if len(ids) != 1:
      raise DataError(
        f"{text!r} is {len(ids)} tokens of the tokenizer where one is needed; choose another data.template"
      )
    return ids[0]

  def inside_id(self, text: str) -> int:
    """The id of a text that is one token where it follows other text, without a space before it. Raises DataError where
    it is several."""
    for before in "a0)":  # a vocabulary may have one of these joined with the text as a token of its own
      start, ids = self._ids(before), self._ids(before + text)
      if ids[:-1] == start:
        return ids[-1]
    raise DataError(f"{text!r} is no token of its own in this tokenizer, and one is needed to stand between images")

  def encode_chunk(self, pieces: Sequence[Piece]) -> Encoded:
    """Tokenizes pieces, without images among them, as one text; no beginning-of-sequence token is added.

    A token is trained on if it holds any character of a piece that is: the space before an answer merges into the
    answer's first token, or stands alone before it, and belongs to it either way. A cut changes nothing where no token
    reaches across it.
    """
    pieces = self.prepare(pieces)
    cuts = cuts_of(pieces)
    encoded, crossed = self._encode([piece for piece in pieces if piece.kind != "cut"], list(cuts.values()))
    if not crossed:
      return encoded
    needed = lambda place, piece: piece.kind != "cut" or cuts[place] in crossed
    return self._encode([piece for place, piece in enumerate(pieces) if needed(place, piece)], [])[0]

  def prepare(self, pieces: Sequence[Piece]) -> list[Piece]:
    """The pieces of a chunk as they are tokenized: without empty ones, with the space that SentencePiece puts first."""
    pieces = [piece for piece in pieces if piece.text or piece.kind in ("end", "cut")]
    if self._swallows_space and pieces and pieces[0].kind == "text" and pieces[0].text.startswith((" ", "\u2581")):
      # SentencePiece puts a space before every text; the tokenizers library makes do with the text's own first space.
      return [Piece("text", " ", pieces[0].trained_on), *pieces]
    return pieces

  def marked(self, pieces: Sequence[Piece]) -> tuple[Tokenizer, str]:
    """(a tokenizer, the pieces as one text for it): each token of structure is a character that is one token to it."""
    base = self._free_block([piece.text for piece in pieces if piece.kind == "text"])
    texts = [piece.text if piece.kind == "text" else chr(base + self._stand_in[self._id_of(piece)]) for piece in pieces]
    return self._backend_of(base)[0], "".join(texts)

  def _encode(self, pieces: Sequence[Piece], cuts: Sequence[int]) -> tuple[Encoded, list[int]]:
    """The pieces' ids, and those of `cuts`, which are offsets in the text, that a token reaches across."""
    base = self._free_block([piece.text for piece in pieces if piece.kind == "text"])
    tokenizer, first = self._backend_of(base)
    structure = [piece for piece in pieces if piece.kind != "text"]
    texts = [piece.text if piece.kind == "text" else chr(base + self._stand_in[self._id_of(piece)]) for piece in pieces]
    encoding = tokenizer.encode("".join(texts), add_special_tokens=False)

    trained_characters = np.repeat([piece.trained_on for piece in pieces], [len(text) for text in texts])
    count = np.concatenate([[0], np.cumsum(trained_characters, dtype=np.int64)])
    start, stop = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
    crossed = [cut for cut in cuts if ((start < cut) & (stop > cut)).any()]
    # A token of no characters, which some tokenizers make of a lone space, belongs to the character that follows.
    stop = np.minimum(np.maximum(stop, start + 1), len(trained_characters))
    trained_on = count[stop] > count[start]

    ids = np.array(encoding.ids, np.int32)
    stands_in = ids >= first
    ids[stands_in] = self._standing_for[ids[stands_in] - first]
    trained_on[stands_in] = [piece.trained_on for piece in structure]  # its offsets may take in the spaces around it
    return Encoded(ids[ids >= 0], trained_on[ids >= 0]), crossed

  def _id_of(self, piece: Piece) -> int | None:
    return {"end": self.eos_id, "cut": None}[piece.kind] if piece.kind != "special" else self.token_id(piece.text)

  def _free_block(self, texts: Sequence[str]) -> int:
    """The first of as many characters in a row, none of them in the texts, as there are stand-ins."""
    size = len(self._stand_in)
    odd = [text for text in texts if text and ord(max(text)) >= PRIVATE_USE.start]
    taken = {(code - PRIVATE_USE.start) // size for text in odd for code in map(ord, text) if code in PRIVATE_USE}
    for block in range(len(PRIVATE_USE) // size):
      if block not in taken:
        return PRIVATE_USE.start + block * size
    raise DataError("the text is full of private-use characters (U+F0000 and following); take them out")

  def _backend_of(self, base: int) -> tuple[Tokenizer, int]:
    """A tokenizer that knows the characters from `base` on as stand-ins, and the id it gives to the first of them."""
    found = self._marked.get(base)
    if found is None:
      flags = [*self._flags.values(), (False, False)]
      markers = [
        AddedToken(chr(base + number), special=False, normalized=False, lstrip=lstrip, rstrip=rstrip)
        for number, (lstrip, rstrip) in enumerate(flags)
      ]
      tokenizer = _backend(self._json, markers)
      found = tokenizer, tokenizer.token_to_id(chr(base))
      # Texts with private-use characters are rare, and a large vocabulary is 100 MB. Not emptied in place: threads.
      self._marked = {**self._marked, base: found} if len(self._marked) < 4 else {base: found}
    return found

  def _ids(self, text: str) -> list[int]:
    return self._plain.encode(text, add_special_tokens=False).ids

  @property
  def backend_json(self) -> str:
    """The tokenizer as the library writes it."""
    return self._json

  def decode(self, ids: Sequence[int]) -> str:
    """The text of generated ids, without special tokens."""
    return self._plain.decode([int(i) for i in ids], skip_special_tokens=True)

  def token_texts(self, ids: Sequence[int]) -> list[str]:
    """Each id by itself, for people to look at: a special token's name, a text with the space before it, or, where the
    id is a part of a character, its name in the vocabulary."""
    anchor = self._ids("a")  # what comes first in a text may lose the space before it
    before, names = self._plain.decode(anchor), {number: content for content, number in self.specials.items()}

    def text(token: int) -> str:
      decoded = self._plain.decode([*anchor, token])[len(before) :]
      return decoded if decoded and "\ufffd" not in decoded else self._plain.id_to_token(token) or ""

    return [names.get(int(token)) or text(int(token)) for token in ids]


def cuts_of(pieces: Sequence[Piece]) -> dict[int, int]:
  """{place among the pieces: offset in the joined texts} of the cuts; any other piece but text is one character."""
  offsets, offset = {}, 0
  for place, piece in enumerate(pieces):
    if piece.kind == "cut":
      offsets[place] = offset
    else:
      offset += len(piece.text) if piece.kind == "text" else 1
  return offsets


def _prepared(backend_json: str, eos_id: int) -> tuple[str, list[dict[str, Any]]]:
  """The tokenizer's JSON as it is used here, and its special tokens.

  The post-processor is left out: what it adds is not wanted, and GPT-2's takes the spaces out of the offsets.
  """
  content = json.loads(backend_json)
  content["post_processor"] = None
  for token in content["added_tokens"]:
    token["special"] = bool(token["special"] or token["id"] == eos_id or STRUCTURAL.fullmatch(token["content"]))
  return json.dumps(content), [token for token in content["added_tokens"] if token["special"]]


def _backend(backend_json: str, markers: Sequence[AddedToken] = ()) -> Tokenizer:
  """A tokenizer to which special tokens in a text are text, and each of `markers` is one token."""
  tokenizer = Tokenizer.from_str(backend_json)
  tokenizer.no_truncation()
  tokenizer.no_padding()
  tokenizer.add_tokens(list(markers))
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
  named = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if not isinstance(token, list)}
  return ChatTokenizer(
    tokenizer.backend_tokenizer.to_str(),
    bos_id,
    tokenizer.eos_token_id,
    tokenizer.pad_token_id,
    len(tokenizer),
    named,
    _chat_template(folder, tokenizer),
    _end_ids(folder),
  )


def _chat_template(folder: str, tokenizer: Any) -> str:
  """The chat template of a folder: the tokenizer's, or, where it has none, the one that processors keep in a file of
  their own. Of several the one called "default"; "" without any."""
  template = tokenizer.chat_template
  path = Path(folder) / "chat_template.json"
  if not template and path.is_file():
    try:
      template = json.loads(path.read_text(encoding="utf-8"))["chat_template"]
    except (ValueError, KeyError, TypeError) as error:
      raise DataError(
        f"{path}: holds no chat template ({type(error).__name__}: {error}); copy the file again"
      ) from error
  if isinstance(template, dict):
    template = template.get("default", "")
  return template or ""


def _end_ids(folder: str) -> list[int]:
  """The tokens that end answers by the language model's generation_config.json, one or a list of them; none without the
  file."""
  path = Path(folder) / "generation_config.json"
  if not path.is_file():
    return []
  try:
    given = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
  except (ValueError, AttributeError) as error:
    raise DataError(f"{path}: is no JSON object ({error}); copy the file again") from error
  found = given if isinstance(given, list) else [] if given is None else [given]
  if not all(type(token) is int and token >= 0 for token in found):
    raise DataError(f"{path}: eos_token_id is {given!r}; it must be a token's number, or a list of them")
  return found


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
  kind = whole.get("text_config", whole.get("llm_config", whole)).get("model_type", "llama")
  (to / "config.json").write_text(json.dumps({"model_type": DECODER_TYPES.get(kind, kind)}), encoding="utf-8")
