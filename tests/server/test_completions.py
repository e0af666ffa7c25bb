"""Answers over HTTP: what the engine said, to the client that asked."""

import json
import re
import threading

import httpx2
import pytest
from fake_engine import FakeEngine
from serving import ask, content, data_uri, expected, picture, question, running, wait_for

from mllm_jax.data.aspects import Anyres, Square, Tiles
from mllm_jax.server.preview import preview


def chunks(response):
  """The JSON of a stream's events; what ends it is asserted."""
  lines = [line for line in response.text.split("\n\n") if line]
  assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
  return [json.loads(line[6:]) for line in lines[:-1]]


def joined(events, index=0):
  """(text, why it ended) of one choice."""
  choices = [choice for event in events for choice in event["choices"] if choice["index"] == index]
  assert choices[0]["delta"] == {"role": "assistant", "content": ""}
  return "".join(choice["delta"].get("content", "") for choice in choices), choices[-1]["finish_reason"]


def test_an_answer_is_the_engines(url, processor):
  body = question(pictures=[data_uri(picture(seed, (90, 50 + 40 * seed))) for seed in range(2)])
  response = ask(url, body)
  answer, said = response.json(), expected(processor, body)
  assert answer["choices"] == [
    {
      "index": 0,
      "message": {"role": "assistant", "content": said, "refusal": None},
      "logprobs": None,
      "finish_reason": "stop",
    }
  ]
  assert answer["object"] == "chat.completion" and answer["model"] == "tiny" and answer["id"].startswith("chatcmpl-")
  counts = answer["usage"]
  assert counts["completion_tokens"] == len(said.split())
  assert counts["total_tokens"] == counts["prompt_tokens"] + counts["completion_tokens"]


def test_a_stream_is_the_same_answer(url, processor):
  body = question(pictures=[data_uri(picture())], stream=True, stream_options={"include_usage": True})
  response = ask(url, body)
  assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
  *events, last = chunks(response)
  assert joined(events) == (expected(processor, body), "stop")
  assert (
    last["choices"] == []
    and last["usage"] == ask(url, body | {"stream": False, "stream_options": None}).json()["usage"]
  )
  assert {event["id"] for event in events} == {last["id"]} and all(event["usage"] is None for event in events)
  assert "usage" not in chunks(ask(url, question(stream=True)))[-1]


def test_several_turns_and_a_system_text(url, processor):
  messages = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": data_uri(picture())}}]},
    {"role": "assistant", "content": "A cat."},
    {"role": "user", "content": "Which colour?"},
  ]
  body = question() | {"messages": messages}
  said = content(ask(url, body))
  assert said == expected(processor, body)
  assert said != content(ask(url, body | {"messages": messages[1:]}))


def test_choices_are_those_of_their_seeds(url, processor):
  body = question(temperature=0.7, seed=5, n=3)
  choices = ask(url, body).json()["choices"]
  assert [choice["index"] for choice in choices] == [0, 1, 2]
  assert [choice["message"]["content"] for choice in choices] == [expected(processor, body, seed) for seed in (5, 6, 7)]
  events = chunks(ask(url, body | {"stream": True}))
  assert [joined(events, i)[0] for i in range(3)] == [choice["message"]["content"] for choice in choices]


def test_length_and_stop(url, processor):
  said = expected(processor, question()).split()
  for stream in (False, True):
    cut = ask(url, question(max_tokens=2, stream=stream))
    ended = ask(url, question(stop=[said[2]], stream=stream))
    if stream:
      assert joined(chunks(cut)) == (" ".join(said[:2]), "length")
      assert joined(chunks(ended)) == (" ".join(said[:2]) + " " * 0, "stop")
    else:
      assert content(cut) == content(ended) == " ".join(said[:2])
      assert [each.json()["choices"][0]["finish_reason"] for each in (cut, ended)] == ["length", "stop"]


@pytest.mark.parametrize(
  "body, status, code",
  [
    (question(max_tokens=5000), 400, None),
    (question("word " * 3000), 400, "context_length_exceeded"),
    (question("word " * 1990, max_tokens=1024), 400, "context_length_exceeded"),
    (question("w" * 200_000), 400, "context_length_exceeded"),
    (question(model="other"), 404, "model_not_found"),
    (question(pictures=["https://example.org/a.png"]), 400, "invalid_image_url"),
    (question(pictures=[data_uri(picture(size=(600, 600), kind="JPEG"))]), 400, "invalid_image_url"),
    (question(pictures=[data_uri(picture(size=(1, 300)))]), 400, None),
    (question(pictures=[data_uri(b"x")]), 400, "invalid_image_url"),
    (question("x" * 2**20), 413, "request_too_large"),
    (question(tools=[{}]), 400, "unsupported_parameter"),
  ],
)
def test_refusals(url, body, status, code):
  for stream in (False, True):
    response = ask(url, body | {"stream": stream})
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code), error
    assert error["type"] == "invalid_request_error" and len(error["message"]) < 400


