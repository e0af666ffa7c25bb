"""The command `python -m mllm_jax.compile`: what it prints and writes, and its exit status."""

import dataclasses
import json
from pathlib import Path

import pytest

from mllm_jax import compile as command
from mllm_jax.compilation import report, search, topologies
from mllm_jax.compilation.hlo import Cost
from mllm_jax.compilation.roofline import Roofline
from mllm_jax.config import Config, ConfigError

DEMO = f"--config={Path(__file__).parents[2] / 'configs' / 'llava15.py'}:demo"


@pytest.mark.parametrize(
  "name, chips, shape",
  [
    ("v4-32", 16, (2, 2, 4)),
    ("v5p-32", 16, (2, 2, 4)),
    ("v5p-64", 32, (2, 4, 4)),
    ("v5e-16", 16, (4, 4)),
    ("v6e-16", 16, (4, 4)),
    ("v5litepod-256", 256, (16, 16)),
    ("v5p-8", 4, (2, 2, 1)),
    ("cpu-8", 8, (8,)),
  ],
)
def test_cloud_names_count_cores_or_chips(name, chips, shape):
  topology = topologies.parse(name)
  assert (topology.chips, topology.shape) == (chips, shape)
  if name != "cpu-8":
    assert topologies.parse(name, slices=2).chips == 2 * chips


@pytest.mark.parametrize("name, words", [("v5e-24", "v5e-16, v5e-32"), ("v9-8", "v4-32, v5e-16"), ("cpu-0", "cpu-8")])
def test_an_unknown_topology_lists_the_known(name, words):
  with pytest.raises(ConfigError, match=words):
    topologies.parse(name)


@pytest.mark.parametrize(
  "options, words",
  [
    ([DEMO, "--topology=v5e-17"], "--topology=v5e-17 is unknown; known: v5e-1, v5e-4, v5e-8, v5e-16"),
    ([DEMO, "--topology=cpu-8", "--stage=vdim"], "it has pretrain, finetune"),
    ([DEMO, "--topology=cpu-8", "--slices=2"], "is one machine"),
    ([DEMO, "--topology=cpu-8", "--config.model.rematt=full"], "there is no field 'rematt'"),
    ([DEMO, "--topology=cpu-8", "--config.pretrain.batch_size=6"], "use a multiple of 8"),
    ([DEMO, "--topology=cpu-8", "--colour=red"], "'--colour=red' is no option"),
    ([DEMO, "--topology=cpu-8", "--config.mesh.fsdp=3"], "does not make up the 8 devices"),
    ([DEMO, "--topology=cpu-8", "--config.model.llm=weights/nobody"], "weights/nobody"),
  ],
)
def test_what_to_put_right_ends_with_status_2(options, words, capsys):
  assert command.main(["compile", *options]) == 2
  assert words in capsys.readouterr().err


def test_a_stage_for_eight_cpu_devices(tmp_path, capsys, monkeypatch):
  out = tmp_path / "out.json"
  options = [DEMO, "--topology=cpu-8", "--stage=pretrain", f"--out={out}"]
  assert command.main(["compile", *options]) == 0
  printed = capsys.readouterr().out
  for words in ("pretrain on cpu-8: 8 chips (data 1 x fsdp 8 x tensor 1)", "remat none", "all-gather", "(x 1."):
    assert words in printed
  content = json.loads(out.read_text())
  (stage,) = content["stages"]
  assert content["name"] == "llava15-demo" and stage["fits"] and stage["stage"] == "pretrain"
  # The logits, much of so small a model, are made again in the backward pass.
  assert 1 <= stage["executed_over_model"] < 1.3
  assert stage["memory"]["peak"] == sum(stage["memory"][part] for part in ("arguments", "temporaries", "code"))
  assert sum(c["sent"] for c in stage["cost"]["collectives"]) > 0
  # Rows stay split: only gradients are summed over devices. A micro-batch's activations are 2 MiB.
  assert all(c["bytes"] < 2**18 for c in stage["cost"]["collectives"] if c["kind"] == "all-reduce")

  # The same on chips of 1 MiB.
  parts = {part: stage["memory"][part] for part in ("arguments", "temporaries", "code")}
  memory, eight = report.Memory(**parts, limit=2**20), topologies.parse("cpu-8")
  given = report.StageReport("pretrain", eight, stage["settings"], memory, 1e9, 16, None, None, 1.0, 1.0, 2**30)
  monkeypatch.setattr(report, "compile_stage", lambda *arguments: given)
  assert command.main(["compile", *options]) == 1
  captured = capsys.readouterr()
  assert f"pretrain does not fit cpu-8: {report.gib(stage['memory']['peak'] - 2**20)} a chip too much" in captured.err
  assert not json.loads(out.read_text())["stages"][0]["fits"]


