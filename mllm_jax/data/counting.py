"""Counting: how many tokens pieces of prompts become, without the tokens themselves.

Where no token of a vocabulary reaches from a word's end over the space behind it, as in SentencePiece's for Llama and
Vicuna, a text has as many tokens as its words have one by one: merges never cross the places in between. Then each word
is tokenized once and looked up ever after. For other tokenizers many texts are given to the library at a time.
"""

import json
import re
from collections.abc import Iterable, Sequence

import numpy as np

from mllm_jax.data.tokenizer import END, ChatTokenizer, Piece, cuts_of

HEAD, BEHIND = "\x01", "\x02"  # what a run of text is marked with: it begins a text, or follows a token of structure
KEPT = 2**20  # words that are remembered
BASE = 0x9E3779B97F4A7C15 | 0b101  # of the words' polynomial hashes, modulo 2^64: odd, else arbitrary


class TokenCounter:
  """Counts the tokens of chunks: `ChatTokenizer.encode_chunk`'s number of ids. For one thread at a time."""

  def __init__(self, tokenizer: ChatTokenizer):
    self._tokenizer = tokenizer
    self._by_words = independent_words(tokenizer.backend_json)
    self._known = _Table()
    self._powers = self._inverse = np.zeros(0, np.uint64)

  def count(self, chunks: Iterable[Sequence[Piece]]) -> list[int]:
    """The number of each chunk's tokens. Raises DataError as `encode_chunk` does.

    Chunks are looked at one after the other and not kept where words are counted: so many small objects at a time would
    keep Python's garbage collection busy.
    """
    prepared = map(self._tokenizer.prepare, chunks)
    return self._of_words(prepared) if self._by_words else self._of_texts(list(prepared))

  def _of_words(self, chunks: Iterable[list[Piece]]) -> list[int]:
    runs: list[str] = []
    firsts, structure = [0], []  # of each chunk: where its runs begin and end, tokens that are no text
    odd: list[tuple[int, list[Piece]]] = []
    for number, pieces in enumerate(chunks):
      parts, mark, tokens, plain = [], HEAD, 0, True
      for piece in [*pieces, END]:
        if piece.kind == "text":
          parts.append(piece.text)
          continue
        if piece.kind == "special":
          self._tokenizer.token_id(piece.text)
        if parts:
          text = "".join(parts)
          plain = plain and (text.isascii() or "\u2581" not in text) and HEAD not in text and BEHIND not in text
          runs.append(mark + text)
        parts, mark, tokens, plain = [], BEHIND, tokens + 1, plain and piece.kind != "cut"
      tokens -= 1  # the END added here
      if not plain:  # left to the library
        odd.append((number, pieces))
        del runs[firsts[-1] :]
      firsts.append(len(runs))
      structure.append(tokens)
    total = np.concatenate([[0], np.cumsum(self._of_runs(runs))])
    counts = (np.array(structure, np.int64) + np.diff(total[firsts])).tolist()
    for number, pieces in odd:
      counts[number] = self._of_texts([pieces])[0]
    return counts

  def _of_runs(self, runs: Sequence[str]) -> np.ndarray:
    """int [N]: the tokens of each run of text, its mark in front, by its words.

    A word is the mark and what follows, or what stands behind a space; further spaces are a part of the word behind
    them. It is known by a hash of 63 bits alone: of a million words two are taken for one another once in 10^7 times.
    """
    if not runs:
      return np.zeros(0, np.int64)
    text = np.frombuffer("".join(runs).encode(), np.uint8)
    marks, spaces = text <= ord(BEHIND), text == ord(" ")
    marks &= text >= ord(HEAD)
    begins = spaces.copy()
    begins[1:] &= ~(spaces | marks)[:-1]
    starts = np.flatnonzero(begins | marks)
    stops = np.append(starts[1:], len(text))
    is_head = marks[starts]
    starts = starts + ~is_head
    hashes = self._hashes(text, starts, stops)
    tokens = self._known.find(hashes)
    new = np.flatnonzero(tokens < 0)
    if len(new):
      unique, places = np.unique(hashes[new], return_index=True)
      words = [text[starts[i] : stops[i]].tobytes().decode() for i in new[places]]
      self._known.add(unique, self._learn(words))
      tokens[new] = self._known.find(hashes[new])
    return np.add.reduceat(tokens, np.flatnonzero(is_head))

  def _hashes(self, text: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """uint64 [N]: of each word, the sum of its bytes times powers of BASE, never 0."""
    if len(self._powers) < len(text):
      count = len(text) + len(text) // 4
      inverse = pow(BASE, -1, 2**64)
      self._powers, self._inverse = (np.cumprod(np.full(count, base, np.uint64)) for base in (BASE, inverse))
    sums = np.zeros(len(text) + 1, np.uint64)
    np.cumsum(text * self._powers[: len(text)], out=sums[1:])
    first = np.minimum(starts, len(text) - 1)  # an empty word at the end
    return (sums[stops] - sums[starts]) * self._inverse[first] | np.uint64(2**63)

  def _learn(self, words: Sequence[str]) -> np.ndarray:
    """int [N]: the tokens of words, each where it stands: marked, or behind a word and a space."""
    (before,) = self._ids([[Piece("text", "a")]])
    pieces, less = [], []
    for word in words:
      mark = word[:1]
      if mark in (HEAD, BEHIND) and mark:
        pieces.append([END] * (mark == BEHIND) + [Piece("text", word[1:])])
        less.append(int(mark == BEHIND))
      else:
        pieces.append([Piece("text", "a " + word)])
        less.append(before)
    return np.array(self._ids(pieces), np.int64) - less

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


class _Table:
  """Small numbers by hashes that are not 0: what a dictionary gives, for many at a time."""

  def __init__(self, size: int = 2**12):
    self._keys, self._values = np.zeros(size, np.uint64), np.zeros(size, np.int64)
    self._count = 0

  def find(self, hashes: np.ndarray) -> np.ndarray:
    """int [N]: the numbers; -1 where there is none."""
    slots = self._home(hashes)
    result = np.where(self._keys[slots] == hashes, self._values[slots], -1)
    left = np.flatnonzero((self._keys[slots] != hashes) & (self._keys[slots] != 0))
    while len(left):  # the place was taken by another
      slots[left] = (slots[left] + 1) % len(self._keys)
      keys = self._keys[slots[left]]
      found = left[keys == hashes[left]]
      result[found] = self._values[slots[found]]
      left = left[(keys != hashes[left]) & (keys != 0)]
    return result

  def add(self, hashes: np.ndarray, values: np.ndarray) -> None:
    """Adds hashes that are not there, each once. More than KEPT make it forget the others."""
    count = self._count + len(hashes)
    if count > KEPT or 3 * count > len(self._keys):  # too full: everything is put anew into another
      if count <= KEPT:
        there = self._keys != 0
        hashes, values = np.append(self._keys[there], hashes), np.append(self._values[there], values)
      count = len(hashes)
      size = max(len(self._keys), 2 ** (6 * count).bit_length())
      self._keys, self._values = np.zeros(size, np.uint64), np.zeros(size, np.int64)
    self._count = count
    slots = self._home(hashes)
    while len(hashes):
      free = self._keys[slots] == 0
      self._keys[slots[free]] = hashes[free]  # of several for the same place the last one
      placed = self._keys[slots] == hashes
      self._values[slots[placed]] = values[placed]
      hashes, values, slots = hashes[~placed], values[~placed], (slots[~placed] + 1) % len(self._keys)

  def _home(self, hashes: np.ndarray) -> np.ndarray:
    bits = len(self._keys).bit_length() - 1
    return (hashes * np.uint64(BASE) >> np.uint64(64 - bits)).astype(np.int64)


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
