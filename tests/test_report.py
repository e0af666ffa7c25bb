"""The report: it shows what it was given, in one file, and nothing in it can be mistaken for markup."""

import base64
import html.parser
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from mllm_jax import report
from mllm_jax.config import Config
from mllm_jax.data.records import DataError
from mllm_jax.inference.evaluate import Prediction, Question
from mllm_jax.report import answers, chart, curves

NASTY = "<script>alert('x')</script> & \"quoted\""
VOID = {"meta", "img", "br", "line", "circle", "polyline"}


class Balanced(html.parser.HTMLParser):
  """Fails where a tag is closed that is not open; collects tags, attributes and text."""

  def __init__(self, text):
    super().__init__()
    self.open, self.tags, self.attributes, self.text = [], [], [], []
    self.feed(text)
    assert not self.open

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += attrs
    if tag not in VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += attrs

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if self.open[-1:] != ["style"]:
      self.text.append(data)


def training_rows(stage, steps, start):
  return [{"stage": stage, "step": step, "loss": start / step, "learning_rate": 1e-3} for step in range(1, steps + 1)]


@pytest.fixture
def predictions(tmp_path):
  found = []
  for number in range(40):
    path = tmp_path / f"{number}.png"
    Image.fromarray(np.full((30, 400, 3), number, np.uint8)).save(path)
    found += [
      Prediction(Question(str(number), (str(path),), f"How many? {NASTY}", "two", "count"), "two", "one"),
      Prediction(
        Question(str(number), (str(path),), "Which?", "red", "<i>kind</i>"), NASTY if number % 2 else "red", ""
      ),
    ]
  return found


@pytest.fixture
def log():
  return [
    *training_rows("pretrain", 30, 6.0),
    {"stage": "pretrain", "step": 30, "eval/exact_match": 0.111, "eval/exact_match/count": 0.222},
    *training_rows("finetune", 2000, 2.0),
    {"stage": "finetune", "step": 1000, "eval/exact_match": 0.5},
    {
      "stage": "finetune",
      "step": 2000,
      "eval/exact_match": 0.877,
      "eval/blank": 0.123,
      "eval/exact_match/count": 0.913,
      "eval/exact_match/<i>kind</i>": 0.841,
      "eval/blank/count": 0.333,
      "eval/blank/<i>kind</i>": 0.0,
    },
  ]


def written(tmp_path, **arguments):
  path = tmp_path / "report.html"
  report.write(str(path), **({"config": Config(name=NASTY), "log": [], "predictions": []} | arguments))
  assert not list(tmp_path.glob("*.tmp"))
  return path.read_text(encoding="utf-8")


def test_shows_scores_curves_and_pictures(tmp_path, log, predictions):
  page = Balanced(written(tmp_path, log=log, predictions=predictions))
  text = " ".join(page.text)
  for score in ("11.1", "22.2", "87.7", "12.3", "91.3", "84.1", "33.3"):
    assert f"{score}\u2009%" in text
  assert "50.0\u2009%" not in text  # an earlier evaluation of the same stage
  assert page.tags.count("svg") == 4  # loss and learning rate of two stages
  assert page.tags.count("article") == answers.PICTURES
  pictures = [value for name, value in page.attributes if name == "src"]
  assert len(pictures) == len(set(pictures)) == answers.PICTURES  # every question on a picture of its own
  assert text.count("\u2713 right") + text.count("\u2717 wrong") == answers.PICTURES
  assert "\u2717 wrong" in text
  picture = Image.open(io.BytesIO(base64.b64decode(pictures[0].removeprefix("data:image/png;base64,"))))
  assert picture.format == "PNG" and picture.size == (answers.PICTURE_SIZE, 24)


def test_everything_is_escaped_and_nothing_comes_from_outside(tmp_path, log, predictions):
  text = written(tmp_path, log=log, predictions=predictions)
  page = Balanced(text)
  assert not {"script", "link", "iframe", "object"} & set(page.tags)
  assert all(value.startswith("data:image/png;base64,") for name, value in page.attributes if name in ("src", "href"))
  assert "http://" not in text and "https://" not in text and "url(" not in text
  assert NASTY in " ".join(page.text)
  assert "<i>kind" not in text


def test_of_a_step_written_twice_the_last_counts(tmp_path):
  rows = [*training_rows("pretrain", 4, 8.0), {"stage": "pretrain", "step": 3, "loss": 77.0}]
  assert curves.curve_of(rows, "pretrain", "loss") == [(1, 8.0), (2, 4.0), (3, 77.0), (4, 2.0)]


def test_long_curves_are_thinned_to_their_means():
  curve = curves.curve_of(training_rows("a", 1200, 1.0), "a", "loss")
  assert len(curve) == curves.POINTS and curve[0] == (2, 0.75) and curve[-1][0] == 1200


def test_steps_without_finite_loss_are_left_out_and_said(tmp_path):
  rows = [*training_rows("pretrain", 5, 1.0), {"stage": "pretrain", "step": 6, "loss": float("nan")}]
  text = written(tmp_path, log=rows)
  assert "1 logged steps had no finite loss" in text
  assert not re.search(r"points='[^']*nan", text)


@pytest.mark.parametrize("losses", [[], [0.0], [-2.5]])
def test_short_runs_make_a_page_too(tmp_path, losses):
  log = [{"stage": "pretrain", "step": 1, "loss": loss} for loss in losses]
  assert Balanced(written(tmp_path, log=log)).tags.count("svg") == len(losses)


def test_ticks_are_round_and_inside():
  assert chart.round_ticks(0, 6.3, 4) == [0, 2, 4, 6]
  assert chart.round_ticks(0, 0.9, 4) == [0, 0.25, 0.5, 0.75]
  assert chart.round_ticks(0, 5200, 5) == [0, 2000, 4000]


def test_a_missing_picture_leaves_the_old_report(tmp_path):
  before = written(tmp_path)
  gone = Prediction(Question("1", (str(tmp_path / "gone.png"),), "q", "a", ""), "a")
  with pytest.raises(DataError, match="gone.png"):
    written(tmp_path, predictions=[gone])
  assert (tmp_path / "report.html").read_text(encoding="utf-8") == before


def test_reads_the_log_of_a_run_that_was_killed_while_writing(tmp_path):
  rows = training_rows("pretrain", 3, 1.0)
  path = tmp_path / "metrics.jsonl"
  path.write_text("\n".join(map(json.dumps, rows)) + '\n{"stage": "pre')
  assert report.read_log(str(path)) == rows
  path.write_text('{"a": 1}\n{"b"\n{"c": 2}\n')
  with pytest.raises(ValueError, match="line 2"):
    report.read_log(str(path))
