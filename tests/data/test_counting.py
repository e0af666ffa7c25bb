"""Counting tokens must give what tokenizing gives, for every template and tokenizer."""

import json
import random

import conversations
import numpy as np
import pytest
from test_templates import CASES, cases, with_template  # noqa: F401

from mllm_jax.data import chat, counting
from mllm_jax.data.counting import TokenCounter
from mllm_jax.data.records import DataError
from mllm_jax.data.tokenizer import CUT, END, ChatTokenizer, Piece

COUNT = 300  # conversations of each case


@pytest.mark.parametrize("name", CASES)
def test_counts_are_those_of_the_tokens(cases, name):  # noqa: F811
  template, tokenizer = cases[name]
  counter, draw = TokenCounter(tokenizer), random.Random(name)
  chunks, expected = [], []
  while len(expected) < COUNT:
    turns, n_images, system = conversations.conversation(draw, pairs=1 if template == "plain" else 3)
    try:
      encoded = chat.encode(turns, template, tokenizer, n_images, system)
      leads, found = chat.stretches(chat.conversation(turns, template, tokenizer, n_images, system), tokenizer)
    except DataError:
      continue
    chunks.append(found)
    expected.append(len(encoded.ids) - n_images - leads)
  for size in (1, 7, COUNT):  # words known from before, and words known from the same call
    for start in range(0, COUNT, size):
      some = chunks[start : start + size]
      counts = iter(counter.count([chunk for found in some for chunk in found]))
      assert [sum(next(counts) for _ in found) for found in some] == expected[start : start + size]


def test_which_tokenizers_have_independent_words(tokenizers, byte_level):
  assert all(counting.independent_words(tokenizer.backend_json) for tokenizer in tokenizers.values())
  assert not any(counting.independent_words(tokenizer.backend_json) for tokenizer in byte_level.values())


def changed(tokenizer: ChatTokenizer, change) -> ChatTokenizer:
  content = json.loads(tokenizer.backend_json)
  change(content)
  return ChatTokenizer(json.dumps(content), tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size)


def merge_over_a_space(content):
  """A token "e\u2581", which no longer lets words be counted apart."""
  content["model"]["vocab"]["e\u2581"] = max(content["model"]["vocab"].values()) + 1
  content["model"]["merges"].insert(0, ["e", "\u2581"])


@pytest.mark.parametrize(
  "change",
  [
    merge_over_a_space,
    lambda content: content["added_tokens"].append(
      {"id": 9999, "content": "e d", "special": False, "lstrip": False, "rstrip": False}
      | {"single_word": False, "normalized": False}
    ),
    lambda content: content["added_tokens"][2].update(lstrip=True),
    lambda content: content.update(normalizer={"type": "NFC"}),
  ],
)
def test_a_tokenizer_that_joins_words_is_asked_for_whole_texts(tokenizers, change):
  tokenizer = changed(tokenizers[False], change)
  assert not counting.independent_words(tokenizer.backend_json)
  chunk = [Piece("text", "the dog the do e d "), END, Piece("text", " e e\u0301 ")]
  assert TokenCounter(tokenizer).count([chunk]) == [len(tokenizer.encode_chunk(chunk).ids)]


def test_words_that_are_forgotten_are_counted_again(tokenizers, monkeypatch):
  monkeypatch.setattr(counting, "KEPT", 3)
  tokenizer, counter = tokenizers[True], TokenCounter(tokenizers[True])
  for text in ("one two three four five six seven", "one longer-than-four two", " one  two", "", "seven"):
    chunk = [Piece("text", text), CUT, END, Piece("text", text)]
    assert counter.count([chunk, [END, *chunk[:1]], []]) == [
      len(tokenizer.encode_chunk(chunk).ids),
      len(tokenizer.encode_chunk([END, *chunk[:1]]).ids),
      0,
    ]


def test_the_table_of_words_grows_and_forgets(monkeypatch):
  draw = np.random.default_rng(0)
  table, expected = counting._Table(8), {}
  for count in (1, 5, 0, 3000, 40):
    hashes = draw.integers(1, 2**63, count).astype(np.uint64) | np.uint64(2**63)
    table.add(hashes, np.arange(count))
    expected |= dict(zip(hashes.tolist(), range(count)))
    known = np.array(list(expected), np.uint64)
    assert table.find(known).tolist() == list(expected.values())
    assert (table.find(known ^ np.uint64(12345)) == -1).all()
  monkeypatch.setattr(counting, "KEPT", 100)
  table.add(np.array([2**63], np.uint64), np.array([7]))
  assert table.find(np.array([2**63, known[0]], np.uint64)).tolist() == [7, -1]


def test_words_are_cut_where_the_tokenizer_cuts_them(tokenizers):
  """Spaces in a row, at the ends and alone; marks and signs of the counter's own in a text; letters of many bytes."""
  tokenizer = tokenizers[False]
  texts = [
    "",
    " ",
    "  ",
    "a  b",
    " a b ",
    "a   ",
    "\n \n",
    "\x01 a",
    "a\x02b",
    "\u2581a b",
    "\u00e9 \U0001f600  x",
    "a\x00b c",
  ]
  chunks = [[Piece("text", a), END, Piece("text", b), END] for a in texts for b in texts]
  assert TokenCounter(tokenizer).count(chunks) == [len(tokenizer.encode_chunk(chunk).ids) for chunk in chunks]
