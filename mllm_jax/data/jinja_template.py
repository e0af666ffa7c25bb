"""Chat templates in Jinja, as they lie beside a tokenizer, turned into pieces.

The template is rendered twice: as it is, and with private-use characters around every text that somebody wrote. What
lies between such characters is text, or an answer; all else is the template's own, in which special tokens are special.
That taking the characters out again gives the first rendering proves that they changed nothing.
"""

import functools
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from typing import NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from mllm_jax.data.records import DataError
from mllm_jax.data.tokenizer import CUT, IMAGE, ChatTokenizer, Piece

PRIVATE_USE = range(0x100000, 0x10FFFE)  # plane 16; the tokenizer's own stand-ins are of another
Contents = Sequence[tuple[str, Sequence[Piece]]]  # (role, pieces of text and images) of each message
REMEDY = "use one of the templates that are built in, or mend chat_template.jinja"


class _Generation(jinja2.ext.Extension):
  """transformers' {% generation %} ... {% endgeneration %}, which says where answers are; here it is looked through."""

  tags = {"generation"}

  def parse(self, parser):
    parser.stream.skip(1)
    return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
  raise jinja2.TemplateError(message)


@functools.lru_cache(maxsize=8)
def compiled(text: str) -> jinja2.Template:
  """A template in the environment that transformers gives it, but for the date: ids must not depend on the day."""
  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
  )
  environment.globals["raise_exception"] = _raise_exception
  environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
  return environment.from_string(text)


def render(messages: Sequence[dict[str, str]], tokenizer: ChatTokenizer, add_generation_prompt: bool) -> str:
  """The text that the tokenizer's chat template makes of messages {"role", "content"}.

  Raises:
    DataError: there is no template, it is not Jinja, or it refuses the messages.
  """
  if not tokenizer.chat_template:
    raise DataError(
      "the tokenizer's folder has no chat template (chat_template.jinja, chat_template.json or tokenizer_config.json); "
      "choose another data.template"
    )
  try:
    template = compiled(tokenizer.chat_template)
    return template.render(
      messages=list(messages),
      add_generation_prompt=add_generation_prompt,
      tools=None,
      documents=None,
      **tokenizer.named,
    )
  except (jinja2.TemplateError, TypeError, ValueError, KeyError, ArithmeticError) as error:
    name = type(error).__name__
    raise DataError(f"the chat template does not take this conversation ({name}: {error}); {REMEDY}") from error


def pieces(contents: Contents, system: str | None, tokenizer: ChatTokenizer) -> list[Piece]:
  """The pieces of a conversation. A last answer without text is waited for.

  Raises:
    DataError: as `render`, and where the template changes texts other than by taking off their outer white space, or
      ends an answer without a special token.
  """
  waits = bool(contents) and contents[-1][0] == "assistant" and not any(piece.text for piece in contents[-1][1])
  contents = [*([("system", [Piece("text", system)])] if system is not None else []), *contents]
  contents = contents[:-1] if waits else contents
  written = "".join(piece.text for _, content in contents for piece in content)
  free = (chr(code) for code in PRIVATE_USE if chr(code) not in written)
  picture, close, *opens = itertools.islice(free, 2 + len(contents))
  texts = ["".join(picture if piece.kind == "image" else piece.text for piece in content) for _, content in contents]
  expected = _render(contents, texts, tokenizer, waits)
  without = {ord(mark): None for mark in (close, *opens)}
  for around in (str, str.strip):  # whole texts, or, for templates that trim them, what trimming leaves
    marked = [_mark(text, around(text), mark, close) for text, mark in zip(texts, opens)]
    rendered = _render(contents, marked, tokenizer, waits)
    used = [mark for mark, text in zip(opens, marked) if mark in text]
    whole = rendered.count(close) == len(used) and all(rendered.count(mark) == 1 for mark in used)
    if whole and rendered.translate(without) == expected:
      roles = {mark: role for mark, (role, _) in zip(opens, contents)}
      return list(_parse(rendered, roles, close, picture, tokenizer))
  raise DataError(f"the chat template changes the texts of this conversation; {REMEDY}")


def end_id(tokenizer: ChatTokenizer) -> int:
  """The id of the special token that ends an answer. Raises DataError where the template cannot be used."""
  found = pieces([("user", [Piece("text", "a")]), ("assistant", [Piece("text", "b")])], None, tokenizer)
  return next(tokenizer.token_id(piece.text) for piece in found if piece.kind == "special" and piece.trained_on)


def _render(contents: Contents, texts: Sequence[str], tokenizer: ChatTokenizer, waits: bool) -> str:
  messages = [{"role": role, "content": text} for (role, _), text in zip(contents, texts)]
  return render(messages, tokenizer, waits)


def _mark(text: str, kept: str, opening: str, closing: str) -> str:
  """Marks around `kept`, a part of the text. An empty text stays empty: templates ask whether it is."""
  if not kept:
    return text
  before, after = text.split(kept, 1)
  return f"{before}{opening}{kept}{closing}{after}"


def _parse(rendered: str, roles: dict[str, str], close: str, picture: str, tokenizer: ChatTokenizer) -> Iterator[Piece]:
  """Pieces of a rendering with marks in it. A space before an answer belongs to it: it is a part of its first token."""
  marks = re.compile(f"([{''.join(map(re.escape, (close, picture, *roles)))}])")
  parts = marks.split(rendered)  # texts, with marks between them
  role, answered = "", False
  for part, mark in itertools.zip_longest(parts[::2], parts[1::2], fillvalue=""):
    opens_answer = roles.get(mark) == "assistant"
    if role:
      pieces_of_part = [Piece("text", part, role == "assistant")]
    else:
      space = " " if opens_answer and part.endswith(" ") else ""
      pieces_of_part = [*_structure(part.removesuffix(space), answered, tokenizer), Piece("text", space, True)]
    yield from (piece for piece in pieces_of_part if piece.text)
    answered = mark == close and role == "assistant"
    if mark == picture:
      yield IMAGE
    elif opens_answer and not part.endswith(" "):
      yield CUT
    role = roles.get(mark, role if mark == picture else "")


def _structure(text: str, answered: bool, tokenizer: ChatTokenizer) -> Iterator[Piece]:
  """Pieces of the template's own text; where it follows an answer, what is up to its first special token is the end."""
  names = "|".join(map(re.escape, sorted(tokenizer.specials, key=len, reverse=True)))
  parts = re.split(f"({names})", text)
  if answered and (len(parts) == 1 or parts[0].strip()):
    raise DataError(
      f"the chat template writes {text[:20]!r} and no special token after an answer, so that a model would not learn "
      f"where to stop; {REMEDY}"
    )
  for number, part in enumerate(parts):
    yield Piece("special" if number % 2 else "text", part, answered and number < 2)
