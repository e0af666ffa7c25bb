"""Compare what the papers compare: python -m mllm_jax.ablate --suite=sp_dfi --workdir=runs/ablate/sp_dfi

Trains the rows of a suite on the demo's digits, one after another, with the same data, questions, seeds and, where the
recipes allow, steps and batches; the tables say what is not the same. After each run it writes WORKDIR/table.md,
table.json and table.html. Started again, it takes the runs that are done and continues the one that was interrupted;
what another suite has trained already, in its folder beside this one, is taken too. A run that fails is named, and the
next begins. Exit status: 0 done, 1 a run failed, 2 something to put right first,
128 + n stopped by signal n.
"""

import argparse
import fcntl
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from mllm_jax.ablation import plan as plan_lib
from mllm_jax.ablation import tables
from mllm_jax.ablation.plan import Run
from mllm_jax.command_line import Parser
from mllm_jax.config import ConfigError
from mllm_jax.run_control import write_json
from mllm_jax.suites import SUITES

TRAIN = (sys.executable, "-m", "mllm_jax.train")
COUNT = (sys.executable, "-m", "mllm_jax.compile", "--summary")


class Runner:
  """Runs commands one after another, and passes SIGTERM and Ctrl-C on to the one under way, which saves and ends.

  lock: a file that is locked as long as this process or such a command lives.
  """

  def __init__(self, lock):
    self.signal, self.process, self.lock = 0, None, lock
    for number in (signal.SIGTERM, signal.SIGINT):
      signal.signal(number, self._pass_on)

  def _pass_on(self, number, frame):
    self.signal = number
    if self.process is not None:
      self.process.send_signal(number)

  def __call__(self, command: Sequence[str]) -> int:
    """Its exit status, as a shell has it."""
    if self.signal:
      return 128 + self.signal
    # In a session of its own, a terminal's Ctrl-C reaches it only from here, and once.
    self.process = subprocess.Popen(command, start_new_session=True, pass_fds=(self.lock.fileno(),))
    if self.signal:
      self.process.send_signal(self.signal)  # it came while that was started
    status = self.process.wait()
    return status if status >= 0 else 128 - status


def train(run: Run, runner: Runner) -> int:
  """Trains what is not trained yet of a run, counts what it costs, and writes down that it is done."""
  began = time.time()
  run.folder.mkdir(parents=True, exist_ok=True)
  status = runner([*TRAIN, *run.arguments])
  if status == 0 and not run.trains_vdim:
    status = runner([*COUNT, *run.options, f"--out={run.folder / plan_lib.SUMMARY}"])
  if status == 0:
    content = {"config": plan_lib.as_json(run.config), "seconds": time.time() - began}
    write_json(run.folder / plan_lib.FINISHED, content)
  return status


def ablate(suite: str, seeds: int, workdir: Path, only: Sequence[str], kinds: bool) -> int:
  rows = plan_lib.rows_of(suite, only)
  every = plan_lib.plan(suite, seeds, workdir)
  runs = plan_lib.chosen(every, [row.label for row in rows])
  try:
    workdir.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise ConfigError(f"--workdir={workdir}: {error.strerror}; name a folder that can be made") from error
  with open(workdir / ".lock", "w") as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise ConfigError(f"{workdir}: another ablation is under way there, or a run that one left") from error
    runner, failed = Runner(lock), []
    for number, run in enumerate(runs, start=1):
      name = f"{run.label}, seed {run.seed}"
      if run.finished():
        print(f"{number} of {len(runs)}: {name} is done already, in {run.folder}", flush=True)
        continue
      if run.vdim in failed:
        print(f"{number} of {len(runs)}: {name} has no VDIM", flush=True)
        failed.append(run)
        continue
      print(f"\n==== {number} of {len(runs)}: {name}, in {run.folder} ====", flush=True)
      status = train(run, runner)
      if runner.signal:
        print(f"{name}: stopped; the same command continues", file=sys.stderr, flush=True)
        return 128 + runner.signal
      if status:
        failed.append(run)
        print(f"error: {name} ended with status {status}; the same command tries it again", file=sys.stderr, flush=True)
      tables.write(suite, workdir, every, failed, kinds)
      print(state(runs, failed), flush=True)
    print("\n" + tables.write(suite, workdir, every, failed, kinds) + f"\n{workdir / 'table.html'}", flush=True)
  for run in failed:
    print(f"error: failed: {run.label}, seed {run.seed}", file=sys.stderr)
  return 1 if failed else 0


def state(runs: Sequence[Run], failed: Sequence[Run]) -> str:
  """How many runs are done, and how long the rest takes if each takes as long as the median of its like: of rows, or of
  VDIM's stages, which are short."""
  left = [run for run in runs if not run.finished() and run not in failed]
  lasted = {False: [], True: []}
  for run in runs:
    if content := run.finished():
      lasted[run.trains_vdim].append(content["seconds"])
  line = f"---- {len(runs) - len(left) - len(failed)} of {len(runs)} runs done"
  line += f", {len(failed)} failed" if failed else ""
  if left and lasted[False]:
    seconds = sum(statistics.median(lasted[run.trains_vdim] or [0]) for run in left)
    line += f", about {seconds / 60:.0f} minutes left"
  return line + " ----"


def listing() -> str:
  """All suites with their rows."""
  lines = []
  for suite, rows in SUITES.items():
    lines.append(suite)
    for row in rows:
      fields = " ".join(f"{name}={value}" for name, value in (row.overrides | row.demo).items())
      lines.append(f"  {row.label:28s} {row.recipe:24s} {fields}".rstrip())
  return "\n".join(lines)


def arguments() -> argparse.ArgumentParser:
  parser = Parser(prog="python -m mllm_jax.ablate", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument("--suite", default="", help=f"one of {', '.join(SUITES)}")
  parser.add_argument("--seeds", type=int, default=3, help="runs of each row, with seeds 0, 1, ... (default: 3)")
  parser.add_argument("--workdir", default="", help="folder for runs and tables (default: runs/ablate/SUITE)")
  parser.add_argument("--only", action="append", default=[], metavar="LABEL", help="train this row; may come again")
  parser.add_argument("--kinds", action="store_true", help="table.md has the scores by kind of question too")
  parser.add_argument(
    "--list", action="store_true", help="print the suites and their rows, with what is set on the demo"
  )
  return parser


def main(argv: list[str]) -> int:
  args = arguments().parse_args(argv[1:])
  try:
    if args.list:
      print(listing())
      return 0
    if not args.suite:
      raise ConfigError(f"which suite? --suite=NAME with one of {', '.join(SUITES)} (--list shows their rows)")
    if args.seeds < 1:
      raise ConfigError(f"--seeds={args.seeds} must be 1 or more")
    return ablate(args.suite, args.seeds, Path(args.workdir or f"runs/ablate/{args.suite}"), args.only, args.kinds)
  except ConfigError as error:
    print(f"error: {error}", file=sys.stderr, flush=True)
    return 2


if __name__ == "__main__":
  sys.exit(main(sys.argv))
