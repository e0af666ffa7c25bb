import argparse
import base64
import html
import io
import json
import os
import re

import numpy as np
import pytest
from PIL import Image

from mllm_jax.config import VisionConfig
from mllm_jax.data import images
from mllm_jax.data.__main__ import main
from mllm_jax.data.aspects import Anyres, Slices, Square
from mllm_jax.data.enlarging import Enlarging
from mllm_jax.data.processor import Processor
from mllm_jax.data.records import DataError, Records
from mllm_jax.data_commands import show, show_page
from mllm_jax.recipes import DEMO_ASSETS

VISION = VisionConfig(image_size=28, patch_size=14)
SPAN = re.compile(r"<span class='(t [^']*)' title='([^']*)'>(.*?)</span>", re.S)


def talk(*texts):
  return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


SAMPLES = [
  {"id": "one", "image": "a.png", "conversations": talk("<image>\nHi </s> <b>", "Yes & no </s>\nNo")},
  {"id": "long", "conversations": talk("Hi", "Yes " * 60)},
  {"id": "silent", "conversations": talk("Hi", "")},
  {"id": "two", "image": ["b.png", "c.png"], "conversations": talk("<image><image>Hi", "Yes")},
  {"id": "gone", "image": "d.png", "conversations": talk("<image>Hi <i>", "Yes")},
  {"id": "bad", "conversations": "none"},
]


@pytest.fixture
def records(write_data):
  path, folder = write_data(SAMPLES)
  os.remove(os.path.join(folder, "d.png"))
  return Records.load(path, folder)


def cards(page):
  return page.split("<article>")[1:]


def spans(card):
  return [(kind.split()[1:], title, html.unescape(text)) for kind, title, text in SPAN.findall(card)]


def make_page(records, processor, limited=True):
  return show_page.page("<title>", {"template": "<&>"}, records, range(len(records)), processor, limited)


def test_spans_are_the_tokens_of_the_row(records, tokenizers):
  tokenizer = tokenizers[False]
  processor = Processor(tokenizer, Square(VISION, 5), "vicuna_v1", 150, 1)
  row, found = processor.row(records[0]), spans(cards(make_page(records, processor))[0])
  assert [text for kind, _, text in found if kind[0] == "visual"] == ["5 visual tokens"]
  ids = [int(title.rpartition(" ")[2]) for kind, title, _ in found if kind[0] != "visual"]
  assert ids == row.tokens[(row.segment_ids > 0) & (row.visual_index < 0)].tolist()
  trained = "".join(text for kind, _, text in found if kind[0] == "trained")
  assert trained == " Yes & no </s>\u21b5No</s>"
  assert [text for kind, _, text in found if "special" in kind] == ["<s>", "</s>"]
  places = [int(re.search(r"\d+", title)[0]) for _, title, _ in found]
  assert places == sorted(places) and not any("cut" in kind for kind, _, _ in found)


def test_what_is_cut_off_is_shown(records, tokenizers):
  processor = Processor(tokenizers[False], Square(VISION, 5), "vicuna_v1", 100, 1)
  card = cards(make_page(records, processor))[1]
  cut = [kind for kind, _, _ in spans(card) if "cut" in kind]
  whole = len(spans(card))
  assert len(cut) == whole - 100 and f"{len(cut)} cut off, {len(cut)} of them answers" in card
  trained = int(processor.row(records[1]).loss_weights.sum())
  assert f"<b>{trained}</b> trained on" in card and "<b>100</b> of 100 places" in card


def test_problems_stand_in_the_samples_place(records, tokenizers):
  page = make_page(records, Processor(tokenizers[False], Square(VISION, 5), "vicuna_v1", 150, 1))
  one, long, silent, two, gone, bad = cards(page)
  assert "4 of these samples cannot be used." in page
  assert "class='problem'" not in one and "No" in one and "class='problem'" not in long
  assert "no answer that is not empty" in silent and spans(silent)
  assert "2 images, and a row has room for 1" in two and two.count("<img") == 2
  assert "is missing" in gone and "&lt;i&gt;" in gone and "conversations is a str" in bad
  assert (
    "class='problem'"
    not in cards(make_page(records, Processor(tokenizers[False], Square(VISION, 5), "vicuna_v1", 150, 1), False))[3]
  )


def test_an_image_that_no_square_can_hold_is_a_problem_of_its_sample(records, tokenizers, monkeypatch):
  Image.new("RGB", (100, 2)).save(records[0].images[0])
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
  page = make_page(records, Processor(tokenizers[False], Square(VISION, 5), "vicuna_v1", 150, 1))
  assert "pixels; shrink it first" in page and len(cards(page)) == 6


