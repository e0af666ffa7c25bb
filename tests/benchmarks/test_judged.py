"""A judge: what it is asked, how its verdicts count, and what happens where it fails. The judge is a local server."""

import contextlib
import http.server
import json
import threading

import published_files
import pytest

from mllm_jax import evaluate
from mllm_jax.benchmarks import scoring
from mllm_jax.benchmarks.catalogue import BENCHMARKS
from mllm_jax.benchmarks.judge import Endpoint
from mllm_jax.benchmarks.judged import ask_mathvista, mathvista_value, vet_credit, wild_scores
from mllm_jax.benchmarks.question import Question
from mllm_jax.benchmarks.source import Source
from mllm_jax.benchmarks.store import Store
from mllm_jax.config import ConfigError
from mllm_jax.data.records import DataError
from mllm_jax.evaluate import read_questions


@contextlib.contextmanager
def judge(replies):
  """A server that gives the replies in turn, a number being an HTTP status; yields (endpoint, requests)."""
  seen, replies = [], list(replies)

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
      body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
      seen.append((self.path, self.headers.get("Authorization"), body))
      reply = replies.pop(0)
      self.send_response(reply if isinstance(reply, int) else 200)
      self.end_headers()
      content = {"error": "busy"} if isinstance(reply, int) else {"choices": [{"message": {"content": reply}}]}
      self.wfile.write(json.dumps(content).encode())

    def log_message(self, *arguments):
      pass

  server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
  thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
  thread.start()
  try:
    yield Endpoint(f"http://127.0.0.1:{server.server_port}/v1/", "grader", wait=0.001), seen
  finally:
    server.shutdown()
    thread.join()
    server.server_close()


def judged(name, root, replies, texts=("an answer", "another", "third")):
  """(summary, requests, the store's file) of a benchmark's tiny folder."""
  benchmark = BENCHMARKS[name]
  getattr(published_files, name)(root)
  questions = read_questions(benchmark, Source(root))
  answers = {question.id: {"text": text} for question, text in zip(questions, texts)}
  results = scoring.answered(benchmark, questions, answers)
  store = Store(root / "verdicts.jsonl", {"judge": "grader"})
  with judge(replies) as (endpoint, seen):
    done = scoring.judged(benchmark, results, endpoint, store, lambda count: None)
  return benchmark.summarise(done), seen, store.path


def test_llava_bench_compares_with_the_reference(tmp_path):
  summary, seen, _ = judged("llava_wild", tmp_path, ["8 6\nThe second is short.", "10, 9"])
  assert summary.score == pytest.approx(100 * (6 + 9) / (8 + 10))
  assert summary.categories == {"conv": 75, "detail": 90}
  path, _, body = seen[0]
  assert path == "/v1/chat/completions" and body["model"] == "grader" and body["temperature"] == 0
  text = body["messages"][1]["content"]
  assert text.index("A lake.") < text.index("Describe 0.") < text.index("Reference 0.") < text.index("an answer")
  assert text.rstrip().endswith("Rate.")


def test_mm_vet_counts_by_capability_and_asks_again_what_cannot_be_read(tmp_path, monkeypatch):
  monkeypatch.setenv("OPENAI_API_KEY", "secret")
  summary, seen, _ = judged("mm_vet", tmp_path, [503, "I like it", "0.5", "1.0"])
  assert summary.score == 75
  assert summary.details == {"math": 50, "ocr": 75, "rec": 100}
  assert len(seen) == 4 and {key for _, key, _ in seen} == {"Bearer secret"}


def test_mathvista_asks_only_where_the_answer_is_not_bare(tmp_path):
  texts = ["3", "It is (B), 7 cm", "about 1.24 metres"]
  summary, seen, _ = judged("mathvista", tmp_path, ["(B)", "1.24"], texts)
  assert summary.score == 100 and summary.details == {"free form": 100, "multi choice": 100}
  assert len(seen) == 2


def test_verdicts_are_kept_and_asked_for_again_only_where_the_answer_changed(tmp_path):
  _, _, path = judged("mm_vet", tmp_path, ["0.5", "1.0"])
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  assert rows[1] == {"id": "v1_0", "answer": "an answer", "verdict": "0.5"}
  summary, seen, _ = judged("mm_vet", tmp_path, ["0.0"], ["an answer", "changed"])
  assert summary.score == 25 and len(seen) == 1
  with pytest.raises(ConfigError, match="judge was 'grader' and is 'other'"):
    Store(path, {"judge": "other"})


