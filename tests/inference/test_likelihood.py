"""Likelihoods of given answers: against a log softmax in float64, in any company, and which tokens count."""

import json

import jax
import numpy as np
import pytest
from PIL import Image
from tiny_models import TINY, Plain, answered, prompt

from mllm_jax.data import chat
from mllm_jax.data.aspects import Square
from mllm_jax.data.processor import Processor, collate, pad_row
from mllm_jax.data.records import DataError, Turn
from mllm_jax.inference.engine import Engine
from mllm_jax.inference.likelihood import answer_row
from mllm_jax.inference.requests import Request
from mllm_jax.models.projectors import tokens_per_crop

LONG = "a dog and two cats, which look at the moon"


@pytest.fixture(scope="module")
def rows():
  """Of different lengths, with and without a picture, with short answers and one longer than the first room."""
  draw = np.random.default_rng(0)
  text = lambda count: draw.integers(3, 320, count).tolist()
  noise = lambda: draw.integers(0, 256, (56, 56, 3), np.uint8)
  return [
    answered([1, *text(5), -200, *text(4)], text(4), noise()),
    answered([1, *text(27)], text(1)),
    answered([1, 7], text(11)),
    answered([1, 9, -200, 8], text(3), noise()),
  ]


@pytest.fixture(scope="module")
def found(tiny, rows):
  return Engine(tiny, Plain(), rows=8).likelihoods(rows)


def test_likelihoods_are_those_of_the_whole_rows_logits(tiny, rows, found):
  length = max(len(row.tokens) for row in rows)
  batch = collate([pad_row(row, length) for row in rows])
  logits = np.asarray(jax.jit(lambda model, batch: model.logits(batch))(tiny, batch), np.float64)
  for row, logit, likelihood in zip(rows, logits, found):
    places = np.flatnonzero(row.loss_weights)
    wanted, logit = row.tokens[places + 1], logit[places]
    expected = logit[np.arange(len(places)), wanted] - np.log(np.exp(logit).sum(axis=-1))
    # logits of up to 30 in float32, which each token's error is a part of
    np.testing.assert_allclose(likelihood.log_probability, expected.sum(), atol=3e-6 * len(places) * 30)
    assert (likelihood.tokens, likelihood.greedy) == (len(places), (logit.argmax(axis=-1) == wanted).all())


def test_likelihoods_are_the_same_in_any_company(tiny, rows, found):
  alone = Engine(tiny, Plain(), rows=1)
  for row, expected in zip(rows, found):
    (one,) = alone.likelihoods([row])
    # other shapes may add in another order
    np.testing.assert_allclose(one.log_probability, expected.log_probability, rtol=1e-5)
    assert one[1:] == expected[1:]
  assert alone.likelihoods([]) == []


def test_a_greedy_answer_is_known_as_one_and_no_other_is(tiny):
  engine, question = Engine(tiny, Plain(), rows=8), [1, 9, 8]
  ids = engine.answer([Request(prompt(question), 4)])[0].ids
  others = [(*ids[:place], (ids[place] + 1) % 320, *ids[place + 1 :]) for place in range(4)]
  likelihoods = engine.likelihoods([answered(question, answer) for answer in (ids, *others)])
  assert [each.greedy for each in likelihoods] == [True, False, False, False, False]


def test_of_a_conversation_the_last_answer_counts(processor):
  turns = [Turn("human", "<image>\nWhat?"), Turn("gpt", "a cat"), Turn("human", "Sure?"), Turn("gpt", "yes it is")]
  picture = Image.new("RGB", (30, 20))
  row, tokenizer = answer_row(processor, turns, [picture]), processor.tokenizer
  places = np.flatnonzero(row.loss_weights)
  assert places.tolist() == list(range(len(row.tokens) - len(places) - 1, len(row.tokens) - 1))
  assert row.tokens[places + 1].tolist() == row.targets[places].tolist()
  assert tokenizer.decode(row.targets[places]) == "yes it is" and row.targets[places][-1] == tokenizer.eos_id
  asked = processor.prompt(turns[:-1], [picture])
  assert row.tokens[: len(asked.tokens)].tolist() == asked.tokens.tolist()
  np.testing.assert_array_equal(row.patches, asked.patches)


def test_an_answer_ends_where_the_model_ends_it(tmp_path, tokenizer_folder):
  """A template that trains on the header before an answer and on the newline behind its end."""
  content = json.loads((chat.hf_tokenizer(tokenizer_folder)).backend_tokenizer.to_str())
  special = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
  names = ["<|im_start|>", "<|im_end|>", "\n"]
  content["added_tokens"] += [special | {"id": 512 + i, "content": name} for i, name in enumerate(names)]
  tokenizer = chat.ChatTokenizer(json.dumps(content), None, 2, 0, 515)
  processor = Processor(tokenizer, Square(TINY.vision, tokens_per_crop(TINY)), "chatml_released", 256, 1)
  row = answer_row(processor, [Turn("human", "What?"), Turn("gpt", "a cat")], [])
  wanted = row.targets[np.flatnonzero(row.loss_weights)]
  assert tokenizer.decode(wanted) == "a cat" and wanted[-1] == tokenizer.specials["<|im_end|>"]


def test_refuses_what_has_no_likelihood(tiny, processor):
  with pytest.raises(DataError, match="the answer is empty"):
    answer_row(processor, [Turn("human", "What?"), Turn("gpt", "")], [])
  row = answer_row(processor, [Turn("human", "What?"), Turn("gpt", LONG)], [])
  with pytest.raises(ValueError, match=f"question and answer take {len(row.tokens)} places; there are 40"):
    Engine(tiny, Plain(), rows=1, max_length=40).likelihoods([row])
