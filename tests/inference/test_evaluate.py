"""Evaluation: which questions are asked, how, and what is counted."""

import json

import numpy as np
import pytest
from PIL import Image
from tiny_models import TINY

from mllm_jax.data import images
from mllm_jax.data.processor import collate
from mllm_jax.data.records import DataError, Records, Turn
from mllm_jax.inference.engine import Engine
from mllm_jax.inference.evaluate import EvaluationResult, Prediction, Question, exact_match, list_questions


def qa(question, gold, category=""):
  return [{"from": "human", "value": question}, {"from": "gpt", "value": gold, "category": category}]


@pytest.fixture(scope="module")
def records(tmp_path_factory):
  folder = tmp_path_factory.mktemp("held_out")
  for number in range(2):
    noise = np.random.default_rng(number).integers(0, 256, (40, 70, 3), np.uint8)
    Image.fromarray(noise).save(folder / f"{number}.png")
  samples = [
    {
      "id": "first",
      "image": "0.png",
      "conversations": qa("<image>\nHow many?", "two", "count")
      + qa("Which colour?", "red", "colour")
      + qa("Anything else?", "no"),
    },
    {"id": "second", "image": "1.png", "category": "count", "conversations": qa("How many? <image>", " two\n")},
    {"id": "text", "conversations": qa("A long question about nothing that any picture shows at all?", "no", "text")},
  ]
  (folder / "held_out.json").write_text(json.dumps(samples))
  return Records.load(str(folder / "held_out.json"), str(folder))


class Scripted:
  """Answers "two" when it sees a picture that is not plain, else "no"; keeps the batches."""

  def __init__(self, tokenizer):
    encode = lambda text: tokenizer._plain.encode(text, add_special_tokens=False).ids
    self.answers = {True: encode("two"), False: encode("no")}
    self.batches = []

  def generate(self, batch, max_new_tokens):
    self.batches.append((batch, max_new_tokens))
    return [self.answers[bool(row.reshape(-1, 3).std(axis=0).any())] for row in batch.patches]


def test_questions_are_asked_alone_and_counted_by_kind(records, processor):
  engine, calls = Scripted(processor.tokenizer), []
  result = exact_match(
    engine,
    processor,
    records,
    batch_size=2,
    max_new_tokens=7,
    blank=True,
    progress=lambda done, total: calls.append((done, total)),
  )
  assert [prediction.answer for prediction in result.predictions] == ["two"] * 4 + ["no"]
  assert [prediction.blank_answer for prediction in result.predictions] == ["no"] * 5
  assert [prediction.correct for prediction in result.predictions] == [True, False, False, True, True]
  assert [(q.question.sample_id, q.question.category) for q in result.predictions] == [
    ("first", "count"),
    ("first", "colour"),
    ("first", ""),
    ("second", "count"),
    ("text", "text"),
  ]
  assert {kind: score.count for kind, score in result.categories.items()} == {"colour": 1, "count": 2, "text": 1}
  assert result.overall.count == 5
  assert result.metrics() == {
    "eval/exact_match": 0.6,
    "eval/exact_match/colour": 0.0,
    "eval/exact_match/count": 1.0,
    "eval/exact_match/text": 1.0,
    "eval/blank": 0.4,
    "eval/blank/colour": 0.0,
    "eval/blank/count": 0.0,
    "eval/blank/text": 1.0,
  }
  assert calls == [(2, 10), (4, 10), (5, 10), (7, 10), (9, 10), (10, 10)]


def test_batches_have_one_shape_and_hold_what_the_processor_makes(records, processor):
  engine = Scripted(processor.tokenizer)
  exact_match(engine, processor, records, batch_size=2, max_new_tokens=7, blank=False)
  assert len({batch.tokens.shape for batch, _ in engine.batches}) == 1
  assert len(engine.batches) == 3 and engine.batches[0][0].tokens.shape[0] == 2
  assert {count for _, count in engine.batches} == {7}
  second = engine.batches[0][0]  # the second question of the first sample, with its picture in front
  picture = images.load(records[0].images[0])
  direct = processor.prompt([Turn("human", "<image>\nWhich colour?")], [picture], second.tokens.shape[1])
  for name in ("tokens", "positions", "segment_ids", "visual_index", "patches", "grids"):
    np.testing.assert_array_equal(getattr(second, name)[1], getattr(direct, name), err_msg=name)
  last = engine.batches[-1][0]
  np.testing.assert_array_equal(last.tokens[0], last.tokens[1])  # filled up with a repeated row


def test_blanked_pictures_are_the_towers_mean_colour(records, processor):
  engine = Scripted(processor.tokenizer)
  exact_match(engine, processor, records, batch_size=8, max_new_tokens=7, blank=True)
  seen, blanked = (batch for batch, _ in engine.batches)
  colour = [int(255 * mean) for mean in TINY.vision.mean]
  assert (blanked.patches[:4].reshape(-1, 3) == colour).all()
  np.testing.assert_array_equal(seen.tokens, blanked.tokens)


def test_without_blanking_nothing_is_said_of_it(records, processor):
  result = exact_match(Scripted(processor.tokenizer), processor, records, batch_size=8, max_new_tokens=7, blank=False)
  assert result.overall.blank is None
  assert not any("blank" in name for name in result.metrics())


def test_a_real_engine_answers_every_question(records, processor, tiny):
  engine = Engine(tiny, processor.tokenizer.eos_id)
  result = exact_match(engine, processor, records, batch_size=2, max_new_tokens=4, blank=False)
  golds = [prediction.question.gold for prediction in result.predictions]
  assert golds == ["two", "red", "no", " two\n", "no"]
  alone = processor.prompt([Turn("human", "<image>\nHow many?")], [images.load(records[1].images[0])])
  assert result.predictions[3].answer == processor.tokenizer.decode(engine.generate(collate([alone]), 4)[0])


def test_comparison_is_exact_but_for_outer_white_space():
  question = Question("1", (), "q", "Red ", "")
  correct = [Prediction(question, answer).correct for answer in ("Red", " Red\n", "red", "Red.", "")]
  assert correct == [True, True, False, False, False]


def test_a_file_without_questions_is_an_error(tmp_path):
  (tmp_path / "a.json").write_text(json.dumps([{"id": 1, "conversations": [{"from": "human", "value": "hm"}]}]))
  with pytest.raises(DataError, match="no question with an answer"):
    list_questions(Records.load(str(tmp_path / "a.json"), ""))


def test_a_missing_picture_is_named(tmp_path, processor):
  sample = {"id": 1, "image": "gone.png", "conversations": qa("<image>\nWhat?", "a")}
  (tmp_path / "a.json").write_text(json.dumps([sample]))
  records = Records.load(str(tmp_path / "a.json"), str(tmp_path))
  with pytest.raises(DataError, match="gone.png is missing"):
    exact_match(Scripted(processor.tokenizer), processor, records, batch_size=1, max_new_tokens=1, blank=False)


def test_categories_are_sorted_and_leave_out_the_nameless():
  result = EvaluationResult([Prediction(Question("1", (), "q", "a", kind), "a") for kind in ("z", "", "b")])
  assert list(result.categories) == ["b", "z"]
