"""The detokeniser on real tokenizers: joined, its pieces are the whole text, and none shows half a character."""

import hypothesis
import hypothesis.strategies
import pytest

from mllm_jax.inference.text import REPLACEMENT, Detokenizer, Stops

TEXTS = [
  "A bus.",
  "  two  spaces ",
  "na\u00efve caf\u00e9",
  "\u4f60\u597d, \u4e16\u754c",
  "a \U0001f9d1\u200d\U0001f680 b",
  "\U0001f600\U0001f601\U0001f602",
  "line\nbreak\n",
  "x",
  " ",
  "",
]


def pieces(decode, ids):
  stream = Detokenizer(decode)
  return [*(stream.push(token) for token in ids), stream.finish()]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_whole_text(tokenizer, text):
  ids = tokenizer._plain.encode(text, add_special_tokens=False).ids
  got = pieces(tokenizer.decode, ids)
  assert "".join(got) == tokenizer.decode(ids)
  assert not any(REPLACEMENT in piece for piece in got)


def test_characters_made_of_byte_tokens_come_when_complete(tokenizer):
  ids = [tokenizer._plain.token_to_id(f"<0x{byte:02X}>") for byte in "\u4f60\u597d".encode()]
  assert None not in ids
  assert pieces(tokenizer.decode, ids) == ["", "", "\u4f60", "", "", "\u597d", ""]


def test_space_before_a_word_is_kept_but_for_the_first(tokenizer):
  ids = tokenizer._plain.encode("USER A USER", add_special_tokens=False).ids
  assert pieces(tokenizer.decode, ids)[0] != ""
  assert "".join(pieces(tokenizer.decode, ids)) == "USER A USER"


def test_special_tokens_do_not_swallow_the_next_space(tokenizer):
  first, second = (tokenizer._plain.encode(text, add_special_tokens=False).ids for text in ("a b", "a"))
  ids = [*first, tokenizer.eos_id, *second]
  assert "".join(pieces(tokenizer.decode, ids)) == tokenizer.decode(ids) == "a b a"


def test_broken_bytes_are_shown_at_the_end_and_before_other_text():
  decode = lambda ids: bytes(ids).decode("utf-8", errors="replace")
  assert pieces(decode, [0x61, 0xE4, 0xBD]) == ["a", "", "", REPLACEMENT]
  assert pieces(decode, [0x61, 0xE4, 0x62]) == ["a", "", REPLACEMENT + "b", ""]


def test_long_streams_decode_only_a_window():
  seen = []

  def decode(ids):
    seen.append(len(ids))
    return "ab" * len(ids)

  assert "".join(pieces(decode, range(500))) == "ab" * 500
  assert max(seen) == 2


@pytest.mark.parametrize(
  "stops, pushed, given, found",
  [
    (("END",), ["a E", "N", "D b"], ["a ", "", ""], True),
    (("END",), ["a E", "N", "d b"], ["a ", "", "ENd b"], False),
    (("END",), ["EN"], [""], False),
    (("aab",), ["aaa", "ab"], ["a", "a"], True),  # what is held back may begin later than it seemed
    (("xy", "y"), ["axy"], ["a"], True),  # the first in the text, not in the list
    (("\n", "\n\nUSER"), ["one\n"], ["one"], True),
    ((), ["any", "thing"], ["any", "thing"], False),
  ],
)
def test_stops_hold_back_what_may_become_one(stops, pushed, given, found):
  text = Stops(stops)
  assert [text.push(piece) for piece in pushed] == given
  assert text.found == found
  assert "".join(given) + text.finish() == ("".join(given) if found else "".join(pushed))


@hypothesis.given(
  hypothesis.strategies.lists(hypothesis.strategies.text("ab")), hypothesis.strategies.text("ab", min_size=1)
)
def test_stops_cut_where_the_whole_text_would_be_cut(pushed, stop):
  text, given = Stops([stop]), ""
  for piece in pushed:
    given += text.push(piece) if not text.found else ""
  assert given + text.finish() == "".join(pushed).partition(stop)[0]
