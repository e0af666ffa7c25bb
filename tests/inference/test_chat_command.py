"""The chat on a terminal: typed at through a pty, with a model read from a folder; and what its lines do."""

import dataclasses
import os
import pty
import select
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from tiny_models import TINY

from mllm_jax import parameters
from mllm_jax.chat import Chat
from mllm_jax.data.records import DataError, Turn
from mllm_jax.inference.requests import Answer, Event
from mllm_jax.weights import folder
from mllm_jax.weights.tensors import InMemory


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
  path = tmp_path_factory.mktemp("pictures") / "a.png"
  Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)).save(path)
  return str(path)


class Typed:
  """A command on a terminal of its own."""

  def __init__(self, command):
    main, side = pty.openpty()
    environment = os.environ | {"TERM": "dumb", "XLA_FLAGS": ""}
    self.process = subprocess.Popen(
      command, stdin=side, stdout=side, stderr=side, env=environment, start_new_session=True
    )
    os.close(side)
    self.main, self.seen = main, ""

  def until(self, text):
    """Everything new up to `text`, which must come."""
    while text not in self.seen:
      self._read(text)
    found, _, self.seen = self.seen.partition(text)
    return found

  def more(self, count):
    """Waits for so many characters."""
    while len(self.seen) < count:
      self._read(f"{count} characters")

  def _read(self, wanted):
    ready, _, _ = select.select([self.main], [], [], 200)
    assert ready, f"waited for {wanted!r}, and saw {self.seen!r}"
    try:
      self.seen += os.read(self.main, 4096).decode(errors="replace")
    except OSError:  # the other end is closed
      raise AssertionError(f"ended before {wanted!r}: {self.seen!r}") from None

  def type(self, text):
    os.write(self.main, text.encode())


# The terminal that a session opens first becomes the one whose Ctrl-C it gets.
COMMAND = "import os, sys, mllm_jax.chat as c; os.open(os.ttyname(0), os.O_RDWR); sys.exit(c.main(sys.argv[1:]))"


def test_a_chat_on_a_terminal(tmp_path, tiny, tokenizer, tokenizer_folder, picture):
  arrays = {path: np.array(x) for path, x in parameters.flatten(tiny)[1].items()}
  arrays["decoder/head"][:, tokenizer.eos_id] = 0  # never the likeliest, so that an answer is there to be interrupted
  decoder = dataclasses.replace(TINY.decoder, max_positions=2**16)  # room for answers that last
  parts = {"vision": TINY.vision, "decoder": decoder, "projector": TINY.projector}
  folder.write(tmp_path / "model", folder.Manifest(parts, "vicuna_v1"), InMemory(arrays), tokenizer_folder)
  command = [sys.executable, "-c", COMMAND, f"--model={tmp_path / 'model'}", "--max_new_tokens=20000"]
  chat = Typed(command)
  try:
    chat.until("> ")
    chat.type(f"/image {picture}\n")
    assert "a.png, 50 x 40" in chat.until("\n> ")
    chat.type("How many?\n")
    chat.until("How many?\r\n")
    chat.more(20)
    chat.type("\x03")  # Ctrl-C
    assert "[interrupted]" in chat.until("\n> ")
    chat.type("/history\n")
    chat.until("\n> [picture] How many?")
    chat.type("\x10\n")  # Ctrl-P: the line before, out of readline's history
    chat.until("\n> [picture] How many?")
    chat.until("\n> ")
    chat.type("Again?\n")
    chat.until("Again?\r\n")
    chat.more(20)
    chat.type("\x03")
    chat.until("[interrupted]")
    chat.type("/reset\n")
    chat.until("/reset\r\n> ")
    chat.type("\x04")  # Ctrl-D
    assert chat.process.wait(timeout=60) == 0
  finally:
    if chat.process.poll() is None:
      chat.process.send_signal(signal.SIGKILL)
      chat.process.wait()
    os.close(chat.main)


class Scripted:
  """Says "one", "two", ... in two pieces; keeps what it was asked."""

  def __init__(self, room=10_000):
    self.asked, self.room = [], room

  def stream(self, request):
    if request.prompt_tokens + request.max_new_tokens > self.room:
      raise ValueError("the prompt takes too many places")
    self.asked.append(request)
    return self._said(["one", "two", "three"][len(self.asked) - 1])

  def _said(self, word):
    yield Event(0, word[:1])
    yield Event(0, word[1:], Answer(word, (1, 2), "stop"))


def test_later_questions_come_with_all_that_was_said_and_shown(processor, picture, capsys):
  engine = Scripted()
  chat = Chat(engine, processor, {"max_new_tokens": 5})
  for line in ("First?", "", f"/image {picture}", f"/image  {picture} ", "Second? <image>", "  Third?  "):
    assert chat.take(line)
  picture = Image.open(picture)
  turns = [
    Turn("human", "First?"),
    Turn("gpt", "one"),
    Turn("human", "<image>\n<image>\nSecond? "),
    Turn("gpt", "two"),
    Turn("human", "Third?"),
  ]
  for request, count in zip(engine.asked, (1, 3, 5), strict=True):
    pictures = [picture] * sum(turn.text.count("<image>") for turn in turns[:count])
    expected = processor.with_room(len(pictures)).prompt(turns[:count], pictures)
    for name, value, wanted in zip(expected._fields, request.row, expected):
      np.testing.assert_array_equal(value, wanted, err_msg=name)
    assert request.max_new_tokens == 5
  printed = capsys.readouterr().out
  assert printed.startswith("one\n") and printed.endswith("two\nthree\n")
  assert "a.png, 50 x 40" in printed
  chat.take("/history")
  assert capsys.readouterr().out == ("> First?\none\n> [picture] [picture] Second? \ntwo\n> Third?\nthree\n")
  chat.take("/reset")
  chat.take("/history")
  assert "nothing was said" in capsys.readouterr().out and not chat.pictures
  assert not chat.take("/quit")


def test_what_cannot_be_done_leaves_the_chat_as_it_was(processor, picture, capsys):
  chat = Chat(Scripted(room=80), processor, {"max_new_tokens": 5})
  chat.take("First?")
  before = list(chat.turns)
  for line, message in [
    ("/image gone.png", "gone.png: no such file"),
    (f"/image {__file__}", "cannot be read as a picture"),
    ("/nonsense", "/nonsense is no command; /help"),
    ("long " * 40, "too many places; /reset begins anew"),
  ]:
    with pytest.raises(DataError, match=message):
      chat.take(line)
    assert chat.turns == before and chat.pictures == []
  chat.take("/help")
  assert "/image FILE" in capsys.readouterr().out
