"""What the JSON of a chat request is taken for, and which field a refusal names."""

import json

import pytest

from mllm_jax.data.records import Turn
from mllm_jax.inference.settings import Sampling
from mllm_jax.server.chat_request import Chat, Picture, parse, parse_json
from mllm_jax.server.errors import ApiError

HELLO = [{"role": "user", "content": "hello"}]


def parsed(**fields) -> Chat:
  return parse({"messages": HELLO} | fields, "tiny")


def test_openais_defaults():
  chat = parsed(model="tiny")
  assert chat.turns == (Turn("human", "hello"),) and chat.system is None and chat.pictures == ()
  assert chat.sampling == Sampling(1.0, 1.0, 0) and len(chat.seeds) == 1 and chat.max_tokens is None
  assert chat.stop == () and not chat.stream and not chat.include_usage


def test_every_field_that_is_understood():
  chat = parsed(
    temperature=0.5,
    top_p=0.25,
    top_k=7,
    n=3,
    seed=2**32 - 1,
    stop=["\n", "end"],
    max_completion_tokens=9,
    stream=True,
    stream_options={"include_usage": True},
  )
  assert chat.sampling == Sampling(0.5, 0.25, 7) and chat.stop == ("\n", "end") and chat.max_tokens == 9
  assert chat.seeds == (2**32 - 1, 0, 1) and chat.stream and chat.include_usage
  assert parsed(stop="end").stop == ("end",) and parsed(seed=-1).seeds == (2**32 - 1,)
  assert parsed(max_tokens=4, max_completion_tokens=4).max_tokens == 4


def test_parts_turns_and_several_pictures():
  url = lambda text: {"type": "image_url", "image_url": {"url": text, "detail": "high"}}
  text = lambda text: {"type": "text", "text": text}
  messages = [
    {"role": "developer", "content": "Be brief."},
    {"role": "system", "content": [text("And kind.")]},
    {"role": "user", "content": [text("Which of them"), url("data:a"), url("data:b"), text("is older?")]},
    {"role": "assistant", "content": "The first <image>."},
    {"role": "user", "content": [url("data:c")]},
  ]
  chat = parsed(messages=messages)
  assert chat.system == "Be brief.\nAnd kind."
  assert chat.turns == (
    Turn("human", "<image>\n<image>\nWhich of them\nis older?"),
    Turn("gpt", "The first <image>."),
    Turn("human", "<image>\n"),
  )
  assert chat.pictures == (
    Picture("data:a", "messages[2].content[1].image_url"),
    Picture("data:b", "messages[2].content[2].image_url"),
    Picture("data:c", "messages[4].content[0].image_url"),
  )


def test_what_cannot_change_the_answer_is_passed_over():
  ignored = {"user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "parallel_tool_calls": False}
  neutral = {"presence_penalty": 0.0, "logprobs": False, "tools": [], "response_format": {"type": "text"}}
  nulls = dict.fromkeys(["temperature", "stop", "seed", "max_tokens", "stream", "stream_options", "logit_bias", "n"])
  assert parsed(**ignored, **neutral, **nulls).sampling == Sampling(1.0)


@pytest.mark.parametrize(
  "field, value",
  [
    *[("presence_penalty", 0.5), ("frequency_penalty", -1), ("logprobs", True), ("top_logprobs", 3)],
    *[("tools", [{"type": "function"}]), ("tool_choice", "required"), ("functions", [{}]), ("audio", {})],
    *[("response_format", {"type": "json_object"}), ("logit_bias", {"1": 5}), ("modalities", ["audio"])],
    *[("best_of", 2), ("temperature", "hot"), ("temperature", True), ("temperature", -1), ("temperature", 3)],
    *[("temperature", 1e-9), ("temperature", 10**400), ("top_p", 0), ("top_p", 1.5), ("top_p", []), ("top_k", -1)],
    *[("top_k", 2**40), ("n", 0), ("n", 1000), ("n", 1.0), ("seed", "x"), ("seed", 1.5), ("stop", [""]), ("stop", 3)],
    *[("stop", ["x"] * 100), ("stop", [1]), ("stream", "yes"), ("stream_options", {"include_usage": True})],
    *[("max_tokens", 0), ("max_tokens", 2.5), ("max_completion_tokens", -(10**50)), ("model", 3), ("model", "other")],
  ],
)
def test_a_refusal_names_the_field(field, value):
  with pytest.raises(ApiError) as caught:
    parsed(**{field: value})
  assert caught.value.status == (404 if value == "other" else 400)
  assert caught.value.param == field and field in caught.value.message
  assert len(caught.value.message) < 300
  json.dumps(caught.value.body, ensure_ascii=False).encode("utf-8")


@pytest.mark.parametrize(
  "messages, param",
  [
    *[(None, "messages"), ([], "messages"), ("hello", "messages"), (["hello"], "messages[0]")],
    *[([{"role": "tool", "content": "x"}], "messages[0].role"), ([{"content": "x"}], "messages[0].role")],
    *[([*HELLO, *HELLO], "messages[1].role"), ([*HELLO, {"role": "assistant", "content": "x"}], "messages")],
    *[([{"role": "system", "content": "x"}], "messages"), ([*HELLO, {"role": "system"}], "messages[1].role")],
    *[([{"role": "user"}], "messages[0].content"), ([{"role": "user", "content": " "}], "messages[0].content")],
    *[([{"role": "user", "content": []}], "messages[0].content"), ([{"role": {}, "content": "x"}], "messages[0].role")],
    ([{"role": "user", "content": ["x"]}], "messages[0].content[0].type"),
    ([{"role": "user", "content": [{"type": "input_audio"}]}], "messages[0].content[0].type"),
    ([{"role": "user", "content": [{"type": "text", "text": 3}]}], "messages[0].content[0]"),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "messages[0].content[0].image_url"),
    ([{"role": "system", "content": [{"type": "image_url"}]}, *HELLO], "messages[0].content[0].type"),
    ([{"role": "user", "content": "an <image> of it"}], "messages[0].content"),
    ([{"role": "user", "content": "half \ud83d"}], "messages[0].content"),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}] * 65}], "messages"),
  ],
)
def test_messages_that_are_none(messages, param):
  with pytest.raises(ApiError) as caught:
    parsed(messages=messages)
  assert (caught.value.status, caught.value.param) == (400, param)


def test_an_unknown_field_may_have_any_name():
  with pytest.raises(ApiError) as caught:
    parsed(**{"half \ud83d" * 100: 1})
  json.dumps(caught.value.body, ensure_ascii=False).encode("utf-8")
  assert caught.value.code == "unknown_parameter"


@pytest.mark.parametrize(
  "body",
  [
    b"",
    b"{",
    b"[]",
    b"3",
    b'{"temperature": NaN}',
    b'{"a": -Infinity}',
    b"\xff\xfe{}",
    b"[" * 10**6,
    b'{"n": 1' + b"0" * 5000 + b"}",
  ],
)
def test_bodies_that_are_no_json_object(body):
  with pytest.raises(ApiError) as caught:
    parse_json(body)
  assert caught.value.status == 400


def test_errors_have_openais_form():
  body = ApiError(429, "later", code="queue_full", retry_after=1)
  assert body.body == {"error": {"message": "later", "type": "rate_limit_error", "param": None, "code": "queue_full"}}
  assert body.response().headers["retry-after"] == "1"
  assert ApiError(503, "x").body["error"]["type"] == "server_error"
