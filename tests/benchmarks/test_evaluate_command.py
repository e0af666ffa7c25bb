"""python -m mllm_jax.evaluate: asking, going on after an interruption, scoring again, and the reports."""

import dataclasses
import json
import subprocess
import sys

import layouts
import numpy as np
import published_files
import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mllm_jax
from mllm_jax import evaluate
from mllm_jax.benchmarks.catalogue import BENCHMARKS
from mllm_jax.benchmarks.source import Source
from mllm_jax.benchmarks.store import Store
from mllm_jax.config import ProjectorConfig
from mllm_jax.inference.requests import Answer

MODEL = {"model": "sp", "fingerprint": "0123", "padded": True}


class Processor:
  """Its rows are the text that is asked and the sizes of the pictures."""

  def with_room(self, n_images):
    return self

  def prompt(self, turns, pictures):
    return turns[0].text, [picture.size for picture in pictures]


class Engine:
  """Says yes to everything; keeps what it was asked, and can be made to stop."""

  def __init__(self):
    self.asked, self.stop_after = [], None

  def answer(self, requests, progress=None):
    if self.stop_after is not None and len(self.asked) >= self.stop_after:
      raise KeyboardInterrupt
    self.asked += requests
    progress(len(requests), len(requests))
    return [Answer(" Yes\n", (), "stop") for _ in requests]


@pytest.fixture
def engine(monkeypatch):
  found = Engine()
  monkeypatch.setattr(evaluate, "describe", lambda path: MODEL)
  monkeypatch.setattr(evaluate, "load_engine", lambda *_: (found, Processor()))
  return found


@pytest.fixture
def run(tmp_path, engine, capsys):
  """Calls the command on the tiny POPE and MME folders; (status, standard output, standard error)."""
  published_files.pope(tmp_path / "data")
  published_files.mme(tmp_path / "data")

  def call(*arguments, benchmark="pope"):
    given = [
      f"--benchmark={benchmark}",
      f"--data={tmp_path / 'data'}",
      f"--out={tmp_path / 'out'}",
      f"--model={tmp_path}",
    ]
    status = evaluate.main([*given, *arguments])
    return status, *capsys.readouterr()

  return call


def lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_asks_scores_and_reports(run, engine, tmp_path):
  status, out, err = run(benchmark="pope,mme")
  assert status == 0
  assert out == f"pope\t{100 * 2 / 3:.2f}\nmme\t{50:.2f}\n"  # yes to everything: precision 1/2, recall 1
  assert "q/s" in err and "pope" in err
  (text, sizes), request = engine.asked[0].row, engine.asked[0]
  assert text == "<image>\nIs there a 0?\nAnswer the question using a single word or phrase." and sizes == [(8, 6)]
  assert (request.beams, request.max_new_tokens, request.sampling.temperature) == (1, 128, 0)
  head, *rows = lines(tmp_path / "out/predictions/pope.jsonl")
  assert head["fingerprint"] == "0123" and head["beams"] == 1 and len(rows) == 12
  assert rows[0] == {"id": "0", "prompt": text.removeprefix("<image>\n"), "text": "Yes"}
  report = json.loads((tmp_path / "out/report.json").read_text())
  assert report["benchmarks"]["pope"]["score"] == pytest.approx(200 / 3)
  assert report["benchmarks"]["pope"]["details"]["random yes"] == 100
  found = {"existence": 50, "code_reasoning": 50}
  assert report["benchmarks"]["mme"] | {"metric": "", "prompt": ""} == {
    "title": "MME perception",
    "metric": "",
    "prompt": "",
    "questions": 8,
    "of": 8,
    "score": 50,
    "highest": 2000,
    "details": {"perception": 50, "cognition": 50}
    | {f"{name} {kind}": value for name in found for kind, value in (("acc", 50), ("acc+", 0))},
    "categories": found,
    "settings": {"beams": 1, "max_slices": 0, "longest_side": 0},
  }
  page = (tmp_path / "out/report.html").read_text()
  assert "POPE" in page and "6 of 6 wrong answers" in page and page.count("data:image/jpeg;base64,") == 6 + 4
  assert "http" not in page.split("</style>")[1]


def test_goes_on_where_it_was_interrupted(run, engine, tmp_path):
  engine.stop_after = 4
  status, _, err = run("--batch_size=1")
  assert status == 130 and "run the same again" in err
  path = tmp_path / "out/predictions/pope.jsonl"
  assert len(lines(path)) == 1 + 4
  with path.open("a") as file:
    file.write('{"id": "4", "te')  # killed while it wrote
  engine.stop_after = None
  status, out, _ = run("--batch_size=1")
  assert status == 0 and out.startswith("pope\t66.67")
  assert len(engine.asked) == 12 and [row["id"] for row in lines(path)[1:]] == [str(n) for n in range(12)]