def test_the_page_needs_nothing_from_elsewhere(records, tokenizers):
  page = make_page(records, Processor(tokenizers[False], Square(VISION, 5), "vicuna_v1", 150, 1))
  assert "default-src 'none'" in page and "<script" not in page and "http:" not in page and "https:" not in page
  assert re.findall(r"src='([^':]*)", page) == ["data"] * 3 and "<title>&lt;title&gt;</title>" in page
  assert "prefers-color-scheme: dark" in page and "&lt;&amp;&gt;" in page


def test_pictures_are_the_models(records, tokenizers):
  processor = Processor(tokenizers[False], Square(VISION, 5), "vicuna_v1", 150, 5)
  encoded = re.search(r"data:image/png;base64,([^']*)", cards(make_page(records, processor))[0])[1]
  shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))))
  np.testing.assert_array_equal(shown, images.preprocess(images.load(records[0].images[0]), VISION))
  tiled = Processor(tokenizers[False], Anyres(VISION, 5), "vicuna_v1", 300, 5)
  card = cards(make_page(records, tiled))[0]
  crops, tokens = tiled.image_cost(30, 20)
  assert card.count("<img") == crops and f"{tokens} tokens" in card and "of them newlines" in card


def test_pictures_inside_records_have_the_names_that_they_came_with(write_data, tokenizers, tmp_path):
  path, folder = write_data(SAMPLES[:1])
  prepare = ["prepare", f"--path={path}", f"--image_folder={folder}", f"--out={tmp_path / 'shards'}", "--processes=1"]
  assert main(prepare) == 0
  processor = Processor(tokenizers[False], Square(VISION, 5), "vicuna_v1", 150, 1)
  shards = Records.load(str(tmp_path / "shards"), "")
  pages = [make_page(records, processor) for records in (Records.load(path, folder), shards)]
  assert pages[0].replace(os.path.join(folder, "a.png"), "a.png") == pages[1]


def test_pictures_are_shown_as_training_enlarges_them(records, tokenizers):
  aspect = Slices(VISION, 4, 6, "spatial", (1, 2))
  made = [
    Processor(tokenizers[False], aspect, "vicuna_v1", 300, 7, enlarging)
    for enlarging in (None, Enlarging(VISION, 6, 1.0))
  ]
  plain, enlarged = (cards(make_page(records, processor))[0].count("<img") for processor in made)
  assert plain == 1 and enlarged == 7  # 30 x 20 pixels, or as many as six slices have


def arguments(*options):
  parser = argparse.ArgumentParser()
  show.add_arguments(parser)
  return parser.parse_args(options)


def test_which_samples_are_shown(records):
  assert show.choose(records, arguments("--count=2")) == [0, 1]
  assert show.choose(records, arguments()) == list(range(6))
  assert show.choose(records, arguments("--ids=two, one")) == [3, 0]
  chosen = show.choose(records, arguments("--count=3", "--seed=1"))
  assert chosen == sorted(set(chosen)) and len(chosen) == 3
  assert chosen == show.choose(records, arguments("--count=3", "--seed=1"))
  with pytest.raises(DataError, match="no sample has the id none"):
    show.choose(records, arguments("--ids=one,none"))


def test_the_command(write_data, tmp_path, capsys):
  path, folder = write_data(SAMPLES)
  towers = [f"--llm={DEMO_ASSETS / 'llama'}", f"--vision={DEMO_ASSETS / 'clip'}"]
  out = tmp_path / "page.html"
  data = [f"--path={path}", f"--image_folder={folder}"]
  assert main(["show", *data, *towers, "--projector=mlp2x_gelu", "--image_aspect=anyres", f"--out={out}"]) == 0
  assert "6 samples in" in capsys.readouterr().out and len(cards(out.read_text())) == 6
  recipe = ["--config=configs/llava15.py:demo", "--config.finetune.data.max_length=99"]
  assert main(["show", *recipe, *data, "--count=1", f"--out={out}"]) == 0
  assert "of 99 places" in out.read_text() and len(cards(out.read_text())) == 1
  for options, told in (
    ([], "which data?"),
    ([*data, *towers, "--template=chatml"], "no special token '<|im_start|>'"),
    ([f"--path={tmp_path}/none.json", *towers], "no such file"),
    ([*data, *towers, "--count=0"], "--count=0 must be 1 or more"),
  ):
    assert main(["show", *options, f"--out={out}"]) == 2
    assert told in capsys.readouterr().err
  with pytest.raises(SystemExit):
    main(["show", "--nothing"])


def test_ids_are_read_once_each(tmp_path, tokenizers):
  (tmp_path / "train.json").write_text(json.dumps([{"id": "a", "conversations": talk("Q", text)} for text in "xy"]))
  records = Records.load(str(tmp_path / "train.json"), "")
  assert show.choose(records, arguments("--ids=a")) == [0]