def test_only_json_is_read(url):
  body = json.dumps(question()).encode()
  for kind, status in (("text/plain", 415), ("application/json; charset=utf-8", 200), ("", 415)):
    response = httpx2.post(f"{url}/v1/chat/completions", content=body, headers={"Content-Type": kind})
    assert response.status_code == status


def test_a_body_that_says_nothing_of_its_length(url):
  response = httpx2.post(
    f"{url}/v1/chat/completions", content=iter([b"x" * 2**18] * 6), headers={"Content-Type": "application/json"}
  )
  assert response.status_code == 413


def test_other_paths(url):
  assert httpx2.get(f"{url}/nope").json()["error"]["type"] == "invalid_request_error"
  assert httpx2.get(f"{url}/v1/chat/completions").status_code == 405
  assert httpx2.post(f"{url}/").status_code == 405
  assert httpx2.get(f"{url}/health").json() == {"status": "ok"}


def test_more_than_the_queue_holds(processor):
  engine = FakeEngine(rows=1, pause=0.02, words=8)
  with running(processor, engine, max_queue=2) as url:
    answers = []
    threads = [
      threading.Thread(target=lambda i=i: answers.append(ask(url, question(f"what is {i}")))) for i in range(8)
    ]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    refused = [answer for answer in answers if answer.status_code == 429]
    assert 1 <= len(refused) <= 5 and len(answers) == 8
    assert all(answer.status_code == 200 for answer in answers if answer not in refused)
    assert all(answer.headers["retry-after"] == "1" for answer in refused)
    assert refused[0].json()["error"]["type"] == "rate_limit_error"
    assert ask(url, question(n=4)).status_code == 429 and ask(url, question(n=3)).status_code == 200
    wait_for(lambda: url.front.open == 0)
    text = httpx2.get(f"{url}/metrics").text
    assert f'mllm_requests_total{{status="429"}} {len(refused) + 1}\n' in text


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_row(processor, stream):
  engine = FakeEngine(rows=1, pause=0.01, words=10_000, max_length=10**6)
  with running(processor, engine, max_tokens=10**5) as url:
    with httpx2.Client() as client:
      if stream:
        with client.stream("POST", f"{url}/v1/chat/completions", json=question(stream=True)) as response:
          next(response.iter_lines())
      else:
        with pytest.raises(httpx2.ReadTimeout):
          client.post(f"{url}/v1/chat/completions", json=question(), timeout=0.3)
    wait_for(lambda: engine.cancelled == [1])
    wait_for(lambda: url.front.open == 0 and engine.running == 0)
    assert url.front.metrics.statuses[499] == 1


def test_a_request_that_takes_too_long(processor):
  engine = FakeEngine(rows=1, pause=0.01, words=10_000, max_length=10**6)
  with running(processor, engine, max_tokens=10**5, timeout=0.5) as url:
    late = []
    thread = threading.Thread(target=lambda: late.append(ask(url, question(stream=True))))
    thread.start()
    wait_for(lambda: engine.running == 1)
    assert ask(url, question("and this")).status_code == 504
    thread.join()
    assert late[0].status_code == 200 and '"code":"timeout"' in late[0].text and "[DONE]" not in late[0].text
    wait_for(lambda: sorted(engine.cancelled) == [1, 2])


def test_the_key(processor):
  with running(processor, api_key="sesame") as url:
    for path in ("/v1/models", "/metrics", "/v1/models/tiny"):
      assert httpx2.get(url + path).status_code == 401
      assert httpx2.get(url + path, headers={"Authorization": "Bearer sesame"}).status_code == 200
    for wrong in ("Bearer open", "sesame", "Basic sesame", "Bearer \xff", "Bearer"):
      response = ask(url, question(), headers={"Authorization": wrong.encode("latin-1")})
      assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer"
    assert ask(url, question(), headers={"Authorization": "bearer sesame"}).status_code == 200
    assert httpx2.post(f"{url}/preview", json={}).status_code == 401
    assert httpx2.get(f"{url}/health").status_code == 200 and 'data-wants-key="yes"' in httpx2.get(url).text


def test_warming_up(processor):
  engine = FakeEngine(warming=0.4)
  with running(processor, engine) as url:
    response = httpx2.get(f"{url}/health")
    assert (response.status_code, response.json()) == (503, {"status": "warming up"})
    assert content(ask(url, question())) == expected(processor, question())
    assert httpx2.get(f"{url}/health").status_code == 200
    wait_for(lambda: engine.warmed == [0, 1, 2])  # while nobody asked
    assert content(ask(url, question())) == expected(processor, question())