@pytest.mark.parametrize(
  "message, arguments, temporaries, over",
  [
    (
      "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (20.49G) exceeds "
      "available HBM (15.75G).",
      2.0,
      20.49,
      6.74,
    ),
    ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 18.00G of 15.75G hbm.", 2.0, 16.0, 2.25),
  ],
)
def test_by_how_much_it_is_too_large_comes_from_the_compiler(message, arguments, temporaries, over):
  memory = report.too_large(message, arguments * 2**30)
  assert (memory.temporaries / 2**30, memory.over / 2**30) == pytest.approx((temporaries, over))
  assert report.too_large("INTERNAL: something else", 0) is None


def test_the_search_keeps_the_fastest_that_fits(monkeypatch):
  """A made-up compiler: micro-batches halve the temporaries, recomputation takes from them and costs time."""
  topology = topologies.parse("v5e-16")
  tried = []

  def compile_stage(config, name, topology, devices):
    mesh, remat, micro = config.mesh, config.model.remat, getattr(config, name).accumulation
    tried.append((mesh.data, mesh.tensor, remat, micro))
    if micro > 4:
      raise ConfigError("cannot be cut")
    peak = {"none": 100, "named": 50, "full": 20}[remat] * 2**30 / micro * mesh.data
    seconds = {"none": 1.0, "named": 1.1, "full": 1.3}[remat] * (1 + 0.02 * micro) * mesh.tensor
    settings = {"mesh": {"data": mesh.data, "fsdp": 16 // mesh.data // mesh.tensor, "tensor": mesh.tensor}}
    settings |= {"remat": remat, "accumulation": micro, "mesh_config": dataclasses.asdict(mesh)}
    line = Roofline(seconds, 0, 0, 0, seconds, "compute", 0.5)
    memory = report.Memory(0, peak, 0, topology.chip.memory)
    return report.StageReport(name, topology, settings, memory, 1.0, 8, Cost(1.0, 1.0, (), {}), line, 0, 0, 0)

  monkeypatch.setattr(search, "compile_stage", compile_stage)
  rows = []
  best = search.fit(Config(), "finetune", topology, [], say=rows.append)
  # named in four fits (12.5 of 16 GiB), and is faster than full in two.
  assert (best.settings["remat"], best.settings["accumulation"], best.settings["mesh"]["fsdp"]) == ("named", 4, 16)
  assert tried[:4] == [(1, 1, "none", n) for n in (1, 2, 4, 8)]
  assert len(rows) == sum(micro <= 4 for *_, micro in tried) and "too much" in rows[0]
  assert search.overrides(best) == (
    "--config.mesh.data=1 --config.mesh.fsdp=-1 --config.mesh.tensor=1 --config.model.remat=named "
    "--config.finetune.accumulation=4"
  )


@pytest.mark.long
def test_for_a_tpu(capsys):
  pytest.importorskip("libtpu")
  assert command.main(["compile", DEMO, "--topology=v5e-4", "--stage=pretrain"]) == 0
  assert "MFU" in capsys.readouterr().out
