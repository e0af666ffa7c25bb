"""Train a LLaVA-type model: python -m mllm_jax.train --config=configs/sp_cropping.py --workdir=runs/sp

Everything that a run does stands here, in order. `--config=FILE:demo` is the small version that needs no download, and
`--config.a.b=value` overrides a field of the configuration (mllm_jax/config.py says what they mean). Started again with
the same workdir, a run continues where it was. Exit status: 0 done, 1 stopped by a problem in the run, 2 something to
put right first, 128 + n stopped by signal n.

On several hosts the same command is started on each, with the workdir on a file system that they share: on Cloud TPU
and under Slurm's srun they find each other, elsewhere by JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and
JAX_PROCESS_ID. Only process 0 prints and writes what is not a checkpoint's; a signal to one of them stops all.
"""

import contextlib
import dataclasses
import json
import os
import shlex
import sys
import time
import traceback
from pathlib import Path
from typing import IO, Any, NamedTuple

from mllm_jax import distributed, preflight
from mllm_jax.command_line import help_text, parse
from mllm_jax.config import Config, ConfigError, ModelConfig, StageConfig, to_dict
from mllm_jax.continuation import model_identity, pretrained_projector, recipe_identity
from mllm_jax.data.records import DataError
from mllm_jax.places import PlaceError
from mllm_jax.run_control import Stop, Stopped, lock, message_of, say, status_of, write_json

EVALUATION = "evaluation.json"  # in the folder of a stage


def run(config: Config, workdir: Path, recipe: str) -> None:
  """All stages of a run, their evaluations, and the report. `recipe` is the configuration's file."""
  # ---- before anything heavy: are the files there? -------------------------------------------------------------------
  names = preflight.stage_names(config)
  preflight.check_run(config)
  config = preflight.in_workdir(config, str(workdir))
  missing = preflight.missing_files(config)
  if missing:
    raise ConfigError(preflight.explain_missing(missing, recipe))

  distributed.start()
  import jax

  from mllm_jax import report, sharding
  from mllm_jax.stage_loop import StageRun
  from mllm_jax.training.metrics import MetricsLog, NoLog

  started = time.time()
  stop = Stop()

  # ---- devices -------------------------------------------------------------------------------------------------------
  if config.mesh.cpu_devices and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    jax.config.update("jax_num_cpu_devices", config.mesh.cpu_devices)
  mesh = sharding.make_mesh(config.mesh)
  shares = sharding.row_share(mesh, jax.process_index())[1]
  for name in names:
    preflight.check_stage(name, getattr(config, name), sharding.batch_shards(mesh), shares)
  shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
  kind = mesh.devices.flat[0].platform
  processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
  say(f"{config.name}: {' then '.join(names)} on {mesh.size} {kind} device(s){processes} ({shape}) in {workdir}")

  # ---- workdir and data ----------------------------------------------------------------------------------------------
  _held = open_workdir(config, workdir)
  prepared = {name: prepare(config, name, workdir, mesh) for name in names if name != "vdim"}
  for name in names[1:]:
    with distributed.agreed(f"{name}, first batch"):
      try_out(prepared[name].batches, getattr(config, name))
  questions = held_out_questions(config, names)

  # ---- the stages ----------------------------------------------------------------------------------------------------
  log = NoLog()
  with distributed.agreed("log"):
    if distributed.is_first():
      log = MetricsLog(workdir, wandb_project=config.wandb_project, name=config.name, config=to_dict(config))
  try:
    for name in names:
      under_way = StageRun(config, name, workdir, mesh, log, stop)
      say(f"\n== {name} ==")
      if name == "vdim":
        from mllm_jax.train_vdim import train_vdim

        train_vdim(under_way)
      else:
        train_stage(under_way, prepared.pop(name), questions)
      with distributed.agreed("report"):
        if distributed.is_first():
          write_report(config, name, workdir)
      stop.signal = distributed.largest(stop.signal)
      if stop.signal:
        raise Stopped(128 + stop.signal, "stopped; the same command continues" if distributed.is_first() else "")
  finally:
    log.close()

  # ---- the finished model, which needs no other file -----------------------------------------------------------------
  with distributed.agreed("model"):
    if config.save_model and names != ["vdim"] and distributed.is_first():
      save_model(workdir)
  if distributed.is_first():
    say(summary(report.read_log(str(workdir / "metrics.jsonl")), workdir, time.time() - started))