def test_another_setting_or_model_is_refused(run, tmp_path, monkeypatch):
  assert run()[0] == 0
  status, _, err = run("--num_beams=5")
  assert status == 2 and "beams was 1 and is 5" in err and "Use another --out" in err
  monkeypatch.setattr(evaluate, "describe", lambda path: MODEL | {"fingerprint": "4567"})
  status, _, err = run()
  assert status == 2 and "fingerprint was '0123' and is '4567'" in err
  (tmp_path / "out/predictions/pope.jsonl").write_text('{"a": 1}\n{"b"\n')
  status, _, err = run()
  assert status == 2 and "pope.jsonl is damaged" in err


def test_scores_again_without_a_model(run, engine, tmp_path, monkeypatch):
  status, _, err = run("--score_only")
  assert status == 2 and "no answers to score" in err
  run()
  monkeypatch.setattr(evaluate, "load_engine", None)
  path = tmp_path / "out/predictions/pope.jsonl"
  path.write_text(path.read_text().replace('"text": "Yes"', '"text": "no <i>way"', 1))  # a right yes, made wrong
  status, out, _ = run("--score_only")
  assert status == 0 and out == f"pope\t{100 * (0.4 + 2 / 3 + 2 / 3) / 3:.2f}\n"  # precision 1/3, recall 1/2
  assert "no &lt;i&gt;way" in (tmp_path / "out/report.html").read_text()
  path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
  status, _, err = run("--score_only")
  assert status == 2 and "1 of 12 questions have no answer" in err


def test_answers_of_two_models_are_not_scored_together(run, monkeypatch):
  run()
  monkeypatch.setattr(evaluate, "describe", lambda path: MODEL | {"fingerprint": "4567"})
  run(benchmark="mme")
  status, _, err = run("--score_only", benchmark="pope,mme")
  assert status == 2 and "answers of 2 models (0123, 4567)" in err


def test_the_report_holds_what_earlier_calls_asked(run, engine, tmp_path, monkeypatch):
  """Benchmarks of one model and its settings make one report, in whatever calls they were asked."""
  scores = dict.fromkeys("vqav2 gqa vizwiz scienceqa textvqa mmbench_en_dev seed llava_wild mm_vet".split(), 50)
  (tmp_path / "out").mkdir()
  (tmp_path / "out/server_scores.json").write_text(json.dumps(scores))
  report = lambda: json.loads((tmp_path / "out/report.json").read_text())
  assert run("--limit=4", benchmark="mme")[1].startswith("mme\t")
  status, out, err = run()
  assert status == 0 and out == "pope\t66.67\n" and "left out" not in err
  counts = {name: entry["questions"] for name, entry in report()["benchmarks"].items()}
  assert counts == {"pope": 12, "mme": 4} and not report()["averages"]  # a part of a benchmark is no score
  run(benchmark="mme")
  assert report()["averages"]["Avg11"] == pytest.approx((9 * 50 + 200 / 3 + 2.5) / 11)
  page = (tmp_path / "out/report.html").read_text()
  assert "id='pope'" in page and "id='mme'" in page
  run("--score_only")
  assert "Avg11" in report()["averages"]

  monkeypatch.setattr(evaluate, "describe", lambda path: MODEL | {"fingerprint": "4567"})
  (tmp_path / "out/predictions/pope.jsonl").unlink()
  status, _, err = run()
  assert status == 0 and "left out of the report: " in err and "mme.jsonl is of another model (sp)" in err
  assert list(report()["benchmarks"]) == ["pope"]


def test_settings_differ_by_benchmark_in_one_report(run, engine, tmp_path):
  """As LLaVA-UHD v2's protocol has it."""
  assert run("--max_slices=9", "--num_beams=5", benchmark="mme")[0] == 0
  assert run("--max_slices=9", "--longest_side=1024")[0] == 0
  report = json.loads((tmp_path / "out/report.json").read_text())
  settings = {name: entry["settings"] for name, entry in report["benchmarks"].items()}
  asked = {"beams": 1, "max_slices": 9, "longest_side": 1024}
  assert settings == {"pope": asked, "mme": {"beams": 5, "max_slices": 9, "longest_side": 0}}
  facts = "beams 1 (pope); 5 (mme), max_slices 9, longest_side 1024 (pope); 0 (mme)"
  assert f"fingerprint 0123, {facts}<" in (tmp_path / "out/report.html").read_text()
  assert [request.row[1] for request in engine.asked[-12:]] == [[(1024, 768)]] * 12
  assert [request.row[1] for request in engine.asked[:8]] == [[(8, 6)]] * 8
  assert lines(tmp_path / "out/predictions/mme.jsonl")[0].keys().isdisjoint({"longest_side"})
  status, _, err = run("--max_slices=9")
  assert status == 2 and "longest_side was 1024 and is None" in err


