"""Evaluation: which questions are asked, how, and what is counted."""

import json

import numpy as np
import pytest
from PIL import Image
from tiny_models import TINY

from mllm_jax.data import images
from mllm_jax.data.records import DataError, Records, Turn
from mllm_jax.inference import evaluate
from mllm_jax.inference.engine import Engine
from mllm_jax.inference.evaluate import EvaluationResult, Prediction, Question, exact_match, list_questions
from mllm_jax.inference.requests import Answer, Request


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
  """Answers "two" when it sees a picture that is not plain, else "no"; keeps the requests of each call."""

  def __init__(self):
    self.asked = []

  def answer(self, requests, progress=None):
    self.asked.append(list(requests))
    answers = []
    for request in requests:
      seen = bool(request.row.patches.reshape(-1, 3).std(axis=0).any())
      answers.append(Answer("two" if seen else "no", (), "stop"))
      if progress is not None:
        progress(len(answers), len(requests))
    return answers


def test_questions_are_asked_alone_and_counted_by_kind(records, processor):
  engine, calls = Scripted(), []
  result = exact_match(
    engine,
    processor,
    records,
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
  assert calls == [(number, 10) for number in range(1, 11)]


def test_requests_hold_what_the_processor_makes(records, processor, monkeypatch):
  engine = Scripted()
  monkeypatch.setattr(evaluate, "WINDOW", 2)
  exact_match(engine, processor, records, max_new_tokens=7, blank=False)
  assert [len(requests) for requests in engine.asked] == [2, 2, 1]
  assert {request.max_new_tokens for requests in engine.asked for request in requests} == {7}
  picture = images.load(records[0].images[0])
  direct = processor.prompt([Turn("human", "<image>\nWhich colour?")], [picture])
  second = engine.asked[0][1].row  # the second question of the first sample, with its picture in front
  for name, expected in zip(direct._fields, direct):
    np.testing.assert_array_equal(getattr(second, name), expected, err_msg=name)


def test_blanked_pictures_are_the_towers_mean_colour(records, processor):
  engine = Scripted()
  exact_match(engine, processor, records, max_new_tokens=7, blank=True)
  colour = [int(255 * mean) for mean in TINY.vision.mean]
  for seen, blanked in zip(*engine.asked, strict=True):
    np.testing.assert_array_equal(seen.row.tokens, blanked.row.tokens)
    assert not blanked.row.grids.any() or (blanked.row.patches.reshape(-1, 3) == colour).all()


def test_without_blanking_nothing_is_said_of_it(records, processor):
  result = exact_match(Scripted(), processor, records, max_new_tokens=7, blank=False)
  assert result.overall.blank is None
  assert not any("blank" in name for name in result.metrics())


def test_a_real_engine_answers_every_question(records, processor, tiny):
  engine = Engine(tiny, processor, rows=2)
  result = exact_match(engine, processor, records, max_new_tokens=4, blank=False)
  golds = [prediction.question.gold for prediction in result.predictions]
  assert golds == ["two", "red", "no", " two\n", "no"]
  alone = processor.prompt([Turn("human", "<image>\nHow many?")], [images.load(records[1].images[0])])
  assert result.predictions[3].answer == engine.answer([Request(alone, 4)])[0].text


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
    exact_match(Scripted(), processor, records, max_new_tokens=1, blank=False)


def test_categories_are_sorted_and_leave_out_the_nameless():
  result = EvaluationResult([Prediction(Question("1", (), "q", "a", kind), "a") for kind in ("z", "", "b")])
  assert list(result.categories) == ["b", "z"]