def open_workdir(config: Config, workdir: Path) -> IO | None:
  """Makes the workdir, and the demo's data in it. Returns what keeps other runs out as long as it is kept, in the first
  process."""
  with distributed.agreed("workdir"):
    try:
      workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise ConfigError(f"--workdir={workdir}: {error.strerror}; name a folder that can be made") from error
    held = lock(workdir) if distributed.is_first() else None
  distributed.check_shared(workdir)
  with distributed.agreed("demo data"):
    if config.demo and distributed.is_first():
      from mllm_jax.demo.write import Sizes
      from mllm_jax.demo.write import write as write_demo

      say(f"writing the digits data set to {workdir / 'data'}")
      try:
        write_demo(workdir / "data", seed=0, sizes=Sizes(shapes=config.demo_shapes))
      except FileExistsError as error:
        raise ConfigError(f"the demo's data go to WORKDIR/data, and {error}") from error
  return held


class Prepared(NamedTuple):
  """What a stage has before its weights: the model without arrays, its learning rates by path, and its data."""

  model_config: ModelConfig
  graphdef: Any
  shapes: dict
  rates: dict[str, float]
  tokenizer: str
  processor: Any
  batches: Any


def prepare(config: Config, name: str, workdir: Path, mesh) -> Prepared:
  """Looks at a stage's model, table of learning rates, template and every record. Raises ConfigError, WeightsError or
  DataError with what is wrong."""
  from mllm_jax import build, parameters
  from mllm_jax.models.mllm import abstract
  from mllm_jax.processors import make_processor
  from mllm_jax.stage_data import load_data

  stage: StageConfig = getattr(config, name)
  with distributed.agreed(name):
    model_config = build.architecture(config.model, stage.lora, packed=stage.data.batching == "pack")
    graphdef, shapes = parameters.flatten(abstract(model_config))
    rates = parameters.match(stage.parameters, list(shapes), f"{name}.parameters")
    preflight.check_projector(config, workdir, shapes)
    tokenizer = build.tokenizer_folder(config.model.llm)
    processor = make_processor(model_config, tokenizer, stage.data)
  for turn in data_turns(stage):
    with distributed.agreed(f"{name}, data"):
      if distributed.is_first() in turn:
        batches = load_data(config, stage, processor, workdir / name, mesh)
  return Prepared(model_config, graphdef, shapes, rates, tokenizer, processor, batches)


def try_out(batches, stage: StageConfig) -> None:
  """Makes a later stage's first batch and drops it, where a sample that cannot be used would stop the run. Raises
  DataError, as when no place of max_length is left for an answer."""
  if stage.data.on_bad_sample == "error":
    with contextlib.closing(batches.iterate()) as made:
      next(made)


def held_out_questions(config: Config, names: list[str]):
  """The records to ask about after some stage, None where no stage is followed by questions. Raises DataError where
  one of them cannot be asked."""
  from mllm_jax.data.records import Records, check
  from mllm_jax.inference.evaluate import list_questions

  if not config.evaluation.path or not set(config.evaluation.stages.split(",")) & set(names):
    return None
  with distributed.agreed("held-out questions"):
    records = Records.load(config.evaluation.path, config.evaluation.image_folder)
    if distributed.is_first():
      problems = check(records, max_images=sys.maxsize)
      if problems:
        raise DataError(f"evaluation.path: {problems[0][1]}" + f" (and {len(problems) - 1} more)" * (len(problems) > 1))
      list_questions(records)
  return records