def test_what_cannot_be_scored_again_is_left_out_of_the_report(run, tmp_path):
  run(benchmark="mme")
  (next((tmp_path / "data/MME").rglob("*.txt"))).unlink()
  status, _, err = run()
  assert status == 0 and "left out of the report: mme: " in err


def test_one_of_several_processes_is_refused(run, monkeypatch):
  for name, value in (("COORDINATOR_ADDRESS", "a:1"), ("NUM_PROCESSES", "2"), ("PROCESS_ID", "1")):
    monkeypatch.setenv(f"JAX_{name}", value)
  status, _, err = run()
  assert status == 2 and "an evaluation is one process" in err and "that of one of 2" in err


def test_a_limit_is_a_part_that_more_questions_can_follow(run, engine, tmp_path):
  assert run("--limit=4")[0] == 0 and len(engine.asked) == 4
  report = json.loads((tmp_path / "out/report.json").read_text())
  assert (report["benchmarks"]["pope"]["questions"], report["benchmarks"]["pope"]["of"]) == (4, 12)
  assert run()[0] == 0 and len(engine.asked) == 12


def test_scores_of_servers_count_in_the_averages(run, tmp_path):
  names = "vqav2 gqa vizwiz scienceqa textvqa mmbench_en_dev seed llava_wild mm_vet".split()
  (tmp_path / "out").mkdir()
  (tmp_path / "out/server_scores.json").write_text(json.dumps(dict.fromkeys(names, 50)))
  assert run(benchmark="pope,mme")[0] == 0
  averages = json.loads((tmp_path / "out/report.json").read_text())["averages"]
  assert averages["Avg11"] == pytest.approx((9 * 50 + 200 / 3 + 2.5) / 11)
  (tmp_path / "out/server_scores.json").write_text("[1]")
  status, _, err = run()
  assert status == 2 and "server_scores.json" in err


def test_what_is_missing_is_said_before_a_model_is_loaded(run, tmp_path, monkeypatch):
  monkeypatch.setattr(evaluate, "load_engine", None)
  status, _, err = run(benchmark="pope,gqa")
  assert status == 2 and "gqa: missing below --data" in err and "published:" in err
  (tmp_path / "data/pope/val2014/p0.jpg").unlink()
  status, _, err = run()
  assert status == 2 and "1 of 2 pictures are missing" in err


def test_a_folder_that_cannot_be_made_is_said_before_anything_is_asked(run, engine, tmp_path):
  (tmp_path / "file").touch()
  status, _, err = run(f"--out={tmp_path / 'file'}")
  assert status == 2 and "file: Not a directory; name a folder" in err and not engine.asked


def test_a_picture_that_cannot_be_read_is_named_and_what_was_answered_stays(run, tmp_path):
  (tmp_path / "data/pope/val2014/p1.jpg").write_bytes(b"no picture")
  status, _, err = run("--batch_size=1")
  assert status == 2 and "question 2: image " in err and "p1.jpg" in err
  published_files.put(tmp_path / "data/pope/val2014/p1.jpg", published_files.png())
  assert run()[0] == 0


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(max_size=8), min_size=1, max_size=4), cut=st.floats(0, 1))
def test_answers_cut_off_anywhere_are_a_beginning_that_goes_on(texts, cut, tmp_path):
  path = tmp_path / "answers.jsonl"
  path.unlink(missing_ok=True)
  rows = [{"id": str(n), "text": text} for n, text in enumerate(texts)]
  for row in rows:
    Store(path, {"model": "m"}).append(row)
  whole = path.read_bytes()
  path.write_bytes(whole[: round(cut * len(whole))])
  store = Store(path, {"model": "m"})
  assert list(store.rows.values()) == rows[: len(store.rows)]
  for row in rows[len(store.rows) :]:
    store.append(row)
  assert path.read_bytes() == whole


@pytest.mark.parametrize(
  "arguments, message",
  [
    ([], "--benchmark is missing"),
    (["--benchmark=pope", "--data=.", "--out=x"], "--model is missing"),
    (["--benchmark=pope", "--data=.", "--out=x", "--model=/no/such"], "--model /no/such: no such folder"),
    (["--benchmark=pop", "--data=.", "--out=x", "--model=."], "--benchmark pop: unknown; known: vqav2"),
    (["--benchmark=pope", "--data=/no/such", "--out=x", "--model=."], "--data /no/such: no such folder"),
    (["--benchmark=pope", "--data=.", "--out=x", "--model=.", "--limit=0"], "--limit is 0"),
    (["--benchmark=pope", "--data=.", "--out=x", "--model=.", "--num_beams=20"], "--num_beams 20 takes as many rows"),
    (["--benchmark=pope", "--data=.", "--out=x", "--model=.", "--longest_side=-1"], "--longest_side is -1"),
    (["--benchmark=pope", "--data=.", "--out=x", "--model=.", "--tensor=0"], "--tensor is 0"),
    (["--benchmark=mm_vet", "--data=.", "--out=x", "--model=."], "needs a judge; give --judge_url"),
  ],
)
def test_arguments_that_cannot_work(arguments, message, capsys):
  with pytest.raises(SystemExit) as stop:
    evaluate.main(arguments)
  printed = capsys.readouterr()
  assert stop.value.code == 2 and message in printed.err and printed.err.count("\n") == 1