def test_a_broken_engine_is_told_and_ends_the_server(processor):
  with running(processor, FakeEngine(broken=3, words=10)) as url:
    response = ask(url, question())
    assert response.status_code == 500 and response.json()["error"]["code"] == "engine_failed"
    wait_for(lambda: not url.front.worker.is_alive())


def test_what_is_open_is_answered_before_the_end(processor):
  engine = FakeEngine(rows=1, pause=0.02, words=20)
  with running(processor, engine) as url:
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(ask(url, question()))) for _ in range(2)]
    for thread in threads:
      thread.start()
    wait_for(lambda: url.front.open == 2 and engine.running)
    with httpx2.Client() as client:
      client.get(f"{url}/health")
      url.front.worker._loop.call_soon_threadsafe(url.front.end)
      wait_for(lambda: url.front.draining)
      assert client.get(f"{url}/health").json() == {"status": "draining"}
      assert ask(url, question()).status_code == 503
    for thread in threads:
      thread.join()
    assert [content(answer) for answer in answers] == [expected(processor, question(), count=20)] * 2


def test_what_takes_longer_than_the_grace_is_cut_off(processor):
  engine = FakeEngine(rows=2, pause=0.01, words=10_000, max_length=10**6)
  with running(processor, engine, max_tokens=10**5, grace=0.2) as url:
    answers = []
    threads = [
      threading.Thread(target=lambda stream=stream: answers.append(ask(url, question(stream=stream))))
      for stream in (True, False)
    ]
    for thread in threads:
      thread.start()
    wait_for(lambda: engine.running == 2)
    url.front.worker._loop.call_soon_threadsafe(url.front.end)
    for thread in threads:
      thread.join()
    assert sorted(answer.status_code for answer in answers) == [200, 503]
    assert all('"code":"draining"' in answer.text for answer in answers)


def test_metrics_count_what_happened(processor):
  with running(processor) as url:
    counts = [ask(url, question(pictures=[data_uri(picture())])).json()["usage"] for _ in range(3)]
    ask(url, question(n=0))
    response = httpx2.get(f"{url}/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = response.text.splitlines()
    visual = 3 * preview(processor.aspect, 80, 60)["visual_tokens"]
    for line in (
      'mllm_requests_total{status="200"} 3',
      'mllm_requests_total{status="400"} 1',
      f'mllm_tokens_total{{kind="prompt"}} {sum(each["prompt_tokens"] for each in counts)}',
      f'mllm_tokens_total{{kind="completion"}} {sum(each["completion_tokens"] for each in counts)}',
      f'mllm_tokens_total{{kind="visual"}} {visual}',
      *("mllm_queue_depth 0", "mllm_running_rows 0", "mllm_open_requests 0", "mllm_ready 1"),
      *('mllm_request_seconds_bucket{le="+Inf"} 3', "mllm_time_to_first_token_seconds_count 3"),
    ):
      assert line in lines, line


def test_previews(url, processor):
  body = {"image": data_uri(picture(size=(120, 60)))}
  found = httpx2.post(f"{url}/preview", json=body).json()
  assert (found["columns"], found["rows"], found["crops"]) == (2, 1, 3)
  assert (found["visual_tokens"], found["places"]) == (12, 14) and found["frame"] == [0, 0, 120, 60]
  for wrong in ({"image": 3}, {}, {"image": "data:x"}, {"image": data_uri(picture(size=(1, 400)))}):
    assert httpx2.post(f"{url}/preview", json=wrong).status_code == 400
  wait_for(lambda: url.front.open == 0)


def test_frames_of_pictures_that_are_padded_or_cut(processor):
  vision = processor.vision
  found = preview(Square(vision, 16), 100, 40)
  assert (found["frame"], found["crops"], found["columns"]) == ([0, -30, 100, 100], 1, 0)
  assert preview(Square(vision, 16, cut=True), 100, 40)["frame"] == [30, 0, 40, 40]
  found = preview(Anyres(vision, 16), 100, 40)  # two tiles side by side: a shape of 2 to 1
  assert (found["frame"], found["crops"], found["columns"], found["rows"]) == ([0, -5, 100, 50], 3, 2, 1)
  assert found["visual_tokens"] < found["places"]
  found = preview(Tiles(vision, 16, 4, ()), 100, 40)  # squeezed into its two tiles
  assert (found["frame"], found["crops"], found["columns"], found["rows"]) == ([0, 0, 100, 40], 3, 2, 1)


def test_the_page_needs_nothing_from_outside(url):
  response = httpx2.get(url)
  policy = response.headers["content-security-policy"]
  assert policy.startswith("default-src 'none'") and "unsafe" not in policy and "http" not in policy
  assert "{{" not in response.text.replace("${{", "")
  assert set(re.findall(r"https?:[^'\" ]*", response.text)) == {"http://www.w3.org/2000/svg"}