def test_a_judge_that_fails_ends_the_run_and_keeps_what_it_gave(tmp_path):
  with pytest.raises(DataError, match="question v1_1: HTTP 401.*busy"):
    judged("mm_vet", tmp_path, ["0.5", 401])
  with pytest.raises(DataError, match="question v1_1: a verdict that cannot be read: 'hm'"):
    judged("mm_vet", tmp_path, ["hm"] * 5)
  summary, seen, _ = judged("mm_vet", tmp_path, ["1.0"])
  assert summary.score == 75 and len(seen) == 1


@pytest.mark.parametrize(
  "verdict, scores",
  [("8 7", (8, 7)), ("8.5, 7\nwhy", (8.5, 7)), ("\n9 9", (9, 9)), ("Scores: 8 7", None), ("8", None), ("", None)],
)
def test_the_first_line_of_a_verdict_holds_two_scores(verdict, scores):
  assert wild_scores(verdict) == scores


@pytest.mark.parametrize(
  "verdict, credit",
  [("0.7", 0.7), ("1", 1), ("1.0", 1), ("Score: .5", 0.5), ("0", 0), ("10", None), ("1.5", None), ("none", None)],
)
def test_grades_lie_between_0_and_1(verdict, credit):
  assert vet_credit(None, verdict) == credit


@pytest.mark.parametrize(
  "kind, choices, precision, extracted, value",
  [
    ("integer", None, None, "3.0", "3"),
    ("integer", None, None, "three", None),
    ("float", None, 2.0, "1.234", "1.23"),
    ("float", None, 1.0, "inf", "inf"),
    ("list", None, None, "[1, 2]", "[1, 2]"),
    ("text", ["5", "7 cm"], None, "b", "7 cm"),
    ("text", ["5", "7 cm"], None, "(A) 5", "5"),
    ("text", ["5", "7 cm"], None, "7cm", "7 cm"),
    ("text", ["5", "7 cm"], None, "", None),
  ],
)
def test_mathvista_brings_answers_into_the_form_of_the_gold_one(kind, choices, precision, extracted, value):
  asked = "multi_choice" if choices else "free_form"
  facts = {"question_type": asked, "answer_type": kind, "choices": choices, "precision": precision}
  assert mathvista_value(Question("1", "q", (), facts=facts), extracted) == value
  assert ask_mathvista(Question("1", "q", (), facts=facts), "") is None


def test_verdicts_of_an_earlier_call_count_in_the_report(tmp_path, capsys):
  model = {"model": "sp", "fingerprint": "0123", "padded": True}
  for name in ("mm_vet", "pope"):
    getattr(published_files, name)(tmp_path / "data")
    benchmark, path = BENCHMARKS[name], tmp_path / f"out/predictions/{name}.jsonl"
    questions = read_questions(benchmark, Source(tmp_path / "data"))
    store = Store(path, evaluate.head(benchmark, questions, model, {"beams": 1, "max_slices": 0}))
    for question in questions:
      store.append({"id": question.id, "text": "yes"})
  run = lambda *given: evaluate.main(
    [f"--data={tmp_path / 'data'}", f"--out={tmp_path / 'out'}", "--score_only", *given]
  )
  report = lambda: json.loads((tmp_path / "out/report.json").read_text())["benchmarks"]

  assert run("--benchmark=pope") == 0 and list(report()) == ["pope"]
  assert "left out of the report: " in capsys.readouterr().err  # nobody has judged mm_vet
  with judge(["0.5", "1.0"]) as (endpoint, seen):
    assert run("--benchmark=mm_vet", f"--judge_url={endpoint.url}", "--judge_model=grader") == 0
    assert run("--benchmark=pope") == 0 and len(seen) == 2
  assert report()["mm_vet"]["score"] == 75 and list(report()) == ["pope", "mm_vet"]
  path = tmp_path / "out/verdicts/mm_vet.jsonl"
  path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
  capsys.readouterr()
  assert run("--benchmark=pope") == 0 and "mm_vet.jsonl: verdicts are missing" in capsys.readouterr().err