def test_the_list_needs_no_jax():
  code = (
    "import sys\nfrom mllm_jax import evaluate\nstatus = evaluate.main(['--list'])\n"
    "heavy = {'jax', 'flax', 'orbax', 'transformers', 'pyarrow'} & set(sys.modules)\n"
    "assert status == 0 and not heavy, (status, heavy)"
  )
  printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert printed.returncode == 0, printed.stderr
  assert printed.stdout.startswith("name") and "mathvista" in printed.stdout


def write_model(path):
  """A random model as a folder of this project."""
  from mllm_jax import parameters
  from mllm_jax.config import ModelConfig
  from mllm_jax.models.mllm import abstract
  from mllm_jax.weights import folder
  from mllm_jax.weights.tensors import InMemory

  parts = {"vision": tiny.VISION, "decoder": tiny.DECODER, "projector": tiny.PROJECTOR}
  rng, shapes = np.random.default_rng(0), parameters.flatten(abstract(ModelConfig(**parts, dtype="float32")))[1]
  arrays = {name: rng.normal(0, 0.3, shape.shape).astype(np.float32) for name, shape in shapes.items()}
  _, llm = tiny.write_towers(path.parent / "towers")
  folder.write(path, folder.Manifest(parts, "vicuna_v1"), InMemory(arrays), llm)


@pytest.mark.parametrize(
  "projector, images, padded",
  [
    (layouts.MLP, {}, True),
    (ProjectorConfig(kind="mlp2x_gelu", image_newline=True), {}, False),
    (ProjectorConfig(kind="pixel_shuffle"), {}, False),
    (ProjectorConfig(kind="pixel_shuffle"), {"image_aspect": "pad"}, True),
    (ProjectorConfig(kind="uhd_v1", pyramid="none", levels=(0,), query_grid=2, head_width=8), {}, False),
  ],
  ids=["pad", "anyres", "tiles", "trained otherwise", "slices"],
)
def test_boxes_are_of_the_square_only_where_pictures_are_padded_to_one(tmp_path, projector, images, padded):
  from mllm_jax.weights import folder
  from mllm_jax.weights.tensors import InMemory

  model = layouts.model(projector)
  parts = {name: getattr(model, name) for name in ("vision", "decoder", "projector")}
  arrays = {path: array for name in parts for path, array in layouts.arrays(model, name).items()}
  folder.write(tmp_path / "model", folder.Manifest(parts, "vicuna_v1", images=images), InMemory(arrays), "")
  assert evaluate.describe(str(tmp_path / "model"))["padded"] is padded


def test_a_real_model_answers_on_all_devices_and_is_scored(tmp_path, monkeypatch, capsys):
  """On the tests' eight devices, as it answers on one."""
  published_files.mmmu(tmp_path / "data")
  write_model(tmp_path / "model")
  monkeypatch.setitem(BENCHMARKS, "mmmu", dataclasses.replace(BENCHMARKS["mmmu"], max_new_tokens=4))
  given = ["--benchmark=mmmu", f"--data={tmp_path / 'data'}", f"--out={tmp_path / 'out'}", "--batch_size=2"]
  assert evaluate.main([*given, f"--model={tmp_path / 'model'}"]) == 0, capsys.readouterr().err
  told = capsys.readouterr().out
  head, *rows = lines(tmp_path / "out/predictions/mmmu.jsonl")
  assert head["model"] == "model" and head["padded"] is True and len(head["fingerprint"]) == 16
  assert len(rows) == 2 and all(row["text"] for row in rows)

  model, processor = mllm_jax.load(tmp_path / "model")
  questions = BENCHMARKS["mmmu"].read(Source(tmp_path / "data"))
  pictures = [[picture.load() for picture in question.images] for question in questions]
  prompts = [question.prompt for question in questions]
  answers = mllm_jax.generate(model, processor, prompts, pictures, max_new_tokens=4)
  assert [row["text"] for row in rows] == answers and len(set(answers)) == 2
  assert evaluate.main([*given, "--score_only"]) == 0
  assert capsys.readouterr().out == told and told.startswith("mmmu\t")
