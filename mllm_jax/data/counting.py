"""Counting: how many tokens pieces of prompts become, without the tokens themselves.

Where no token of a vocabulary reaches from a word's end over the space behind it, as in SentencePiece's for Llama and
Vicuna, a text has as many tokens as its words have one by one: merges never cross the places in between. Then each word
is tokenized once and looked up ever after. For other tokenizers many texts are given to the library at a time.
"""

import json
import re
from collections.abc import Iterable, Sequence

from mllm_jax.data.tokenizer import END, ChatTokenizer, Piece, cuts_of

WORDS = re.compile("[ \u2581]+[^ \u2581]*|[^ \u2581]+")
LONG = 64  # characters above which a word is not remembered
KEPT = 2**20  # words that are remembered


class TokenCounter:
  """Counts the tokens of chunks: `ChatTokenizer.encode_chunk`'s number of ids. For one thread at a time."""

  def __init__(self, tokenizer: ChatTokenizer):
    self._tokenizer = tokenizer
    self._by_words = independent_words(tokenizer.backend_json)
    self._middle: dict[str, int] = {}  # tokens of a word behind others and a space, which is not written here
    self._heads: dict[tuple[bool, str], int] = {}  # of one that begins a text, or follows a token of structure

  def count(self, chunks: Iterable[Sequence[Piece]]) -> list[int]:
    """The number of each chunk's tokens. Raises DataError as `encode_chunk` does.

    Chunks are looked at one after the other and not kept where words are counted: so many small objects at a time would
    keep Python's garbage collection busy.
    """
    prepared = map(self._tokenizer.prepare, chunks)
    return self._of_words(prepared) if self._by_words else self._of_texts(list(prepared))

  def _of_words(self, chunks: Iterable[list[Piece]]) -> list[int]:
    counts: list[int] = []
    unknown: list[tuple[int, tuple[bool, str], list[str]]] = []  # (chunk, first word, further words)
    odd: list[tuple[int, list[Piece]]] = []
    head, lookup = self._heads.__getitem__, self._middle.__getitem__
    for number, pieces in enumerate(chunks):
      texts, behind, total = [], False, 0
      for piece in [*pieces, END]:
        if piece.kind == "text":
          texts.append(piece.text)
          continue
        if piece.kind == "cut":
          odd.append((number, pieces))
          break
        if piece.kind == "special":
          self._tokenizer.token_id(piece.text)
        if texts:
          first, *rest = _words("".join(texts))
          try:
            total += head((behind, first)) + sum(map(lookup, rest))
          except KeyError:
            unknown.append((number, (behind, first), rest))
        texts, behind, total = [], True, total + 1
      counts.append(total - 1)  # the END added here
    once = self._learn({key for _, key, _ in unknown}, set().union(*(rest for _, _, rest in unknown)))
    for number, key, rest in unknown:
      counts[number] += head(key) + sum(map(lookup, rest))
    for key in once:
      del (self._middle if isinstance(key, str) else self._heads)[key]
    for number, pieces in odd:
      counts[number] = self._of_texts([pieces])[0]
    return counts

  def _learn(self, heads: set[tuple[bool, str]], words: set[str]) -> list[str | tuple[bool, str]]:
    """Tokenizes words that are not known yet, each where it stands: first, behind a token, or behind a word.

    Returns those that are not worth remembering.
    """
    if len(self._middle) > KEPT or len(self._heads) > KEPT:
      self._middle.clear()
      self._heads.clear()
    heads, words = heads - self._heads.keys(), words - self._middle.keys()
    keys = [*heads, *words]
    pieces = [[END] * key[0] + [Piece("text", key[1])] for key in heads] + [
      [Piece("text", "a " + word)] for word in words
    ]
    extra = [int(key[0]) for key in heads] + self._ids([[Piece("text", "a")]]) * len(words)
    for key, count, more in zip(keys, self._ids(pieces), extra, strict=True):
      (self._middle if isinstance(key, str) else self._heads)[key] = count - more
    return [key for key in keys if len(key if isinstance(key, str) else key[1]) > LONG]

  def _ids(self, chunks: Sequence[Sequence[Piece]]) -> list[int]:
    """Ids of chunks without cuts, as they are."""
    texts: dict[int, tuple] = {}
    for number, pieces in enumerate(chunks):
      backend, text = self._tokenizer.marked(pieces)
      texts.setdefault(id(backend), (backend, [], []))[1].append(text)
      texts[id(backend)][2].append(number)
    counts = [0] * len(chunks)
    for backend, found, numbers in texts.values():
      for number, encoding in zip(numbers, backend.encode_batch_fast(found, add_special_tokens=False), strict=True):
        counts[number] = len(encoding)
    return counts

  def _of_texts(self, chunks: list[list[Piece]]) -> list[int]:
    without = [[piece for piece in pieces if piece.kind != "cut"] for pieces in chunks]
    counts = self._ids(without)
    cut = [number for number, pieces in enumerate(chunks) if len(without[number]) < len(pieces)]
    for number in cut:
      # Only where characters on both sides of a cut share a token does the cut change anything.
      backend, text = self._tokenizer.marked(without[number])
      encoding = backend.encode(text, add_special_tokens=False)
      if any(_crosses(encoding, place) for place in cuts_of(chunks[number]).values()):
        counts[number] = len(self._tokenizer.encode_chunk(chunks[number]).ids)
    return counts


def _words(text: str) -> list[str]:
  """The words of a text: the first as it is, the others without the space that is before each; further spaces, and
  SentencePiece's sign for one, are a part of the word behind them."""
  found = text.split(" ")
  if "" not in found and "\u2581" not in text:
    return found
  first, *rest = WORDS.findall(text)
  return [first, *(word[1:] for word in rest)]


def _crosses(encoding, place: int) -> bool:
  """Whether a token holds the characters before and behind a place of the text."""
  token = encoding.char_to_token(place)
  return token is not None and encoding.token_to_chars(token)[0] < place


def independent_words(backend_json: str) -> bool:
  """Whether a text's tokens are those of its words one by one, by the tokenizer's JSON."""
  content = json.loads(backend_json)
  model, before, normalizer = content["model"], content["pre_tokenizer"], content["normalizer"]
  plain_steps = (
    {"type": "Prepend", "prepend": "\u2581"},
    {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
  )
  steps = normalizer["normalizers"] if (normalizer or {}).get("type") == "Sequence" else [normalizer] * bool(normalizer)
  if not all(step in plain_steps for step in steps):
    return False
  if before is not None and (before["type"], before.get("replacement")) != ("Metaspace", "\u2581"):
    return False
  if before is None and not steps:
    return False
  if model["type"] != "BPE" or not model["byte_fallback"] or model.get("dropout") or model.get("ignore_merges"):
    return False
  if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
    return False
  if any(not token["special"] or token["lstrip"] or token["rstrip"] for token in content["added_tokens"]):
    return False
  return "\u2581" in model["vocab"] and not any(re.search("[^\u2581]\u2581", token) for token in model["vocab"])