def train_stage(run, prepared: Prepared, questions) -> None:
  """One stage, a `stage_loop.StageRun`, from its last checkpoint, or its beginning, to its evaluation."""
  from mllm_jax import build, flops, parameters, train_vdim
  from mllm_jax.data.chat import copy_tokenizer
  from mllm_jax.training import optimizer as optimizer_lib
  from mllm_jax.training import step as step_lib
  from mllm_jax.weights.fingerprint import fingerprint
  from mllm_jax.weights.folder import TOKENIZER
  from mllm_jax.weights.io import open_weights

  config, name, mesh = run.config, run.name, run.mesh
  stage: StageConfig = run.stage
  model_config, graphdef, shapes, rates, tokenizer, processor, batches = prepared

  # ---- what is trained, and from where it goes on --------------------------------------------------------------------
  vdim = train_vdim.settle_vdim(config, run.workdir, model_config, shapes, mesh)
  identity = {
    "stage": name,
    "seed": config.seed,
    "samples": batches.samples,
    "steps": batches.steps,
    "model": model_identity(model_config),
    "recipe": recipe_identity(stage),
    "fingerprints": build.fingerprints(config.model),
  }
  if vdim is not None:
    identity["fingerprints"]["vdim"] = fingerprint(open_weights(vdim))
  start = run.open(identity)
  fresh = name == "finetune" and start is None
  given = pretrained_projector(config, run.workdir, identity, shapes, mesh) if fresh else {}
  if vdim is not None:
    given = train_vdim.placed_vdim(vdim, config.model, shapes, rates, mesh) | given

  # ---- parameters, optimizer, step -----------------------------------------------------------------------------------
  with distributed.agreed(f"{name}, weights"):
    flat = build.load_parameters(model_config, config.model, rates, config.seed, mesh, given)
  say(parameters.table(flat, rates))
  trainable = {path: value for path, value in flat.items() if rates[path]}
  frozen = {path: value for path, value in flat.items() if not rates[path]}
  optimizer = optimizer_lib.make(stage, trainable)
  state = step_lib.initial_state(optimizer, trainable, mesh)
  if start is not None:
    state = run.checkpoints.restore(start, state)
  trained_rates = {path: rates[path] for path in trainable}
  count_flops = flops.counter(model_config, shapes, rates)
  del flat, trainable, given
  make_step = step_lib.BucketedStep if stage.data.batching == "group" else step_lib.make_step
  shardings = step_lib.state_shardings(optimizer, state.trainable, mesh)
  train_step = make_step(graphdef, stage, trained_rates, batches.steps, config.seed, mesh, optimizer, shardings)

  # ---- the loop ------------------------------------------------------------------------------------------------------
  run.begin(batches, "samples", f"{stage.batch_size}" + (" packed rows" if stage.data.batching == "pack" else ""))
  with distributed.agreed("tokenizer"):
    if distributed.is_first():
      copy_tokenizer(tokenizer, run.workdir / TOKENIZER)
  state = run.train(train_step, state, frozen, batches, count_flops)

  # ---- evaluation ----------------------------------------------------------------------------------------------------
  asked = config.evaluation.path and name in config.evaluation.stages.split(",")
  if asked and not distributed.first_says((run.folder / EVALUATION).is_file()):
    model = parameters.unflatten(graphdef, {**frozen, **state.trainable})
    evaluate(run, model, processor, questions, int(state.step))


def data_turns(stage: StageConfig) -> list[tuple[bool, ...]]:
  """Who looks at the data when, by whether a process is the first. What that measures and keeps, the others read."""
  return [(True, False)] if stage.data.batching == "fixed" else [(True,), (False,)]


def save_model(workdir: Path) -> None:
  """Writes the trained model with its frozen halves and its tokenizer to WORKDIR/model, unless it is there already.

  One process does it, reading array by array from the checkpoint and from the frozen halves' files.
  """
  from mllm_jax import build
  from mllm_jax.weights import folder

  target = workdir / build.FINISHED_MODEL
  if build.finished(str(workdir)):
    return
  try:
    stored, _ = build.open_run(str(workdir))
    folder.write(target, stored.manifest, stored.tensors, stored.tokenizer, overwrite=True)
  except (PlaceError, OSError) as error:
    raise Stopped(
      1, f"trained and saved, but {target} cannot be written: {error}; the same command tries only that again"
    ) from error


