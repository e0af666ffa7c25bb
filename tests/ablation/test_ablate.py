"""The ablation as a user runs it, mostly with a trainer that only writes what the real one would."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from mllm_jax import ablate
from mllm_jax.ablation.plan import FINISHED, as_json, plan
from mllm_jax.suites import SUITES, Row

REPOSITORY = Path(__file__).parents[2]
FAKE = (sys.executable, "-S", str(Path(__file__).with_name("fake_trainer.py")))
KIND = "model.projector.kind"
ROWS = (
  Row("First", "sp_cropping"),
  Row("Second & <last>", "llava15"),
  Row("With VDIM", "uhd_v2", {"model.projector.pooling": "fixed"}),
  Row("With the same", "uhd_v2", {KIND: "perceiver"}),
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """Where the fake trainer finds out what to do; this process keeps its signals."""
  monkeypatch.setattr(ablate, "TRAIN", FAKE)
  monkeypatch.setattr(ablate, "COUNT", (*FAKE, "--summary"))
  monkeypatch.setattr(signal, "signal", lambda *arguments: None)
  monkeypatch.setenv("FAKE_TRAINER", str(tmp_path))
  monkeypatch.setitem(SUITES, "some", ROWS[:2])
  monkeypatch.setitem(SUITES, "vdims", ROWS[1:])
  behave(tmp_path)
  return tmp_path


def behave(folder: Path, **changes) -> None:
  wanted = {"sp_cropping": [0.9, 0.8], "llava15": [0.75, 0.25], "uhd_v2": [0.5, 0.5]} | changes
  (folder / "behaviour.json").write_text(json.dumps(wanted))


def run(folder: Path, *options: str, suite: str = "some") -> int:
  return ablate.main(["ablate", f"--suite={suite}", "--seeds=2", f"--workdir={folder / 'out'}", *options])


def trained(folder: Path) -> list[str]:
  """The workdirs that the trainer was called for since the last time, in order."""
  path = folder / "commands.jsonl"
  commands = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
  path.unlink(missing_ok=True)
  paths = [argument.partition("=")[2] for command in commands for argument in command if argument[:10] == "--workdir="]
  return [str(Path(path).relative_to(folder / "out")) for path in paths]


def test_the_tables(folder, capsys):
  assert run(folder, "--kinds") == 0
  assert trained(folder) == ["first/seed-0", "second-last/seed-0", "first/seed-1", "second-last/seed-1"]
  out = capsys.readouterr().out
  assert "1 of 4 runs done, about 0 minutes left" in out and "4 of 4 runs done ----" in out

  content = json.loads((folder / "out" / "table.json").read_text())
  first, second = content["rows"]
  assert (first["label"], first["seeds"], first["questions"]) == ("First", [0, 1], 100)
  # Standard deviations by hand: of two values it is their difference over the root of two.
  assert first["scores"]["eval/exact_match"] == {
    "mean": pytest.approx(0.85),
    "spread": pytest.approx(0.1 / 2**0.5),
    "values": [0.9, 0.8],
  }
  assert second["scores"]["eval/exact_match/count"]["mean"] == pytest.approx(0.625)
  assert second["scores"]["eval/blank"]["spread"] == 0
  # 200 predicted tokens a step on average, and in the middle of the intervals 800 a second.
  assert first["seconds_a_step"]["mean"] == pytest.approx(0.25) and first["trained_tokens"]["mean"] == 3000
  assert (first["projector_parameters"], first["visual_tokens"], first["flops"]) == (1_250_000, 68, 2.4e8)
  assert content["equal"]["finetune.steps"] == "400" and content["different"] == {}

  text = (folder / "out" / "table.md").read_text()
  assert "| First | 85.0 ± 7.1 | 25.0 ± 0.0 | 1.25 | 68 | 0.24 | 0.25 | 3 | 0, 1 |" in text
  assert "| Second & <last> | 62.5 ± 17.7 |" in text and text in out
  # The largest standard error of a share of 100 questions: that of one half.
  assert "100 questions leave a standard error of up to 5.0 in each" in text

  html = (folder / "out" / "table.html").read_text()
  drawing = ElementTree.fromstring(re.search(r"<svg.*?</svg>", html)[0])
  assert "Second &amp; &lt;last&gt;" in html and "<last>" not in html
  assert "<code>python -m mllm_jax.compile --summary</code>" in html
  middle = [float(bar.get("x1")) for bar in drawing.iter("line") if bar.get("class") == "mean"]
  ticks = {text.text: float(text.get("x")) for text in drawing.iter("text") if (text.text or "").isdigit()}
  place = lambda percent: ticks["40"] + (ticks["80"] - ticks["40"]) * (percent - 40) / 40
  assert middle == [pytest.approx(place(85), abs=0.2), pytest.approx(place(50), abs=0.2)]
  assert len(list(drawing.iter("circle"))) == 4


def test_finished_runs_are_taken_and_others_are_begun_again(folder, capsys):
  assert run(folder, "--only=First") == 0
  assert trained(folder) == ["first/seed-0", "first/seed-1"]
  text = (folder / "out" / "table.md").read_text()
  assert "| Second & <last> | – | – | – | – | – | – | – | not done: 0, 1 |" in text
  (folder / "out" / "first" / "seed-1" / FINISHED).unlink()
  assert run(folder) == 0
  assert trained(folder) == ["second-last/seed-0", "first/seed-1", "second-last/seed-1"]
  before = (folder / "out" / "table.json").read_text()
  assert run(folder) == 0 and trained(folder) == []
  assert (folder / "out" / "table.json").read_text() == before


def test_a_finished_run_of_another_configuration_is_not_taken(folder, monkeypatch):
  assert run(folder) == 0
  trained(folder)
  monkeypatch.setitem(SUITES, "some", (ROWS[0]._replace(overrides={"finetune.steps": 3}), ROWS[1]))
  assert run(folder) == 0
  assert trained(folder) == ["first/seed-0", "first/seed-1"]


def test_what_another_suite_has_trained_is_taken(folder, monkeypatch, capsys):
  monkeypatch.setitem(
    SUITES, "again", (Row("Its first", "sp_cropping"), Row("Its VDIM", "uhd_v2", {KIND: "perceiver"}))
  )
  for suite in ("some", "vdims"):
    assert run(folder, f"--workdir={folder / suite}", suite=suite) == 0
  (folder / "commands.jsonl").unlink()
  assert run(folder, f"--workdir={folder / 'again'}", suite="again") == 0
  assert not (folder / "commands.jsonl").exists()
  assert (
    f"Its VDIM, seed 1 is done already, in {folder / 'vdims' / 'with-the-same' / 'seed-1'}" in capsys.readouterr().out
  )
  assert "| Its first | 85.0 ± 7.1 |" in (folder / "again" / "table.md").read_text()
  # A folder of another name begins anew, and so does a row of another configuration.
  assert run(folder, suite="again") == 0
  assert len(trained(folder)) == 6
  monkeypatch.setitem(SUITES, "again", (Row("Its first", "sp_cropping", {"finetune.steps": 3}),))
  assert run(folder, f"--workdir={folder / 'again'}", suite="again") == 0
  assert (folder / "again" / "its-first" / "seed-1" / FINISHED).exists()


def test_the_time_that_is_left_counts_a_stage_as_a_stage(folder):
  runs = plan("vdims", 2, folder / "out")
  assert [run.label for run in runs[:4]] == ["Second & <last>", "stage_vdim", "With VDIM", "With the same"]
  for run, seconds in zip(runs[:3], (600, 60, 1200)):
    run.folder.mkdir(parents=True)
    (run.folder / FINISHED).write_text(json.dumps({"config": as_json(run.config), "seconds": seconds}))
  # Four rows of 15 minutes, and a stage of one.
  assert ablate.state(runs, []) == "---- 3 of 8 runs done, about 61 minutes left ----"
  assert ablate.state(runs, runs[3:5]) == "---- 3 of 8 runs done, 2 failed, about 31 minutes left ----"


def test_a_failure_is_named_and_the_rest_goes_on(folder, capsys):
  behave(folder, sp_cropping="fail")
  assert run(folder) == 1
  assert trained(folder) == ["first/seed-0", "second-last/seed-0", "first/seed-1", "second-last/seed-1"]
  captured = capsys.readouterr()
  assert "error: First, seed 0 ended with status 3" in captured.err
  assert captured.err.endswith("error: failed: First, seed 0\nerror: failed: First, seed 1\n")
  assert "2 of 4 runs done, 2 failed" in captured.out
  assert "| First | – | – | – | – | – | – | – | failed: 0, 1 |" in (folder / "out" / "table.md").read_text()
  behave(folder)
  assert run(folder) == 0
  assert trained(folder) == ["first/seed-0", "first/seed-1"]


def test_rows_share_a_vdim(folder):
  assert run(folder, suite="vdims") == 0
  commands = [json.loads(line) for line in (folder / "commands.jsonl").read_text().splitlines()]
  seconds = ["second-last/seed-{}", "stage_vdim/seed-{}", "with-vdim/seed-{}", "with-the-same/seed-{}"]
  assert trained(folder) == [name.format(seed) for seed in (0, 1) for name in seconds]
  of = {command[-1].rpartition("/out/")[2]: command for command in commands if "--workdir" in command[-1]}
  assert "--config.stages=vdim" in of["stage_vdim/seed-1"]
  for name in ("with-vdim", "with-the-same"):
    path = (folder / "out" / "stage_vdim" / "seed-1").resolve() / "vdim" / "vdim.safetensors"
    assert of[f"{name}/seed-1"][-3:-1] == ["--config.stages=pretrain,finetune", f"--config.model.vdim_weights={path}"]
  assert not any(argument.startswith("--config.model.vdim") for argument in of["second-last/seed-0"])
  assert len(json.loads((folder / "out" / "table.json").read_text())["rows"]) == 3


def test_without_its_vdim_a_row_is_not_trained(folder, capsys):
  behave(folder, vdim="fail")
  assert run(folder, "--only=With VDIM", suite="vdims") == 1
  assert trained(folder) == ["stage_vdim/seed-0", "stage_vdim/seed-1"]
  assert "With VDIM, seed 0 has no VDIM" in capsys.readouterr().out


@pytest.mark.parametrize(
  "options, words",
  [
    (["--suite=nothing"], "--suite=nothing is none; there are sp_tokens, sp_sfe, sp_dfi"),
    ([], "which suite?"),
    (["--suite=sp_dfi", "--seeds=0"], "--seeds=0 must be 1 or more"),
    (["--suite=sp_dfi", f"--workdir={__file__}"], "File exists; name a folder that can be made"),
    (["--suite=sp_dfi", "--only=Kernel 3"], "--only=Kernel 3: the rows of sp_dfi are 'Without DFI', 'Kernel 16'"),
  ],
)
def test_what_a_user_may_get_wrong(tmp_path, monkeypatch, capsys, options, words):
  monkeypatch.chdir(tmp_path)
  assert ablate.main(["ablate", *options]) == 2
  assert words in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_the_list(capsys):
  assert ablate.main(["ablate", "--list"]) == 0
  out = capsys.readouterr().out
  assert all(row.label in out for rows in SUITES.values() for row in rows)
  assert re.search(r"Kernel 12 +sp_cropping +model.projector.dfi_kernel=4\n", out)


def test_a_signal_reaches_the_trainer_and_a_second_ablation_is_refused(folder, capsys):
  behave(folder, llava15="wait")
  code = (
    "import sys\nfrom mllm_jax import ablate\nfrom mllm_jax.suites import SUITES, Row\n"
    f"ablate.TRAIN, ablate.COUNT = {FAKE!r}, {(*FAKE, '--summary')!r}\n"
    "SUITES['some'] = (Row('First', 'sp_cropping'), Row('Second', 'llava15'))\n"
    "sys.exit(ablate.main(sys.argv))"
  )
  command = [sys.executable, "-c", code, "--suite=some", "--seeds=2", f"--workdir={folder / 'out'}"]
  process = subprocess.Popen(
    command, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, stderr=subprocess.PIPE, text=True
  )
  limit = time.monotonic() + 60
  while not (folder / "waiting").exists() and process.poll() is None and time.monotonic() < limit:
    time.sleep(0.02)
  assert run(folder) == 2 and "another ablation is under way" in capsys.readouterr().err
  process.send_signal(signal.SIGTERM)
  _, err = process.communicate(timeout=60)
  assert process.returncode == 128 + signal.SIGTERM and "Second, seed 0: stopped; the same command continues" in err
  behave(folder)
  trained(folder)
  assert run(folder) == 0
  assert trained(folder) == ["second-last/seed-0", "first/seed-1", "second-last/seed-1"]


@pytest.mark.long
def test_a_real_run_with_a_vdim(tmp_path, monkeypatch):
  steps = {"vdim.steps": 2, "pretrain.steps": 2, "finetune.steps": 6, "evaluation.blank": False}
  rows = {"vdim.batch_size": 8, "finetune.batch_size": 8}  # a share for each of the tests' devices
  monkeypatch.setitem(SUITES, "tiny", (Row("Few steps", "uhd_v2", steps | rows),))
  monkeypatch.chdir(REPOSITORY)
  monkeypatch.setattr(signal, "signal", lambda *arguments: None)
  assert ablate.main(["ablate", "--suite=tiny", "--seeds=1", f"--workdir={tmp_path}"]) == 0
  (row,) = json.loads((tmp_path / "table.json").read_text())["rows"]
  assert row["questions"] == 1000 and 0 <= row["scores"]["eval/exact_match"]["mean"] <= 1
  # Of the recipe: 4 x 4 tokens of each of four slices and of the whole picture.
  assert row["visual_tokens"] == 80 and row["seconds_a_step"]["mean"] > 0
  trained, taken = (tmp_path / name / "seed-0" / "vdim" / "vdim.safetensors" for name in ("stage_vdim", "few-steps"))
  trained, taken = load_file(trained), load_file(taken)
  assert trained and trained.keys() == taken.keys()
  for name, array in trained.items():
    np.testing.assert_array_equal(taken[name], array)
