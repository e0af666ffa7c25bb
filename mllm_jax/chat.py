"""Talk with a model about pictures: python -m mllm_jax.chat --model=DIR [--image=FILE]

Answers are printed while they are made, and Ctrl-C ends one early. /help lists what can be typed beside questions.
Ctrl-D ends the chat. Exit status: 0, or 2 for anything that the caller can put right.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence

from mllm_jax import terminal
from mllm_jax.data.records import IMAGE_PLACEHOLDER, DataError, Turn

# jax and the tokenizers are imported where they are used, so that a mistyped argument is answered at once.

PROMPT = "> "
HELP = """/image FILE   shows a picture with the next question
/history      prints the conversation so far
/reset        forgets it, pictures included
/help         prints this
/quit         ends the chat, as Ctrl-D does
Ctrl-C ends an answer early; arrow keys edit the line and bring back earlier ones."""


class Chat:
  """A conversation so far, and what is shown with the next question.

  engine, processor: `inference.engine.Engine` and what makes its prompts. settings: what a `Request` has beside its
    row.
  """

  def __init__(self, engine, processor, settings: dict):
    self.engine, self.processor, self.settings = engine, processor, settings
    self.reset()

  def reset(self) -> None:
    self.turns: list[Turn] = []
    self.pictures: list = []
    self._shown = 0  # of the pictures, with questions that were asked

  def show(self, path: str) -> str:
    """Takes a picture to the next question; what there is to say. Raises DataError where it cannot be read."""
    self.pictures.append(terminal.load_picture(path, named=""))
    width, height = self.pictures[-1].size
    return f"{os.path.basename(path)}, {width} x {height}, comes with the next question"

  def ask(self, text: str) -> None:
    """Prints the answer as it is made, and remembers it as far as it was printed.

    Raises:
      DataError: the conversation has become too long for the model, and is as it was.
    """
    from mllm_jax.inference.requests import Request

    new = len(self.pictures) - self._shown
    turns = [*self.turns, Turn("human", f"{IMAGE_PLACEHOLDER}\n" * new + text)]
    row = self.processor.with_room(len(self.pictures)).prompt(turns, self.pictures)
    try:
      events = self.engine.stream(Request(row, **self.settings))
    except ValueError as error:
      raise DataError(f"{error}; /reset begins anew, or ask for less with --max_new_tokens") from error
    said = ""
    try:
      for event in events:
        print(event.text, end="", flush=True)
        said += event.text
    except KeyboardInterrupt:
      print(" [interrupted]", end="")
    finally:
      events.close()
    print(flush=True)
    self.turns, self._shown = [*turns, Turn("gpt", said.strip())], len(self.pictures)

  def history(self) -> str:
    """The conversation, a line of "> " before each question."""
    text = lambda turn: turn.text.replace(f"{IMAGE_PLACEHOLDER}\n", "[picture] ")
    return "\n".join((PROMPT if turn.role == "human" else "") + text(turn) for turn in self.turns)

  def take(self, line: str) -> bool:
    """Does what a typed line says; whether the chat goes on. Raises DataError as `show` and `ask`."""
    command, _, rest = line.strip().partition(" ")
    if command == "/quit":
      return False
    if command == "/image":
      print(self.show(os.path.expanduser(rest.strip())))
    elif command == "/reset":
      self.reset()
    elif command == "/history":
      print(self.history() or "nothing was said yet")
    elif command == "/help":
      print(HELP)
    elif command.startswith("/"):
      raise DataError(f"{command} is no command; /help lists them")
    elif command:
      self.ask(line.strip().replace(IMAGE_PLACEHOLDER, ""))
    return True


def converse(chat: Chat) -> None:
  """Reads lines until there are none, and tells what is wrong with one without ending."""
  with contextlib.suppress(ImportError):  # where there is none, lines are read without editing
    import readline  # noqa: F401
  going = True
  while going:
    try:
      going = chat.take(input(PROMPT))
    except EOFError:
      print()
      return
    except KeyboardInterrupt:
      print()
    except DataError as error:
      print(f"error: {error}", flush=True)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
  parser = terminal.parser("chat", "Talk with a model about pictures.", HELP)
  args = parser.parse_args(argv)
  terminal.check(parser, args)
  return args


def start(args: argparse.Namespace) -> None:
  for path in args.images:
    terminal.load_picture(path)  # said before the model is read

  from mllm_jax.build import load
  from mllm_jax.inference.engine import Engine

  model, processor = load(args.model)
  engine = Engine(model, processor, rows=1, max_length=model.config.decoder.max_positions)
  settings = dict(max_new_tokens=args.max_new_tokens, sampling=args.sampling, seed=args.seed)
  chat = Chat(engine, processor, settings)
  for path in args.images:
    print(chat.show(path))
  terminal.note(f"{args.model} is ready; /help lists what can be typed")
  converse(chat)


def main(argv: Sequence[str] | None = None) -> int:
  args = arguments(argv)
  return terminal.run(lambda: start(args))


if __name__ == "__main__":
  sys.exit(main())
