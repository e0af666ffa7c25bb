"""Chat requests: the JSON of OpenAI's chat API becomes turns, addresses of pictures, and how to answer.

What would change the answer and is not supported is refused by name; what cannot change it is passed over.
"""

import dataclasses
import json
import secrets
from collections.abc import Mapping
from typing import Any

from mllm_jax.data.records import IMAGE_PLACEHOLDER, Turn
from mllm_jax.inference.settings import Sampling
from mllm_jax.server.errors import ApiError

MOST_PICTURES = 64
MOST_CHOICES = 16
MOST_STOPS = 16
# Fields that only tell the service about the caller, or how to keep house.
IGNORED = {"metadata", "parallel_tool_calls", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user"}
# Fields of features that are not here, with the values that ask for nothing.
NEUTRAL = {
  "audio": (),
  "frequency_penalty": (0,),
  "function_call": ("none", "auto"),
  "functions": ([],),
  "logit_bias": ({},),
  "logprobs": (False,),
  "modalities": (["text"],),
  "prediction": (),
  "presence_penalty": (0,),
  "reasoning_effort": (),
  "response_format": ({"type": "text"},),
  "tool_choice": ("none", "auto"),
  "tools": ([],),
  "top_logprobs": (0,),
  "verbosity": (),
  "web_search_options": (),
}
UNDERSTOOD = {
  *("max_completion_tokens", "max_tokens", "messages", "model", "n", "seed", "stop", "stream", "stream_options"),
  *("temperature", "top_k", "top_p"),
}


@dataclasses.dataclass(frozen=True)
class Picture:
  """url: where it is, or the data itself. param: the field it came in."""

  url: str
  param: str


@dataclasses.dataclass(frozen=True)
class Chat:
  """A request to answer.

  turns: ending with a human one, `<image>` in them for each picture. system: None for the template's own.
  max_tokens: None where the client names none. seeds: one for each answer. stop: texts. include_usage: whether a
  stream ends with the count of tokens.
  """

  turns: tuple[Turn, ...]
  pictures: tuple[Picture, ...]
  system: str | None
  max_tokens: int | None
  sampling: Sampling
  seeds: tuple[int, ...]
  stop: tuple[str, ...]
  stream: bool
  include_usage: bool


def parse_json(body: bytes) -> dict[str, Any]:
  """A JSON object. Raises ApiError for anything else; NaN and infinities are no JSON."""

  def refuse(word):
    raise ValueError(f"{word} is no JSON")

  try:
    parsed = json.loads(body.decode("utf-8"), parse_constant=refuse)
  except (ValueError, RecursionError) as error:
    raise ApiError(400, f"the body is no valid JSON: {error}") from error
  if not isinstance(parsed, dict):
    raise ApiError(400, "the body must be a JSON object")
  return parsed


def parse(body: Mapping[str, Any], model: str) -> Chat:
  """What a body asks for. Raises ApiError, which names the field, and 404 for another model than the one served."""
  for name, value in body.items():
    if name in NEUTRAL and value is not None and value not in NEUTRAL[name]:
      raise ApiError(400, f"{name} is not supported here; leave it out", param=name, code="unsupported_parameter")
    if name not in UNDERSTOOD | NEUTRAL.keys() | IGNORED:
      param = name[:80].encode("utf-8", "replace").decode()
      raise ApiError(400, f"there is no field {_short(name)}; leave it out", param=param, code="unknown_parameter")
  wanted = _field(body, "model", str, "a text", model)
  if wanted != model:
    raise ApiError(404, f"model {_short(wanted)} is not here; {model!r} is", param="model", code="model_not_found")
  system, turns, pictures = _conversation(body.get("messages"))
  stream = _field(body, "stream", bool, "true or false", False)
  return Chat(
    turns,
    pictures,
    system,
    max_tokens=_max_tokens(body),
    sampling=_sampling(body),
    seeds=_seeds(body),
    stop=_stop(body.get("stop")),
    stream=stream,
    include_usage=_include_usage(body.get("stream_options"), stream),
  )


def _conversation(messages: Any) -> tuple[str | None, tuple[Turn, ...], tuple[Picture, ...]]:
  """(system, turns, pictures)."""
  if not isinstance(messages, list) or not messages:
    raise ApiError(400, "messages must be a list of at least one message", param="messages")
  system, turns, pictures = [], [], []
  for number, message in enumerate(messages):
    param = f"messages[{number}]"
    if not isinstance(message, dict):
      raise ApiError(400, f"{param} must be an object with role and content", param=param)
    role = message.get("role")
    if role in ("system", "developer") and not turns:
      system.append(_content(message, param, None))
      continue
    due = "assistant" if len(turns) % 2 else "user"
    if role != due:
      raise ApiError(
        400,
        f"{param}.role is {_short(role)} where {due!r} is due; system messages come first, then user and assistant in "
        "turn",
        param=f"{param}.role",
      )
    if due == "user":
      turns.append(Turn("human", _content(message, param, pictures)))
    else:
      turns.append(Turn("gpt", _content(message, param, None)))
  if len(turns) % 2 == 0:
    raise ApiError(400, "the last of the messages must be the user's, which is answered", param="messages")
  if len(pictures) > MOST_PICTURES:
    raise ApiError(400, f"{len(pictures)} pictures, and at most {MOST_PICTURES} are taken", param="messages")
  return "\n".join(system) if system else None, tuple(turns), tuple(pictures)


def _content(message: Mapping[str, Any], param: str, pictures: list[Picture] | None) -> str:
  """A message's text; its pictures are appended to `pictures`, their placeholders lead the text. None allows none."""
  content, param = message.get("content"), f"{param}.content"
  parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
  if not isinstance(parts, list) or not parts:
    raise ApiError(400, f"{param} must be a text or a list of parts", param=param)
  texts, count = [], 0
  for number, part in enumerate(parts):
    place = param if isinstance(content, str) else f"{param}[{number}]"
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
      texts.append(_text(part.get("text"), place, human=pictures is not None))
    elif kind == "image_url" and pictures is not None:
      pictures.append(Picture(_url(part.get("image_url"), f"{place}.image_url"), f"{place}.image_url"))
      count += 1
    else:
      known = "text" if pictures is None else "text or image_url"
      raise ApiError(400, f"{place}.type is {_short(kind)}; here it must be {known}", param=f"{place}.type")
  text = "\n".join(texts)
  if not count and not text.strip() and pictures is not None:
    raise ApiError(400, f"{param} is empty; write a question", param=param)
  return f"{IMAGE_PLACEHOLDER}\n" * count + text


def _text(value: Any, param: str, human: bool) -> str:
  if not isinstance(value, str):
    raise ApiError(400, f"{param} must hold a text", param=param)
  try:
    value.encode("utf-8")
  except UnicodeEncodeError:
    raise ApiError(400, f"{param} holds half a surrogate pair, which is no character", param=param) from None
  if human and IMAGE_PLACEHOLDER in value:
    raise ApiError(
      400, f"{param} says {IMAGE_PLACEHOLDER}, which stands for a picture; give that as a part image_url", param=param
    )
  return value


def _url(value: Any, param: str) -> str:
  url = value.get("url") if isinstance(value, dict) else None
  if not isinstance(url, str):
    raise ApiError(400, f"{param} must be an object with url", param=param)
  return url


def _max_tokens(body: Mapping[str, Any]) -> int | None:
  given = {name: _field(body, name, int, "a whole number") for name in ("max_completion_tokens", "max_tokens")}
  for name, value in given.items():
    if value is not None and value < 1:
      raise ApiError(400, f"{name} is {_short(value)}; it must be at least 1", param=name)
  values = {value for value in given.values() if value is not None}
  if len(values) > 1:
    raise ApiError(400, "max_tokens and max_completion_tokens differ; give one of them", param="max_tokens")
  return values.pop() if values else None


def _sampling(body: Mapping[str, Any]) -> Sampling:
  """OpenAI's defaults: temperature 1, all tokens."""
  temperature = _field(body, "temperature", (int, float), "a number", 1.0)
  if not 0 <= temperature <= 2:
    raise ApiError(400, f"temperature is {_short(temperature)}; it must lie between 0 and 2", param="temperature")
  top_p = _field(body, "top_p", (int, float), "a number", 1.0)
  top_k = _field(body, "top_k", int, "a whole number", 0)
  if not 0 < top_p <= 1:
    raise ApiError(400, f"top_p is {_short(top_p)}; it must be above 0 and at most 1", param="top_p")
  if not 0 <= top_k < 2**31:
    raise ApiError(400, f"top_k is {_short(top_k)}; it must be 0 (no limit) or a number of tokens", param="top_k")
  try:
    return Sampling(float(temperature), float(top_p), top_k)
  except ValueError as error:  # a temperature that is nearly 0
    raise ApiError(400, str(error), param="temperature") from error


def _seeds(body: Mapping[str, Any]) -> tuple[int, ...]:
  """Consecutive ones, so that choice i has the answer that its own seed gives alone; without a seed, drawn ones."""
  n = _field(body, "n", int, "a whole number", 1)
  if not 1 <= n <= MOST_CHOICES:
    raise ApiError(400, f"n is {_short(n)}; it must lie between 1 and {MOST_CHOICES}", param="n")
  seed = _field(body, "seed", int, "a whole number", secrets.randbits(32))
  return tuple((seed + i) % 2**32 for i in range(n))


def _stop(value: Any) -> tuple[str, ...]:
  texts = [] if value is None else [value] if isinstance(value, str) else value
  if not isinstance(texts, list) or len(texts) > MOST_STOPS:
    raise ApiError(400, f"stop must be a text or a list of at most {MOST_STOPS}", param="stop")
  if not all(isinstance(text, str) and text for text in texts):
    raise ApiError(400, "stop must hold texts of at least one character", param="stop")
  return tuple(texts)


def _include_usage(value: Any, stream: bool) -> bool:
  if value is None:
    return False
  if not stream:
    raise ApiError(400, "stream_options go with stream=true alone", param="stream_options")
  if not isinstance(value, dict) or not value.keys() <= {"include_usage", "include_obfuscation"}:
    raise ApiError(400, "stream_options may hold include_usage", param="stream_options")
  return _field(value, "include_usage", bool, "true or false", False)


def _field(body: Mapping[str, Any], name: str, kind: type | tuple, what: str, default: Any = None) -> Any:
  """A field of one kind; `default` where it is missing or null. True is no number here."""
  value = body.get(name)
  if value is None:
    return default
  if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
    raise ApiError(400, f"{name} is {_short(value)}; it must be {what}", param=name)
  return value


def _short(value: Any) -> str:
  # Not repr of the whole: a body may be many megabytes, and an integer longer than Python prints.
  if isinstance(value, int) and abs(value) >= 10**40:
    return "far too large" if value > 0 else "far too small"
  if isinstance(value, str):
    return repr(value[:80])
  return repr(value) if isinstance(value, (int, float, type(None))) else f"of type {type(value).__name__}"
