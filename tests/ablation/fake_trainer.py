"""Stands for the trainer and the counter of the ablations' tests: writes the files that they write, in no time.

FOLDER/behaviour.json says what exact match a recipe has, by its name, and what else becomes of it: "fail", or "wait",
which stops at a signal only. Each command line is appended to FOLDER/commands.jsonl.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

here = Path(os.environ["FAKE_TRAINER"])
options = dict(argument.removeprefix("--").partition("=")[::2] for argument in sys.argv[1:])
with open(here / "commands.jsonl", "a") as file:
  file.write(json.dumps(sys.argv[1:]) + "\n")

if "summary" in options:
  content = {"parameters": {"projector": {"count": 1_250_000}}, "visual_tokens": 68, "flops": {"total": 2.4e8}}
  Path(options["out"]).write_text(json.dumps(content))
  sys.exit()

workdir, seed = Path(options["workdir"]), int(options["config.seed"])
name = options["config.stages"] if options.get("config.stages") == "vdim" else Path(options["config"]).stem
behaviour = json.loads((here / "behaviour.json").read_text()).get(name)
if behaviour == "fail":
  sys.exit(3)
if behaviour == "wait":
  signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
  (here / "waiting").touch()
  time.sleep(60)
if name == "vdim":
  (workdir / "vdim").mkdir(exist_ok=True)
  (workdir / "vdim" / "vdim.safetensors").touch()
  sys.exit()
# The first interval is slow, as it is where the step is compiled.
rows = [
  {"stage": "pretrain", "step": 5, "loss": 3.0, "tokens": 7, "tokens_per_s": 7.0},
  {"stage": "finetune", "step": 5, "loss": 2.0, "tokens": 300, "tokens_per_s": 100.0},
  {"stage": "finetune", "step": 10, "loss": 1.0, "tokens": 100, "tokens_per_s": 1000.0},
  {"stage": "finetune", "step": 15, "loss": 0.5, "tokens": 200, "tokens_per_s": 800.0},
  {"stage": "finetune", "step": 15, "eval/exact_match": behaviour[seed], "eval/exact_match/count": 0.5 + 0.25 * seed}
  | {"eval/blank": 0.25, "eval/blank/count": 0.125},
]
(workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
(workdir / "finetune").mkdir(exist_ok=True)
(workdir / "finetune" / "evaluation.json").write_text(json.dumps([{}] * 100))
