"""From what a task asks to what an engine is asked, and back. Without lmms-eval."""

import threading

import pytest
import replies
from PIL import Image

from mllm_jax.data.records import DataError, Turn
from mllm_jax.inference.settings import GREEDY, Sampling
from mllm_jax.lmms_eval.answering import Question, answer, weigh
from mllm_jax.lmms_eval.conversations import Conversation, of_messages, of_text
from mllm_jax.lmms_eval.settings import settings

RED, BLUE = Image.new("RGB", (40, 30), "red"), Image.new("L", (30, 40), 7)
GREEDILY = dict(max_new_tokens=128, sampling=GREEDY, stop=(), beams=1)


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
  return replies.processor(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize(
  "kwargs, expected",
  [
    ({}, {}),
    ({"max_new_tokens": 16, "temperature": 0, "do_sample": False, "until": ["\n\n"]}, {"max_new_tokens": 16}),
    ({"max_new_tokens": 49152}, {"max_new_tokens": 1024}),
    ({"until": "ASSISTANT:"}, {"stop": ("ASSISTANT:",)}),
    ({"until": ["\n\n", "Q:", ""]}, {"stop": ("\n\n", "Q:")}),
    ({"num_beams": 5, "image_aspect_ratio": "original", "repetition_penalty": 1.2}, {"beams": 5}),
    # None as a task writes it to take a value back
    (dict.fromkeys(("max_new_tokens", "until", "do_sample", "temperature", "top_p", "top_k", "num_beams")), {}),
    ({"temperature": 0.2}, {"sampling": Sampling(0.2)}),
    ({"temperature": 0.7, "do_sample": False}, {}),
    ({"temperature": 0.0, "do_sample": True}, {}),
    ({"do_sample": True, "top_p": 0.9, "top_k": 4}, {"sampling": Sampling(1.0, 0.9, 4)}),
    ({"temperature": 1, "do_sample": True, "top_p": 0}, {}),
  ],
)
def test_a_tasks_settings(kwargs, expected):
  before = dict(kwargs)
  assert settings(kwargs, max_new_tokens=1024, blank_line_ends=False) == GREEDILY | expected
  assert kwargs == before  # documents share it


def test_blank_lines_end_answers_where_that_is_wanted():
  assert settings({"until": ["\n\n"]}, max_new_tokens=8, blank_line_ends=True)["stop"] == ("\n\n",)
  with pytest.raises(ValueError, match="top_p is 2"):
    settings({"temperature": 1, "top_p": 2}, max_new_tokens=8, blank_line_ends=False)


@pytest.mark.parametrize(
  "text, visuals, expected",
  [
    ("What is it?", [RED], "<image>\nWhat is it?"),
    ("Who?", [], "Who?"),
    ("Who?", None, "Who?"),
    ("Compare.\n", [RED, BLUE], "<image>\n<image>\nCompare."),
    ("<image> What is it?", [RED], "<image>\nWhat is it?"),
    ("Is <image> the same as <image>, and <image>?", [RED, BLUE], "<image>\n<image>\nIs  the same as , and ?"),
    ("Text alone says <image>.", [], "Text alone says ."),
  ],
)
def test_pictures_stand_in_front(text, visuals, expected):
  conversation = of_text(text, visuals)
  assert conversation.turns == [Turn("human", expected)]
  assert conversation.pictures == (visuals or []) and conversation.system is None


def test_messages(tmp_path):
  RED.save(tmp_path / "red.png")
  image = lambda url: {"type": "image", "url": url}
  text = lambda text: {"type": "text", "text": text}
  turns, pictures, system = of_messages(
    [
      {"role": "system", "content": [text("Be brief.")]},
      {"role": "user", "content": [text("Which <image>?"), image(str(tmp_path / "red.png")), text("This?")]},
      {"role": "user", "content": [image(BLUE)]},
      {"role": "assistant", "content": "Red, not <image>."},
      {"role": "user", "content": "Why?"},
    ]
  )
  assert system == "Be brief." and [picture.size for picture in pictures] == [(40, 30), (30, 40)]
  assert turns == [
    Turn("human", "<image>\nWhich ?\nThis?\n<image>\n"),
    Turn("gpt", "Red, not <image>."),
    Turn("human", "Why?"),
  ]
  same = of_messages([{"role": "user", "content": [image(RED), text("What is it?")]}])
  assert same == of_text("What is it?", [RED])


@pytest.mark.parametrize(
  "make, message",
  [
    (lambda: of_text("Hear", [{"array": [0.0], "sampling_rate": 16000}]), "it shows a dict"),
    (lambda: of_text("See", ["film.mp4"]), "film.mp4"),
    (lambda: of_messages([{"role": "user", "content": [{"type": "video", "url": "a"}]}]), "of type 'video'"),
  ],
)
def test_what_is_no_picture_is_refused(make, message):
  with pytest.raises(DataError, match=message):
    make()


def question(text, visuals=(), **changes):
  return Question(f"task, document {text}", lambda: of_text(text, visuals), GREEDILY | {"seed": 0} | changes)


def test_answers_come_in_the_order_of_the_questions(processor):
  texts = [f"[{number}]" for number in range(20)]
  engine = replies.Replies(processor, {text: f"to {text}" for text in texts})
  told = []
  questions = [question(text, [RED, BLUE][: i % 3]) for i, text in enumerate(texts)]
  answers = answer(engine, questions, lambda: told.append(engine.running))
  assert [each.text for each in answers] == [f"to {text}" for text in texts]
  assert len(told) == 20 and engine.most_waiting <= engine.rows
  assert [prompt.count("#") for prompt in engine.prompts] == [i % 3 for i in range(20)]
  assert [len(request.row.patches) for request in engine.requests[:3]] == [1, 1, 2]  # of those it has, or one
  assert answer(engine, [], lambda: None) == []


def test_only_pictures_of_the_next_questions_are_in_memory(processor):
  made, lock = [], threading.Lock()

  def make(text):
    with lock:
      made.append(text)
    return Conversation([Turn("human", text)], [])

  texts = [f"[{number}]" for number in range(40)]
  engine = replies.Replies(processor, dict.fromkeys(texts, ""), rows=2)
  questions = [Question(text, lambda text=text: make(text), GREEDILY) for text in texts]
  ahead = []
  answer(engine, questions, lambda: ahead.append(len(made) - len(ahead)))
  assert max(ahead) <= 2 + 2 + 2 * 2 + 1  # running, waiting, in the making, and the one just answered


@pytest.mark.parametrize(
  "bad, message",
  [
    (question("[1]", ["film.mp4"]), r"task, document \[1\]: .*film.mp4"),
    (question("[1]", beams=9), r"task, document \[1\]: beams is 9, and there are 3 rows"),
    (question("[1]", beams=2, sampling=Sampling(1.0)), r"task, document \[1\]: beams is 2, which goes"),
  ],
)
def test_a_question_that_cannot_be_asked_is_named_and_nothing_runs_on(processor, bad, message):
  engine = replies.Replies(processor, {f"[{i}]": "" for i in range(5)})
  with pytest.raises(ValueError, match=message):
    answer(engine, [question("[0]"), bad, *(question(f"[{i}]") for i in range(2, 5))], lambda: None)
  assert engine.running == engine.waiting == 0


def given(text, reply, visuals=()):
  asked = of_text(text, visuals)
  return Question(text, lambda: asked._replace(turns=[*asked.turns, Turn("gpt", reply)]), {})


def test_given_answers_are_weighed_in_their_order(processor):
  engine = replies.Replies(processor, {f"[{i}]": "yes" for i in range(0, 20, 3)}, rows=2)
  told = []
  found = weigh(engine, [given(f"[{i}]", "yes", [RED, BLUE][: i % 3]) for i in range(20)], told.append)
  assert [each.greedy for each in found] == [i % 3 == 0 for i in range(20)]
  assert engine.weighed == told == [8, 8, 4]
  assert [prompt.count("#") for prompt in engine.prompts] == [i % 3 for i in range(20)]
  with pytest.raises(ValueError, match=r"\[1\]: the answer is empty"):
    weigh(engine, [given("[0]", "yes"), given("[1]", "")], told.append)