def evaluate(run, model, processor, records, step: int) -> None:
  """Asks the held-out questions and keeps every answer. All processes ask the same ones, each on its devices."""
  import copy

  from tqdm import tqdm

  from mllm_jax.inference.engine import Engine
  from mllm_jax.inference.evaluate import exact_match

  config = run.config.evaluation
  asker = copy.copy(processor)
  asker.template = run.config.finetune.data.template  # stage 1 has no questions of its own
  with tqdm(
    desc=f"{run.name}, held-out questions", unit="question", disable=not distributed.is_first(), dynamic_ncols=True
  ) as bar:

    def progress(answered: int, total: int) -> None:
      bar.total = total
      bar.update(answered - bar.n)

    result = exact_match(
      Engine(model, asker, rows=config.batch_size, mesh=run.mesh),
      asker,
      records,
      max_new_tokens=config.max_new_tokens,
      blank=config.blank,
      progress=progress,
    )
  with distributed.agreed("evaluation"):
    if distributed.is_first():
      run.log.write({"stage": run.name, "step": step, **result.metrics()})
      write_json(run.folder / EVALUATION, [dataclasses.asdict(prediction) for prediction in result.predictions])
  say(
    f"{run.name}: held-out exact match {result.overall.exact_match:.1%}"
    + (f", with the pictures blanked {result.overall.blank:.1%}" if result.overall.blank is not None else "")
  )


def summary(rows: list[dict], workdir: Path, seconds: float) -> str:
  """What came of the run, in a few lines."""
  lines = ["", f"done in {seconds / 60:.1f} minutes"]
  for name in dict.fromkeys(row["stage"] for row in rows):
    losses = [row["loss"] for row in rows if row["stage"] == name and "loss" in row]
    if losses:
      lines.append(f"  {name}: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    for row in rows:
      if row["stage"] == name and "eval/exact_match" in row:
        for key, value in row.items():
          if key.startswith("eval/exact_match"):
            kind, blank = key.removeprefix("eval/exact_match").lstrip("/"), row.get(key.replace("exact_match", "blank"))
            lines.append(
              f"    {kind or 'held-out exact match':28s} {value:7.1%}"
              + (f"  (blanked {blank:.1%})" if blank is not None else "")
            )
  lines.append(f"  report       {workdir / 'report.html'}")
  if any(row["stage"] != "vdim" for row in rows):
    model = shlex.quote(str(workdir))
    lines.append(f'  ask it       python -m mllm_jax.generate --model={model} --image=FILE --prompt="..."')
  return "\n".join(lines)


def write_report(config: Config, name: str, workdir: Path) -> None:
  """The page about everything so far, with the answers of the stage `name`."""
  from mllm_jax import report

  rows = report.read_log(str(workdir / "metrics.jsonl"))
  predictions = read_predictions(workdir / name / EVALUATION)
  report.write(str(workdir / "report.html"), config=config, log=rows, predictions=predictions)


def read_predictions(path: Path) -> list:
  from mllm_jax.inference.evaluate import Prediction, Question

  if not path.is_file():
    return []
  rows = json.loads(path.read_text(encoding="utf-8"))
  tuples = lambda row: {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
  return [Prediction(**{**row, "question": Question(**tuples(row["question"]))}) for row in rows]


def main(argv: list[str]) -> int:
  if {"--help", "-h", "--helpshort", "--helpfull"} & set(argv):
    print(help_text(__doc__))
    return 0
  try:
    run(*parse(argv))
  except Exception as error:
    status = status_of(error)
    if status:
      message = message_of(error)
      print(f"error: {message}" if message else "", end="\n" if message else "", file=sys.stderr, flush=True)
    else:
      traceback.print_exc()
    distributed.leave(error, status or 1)
    return status or 1
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv))
