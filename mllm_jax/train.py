"""Train a LLaVA-type model: python -m mllm_jax.train --config=configs/sp_cropping.py --workdir=runs/sp

Everything that a run does stands here, in order. `--config=FILE:demo` is the small version that needs no download, and
`--config.a.b=value` overrides a field of the configuration (mllm_jax/config.py says what they mean). Started again with
the same workdir, a run continues where it was. Exit status: 0 done, 1 stopped by a problem in the run, 2 something to
put right first, 128 + n stopped by signal n.
"""

import dataclasses
import errno
import json
import os
import sys
import time
from pathlib import Path

from mllm_jax import preflight
from mllm_jax.command_line import help_text, parse
from mllm_jax.config import Config, ConfigError, StageConfig, to_dict
from mllm_jax.continuation import check_identity, model_identity, pretrained_projector, recipe_identity
from mllm_jax.data.records import DataError
from mllm_jax.places import PlaceError
from mllm_jax.run_control import Stop, Stopped, say, write_json


def run(config: Config, workdir: Path, recipe: str) -> None:
  """All stages of a run, their evaluations, and the report. `recipe` is the configuration's file."""
  # ---- before anything heavy: are the files there? -------------------------------------------------------------------
  names = preflight.stage_names(config)
  config = preflight.in_workdir(config, str(workdir))
  missing = preflight.missing_files(config)
  if missing:
    raise ConfigError(preflight.explain_missing(missing, recipe))

  import jax

  from mllm_jax import report, sharding
  from mllm_jax.training.metrics import MetricsLog

  started = time.time()
  stop = Stop()

  # ---- devices -------------------------------------------------------------------------------------------------------
  mesh = sharding.make_mesh(config.mesh)
  for name in names:
    preflight.check_stage(name, getattr(config, name), sharding.batch_shards(mesh), jax.process_count())
  shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
  kind = mesh.devices.flat[0].platform
  say(f"{config.name}: {' then '.join(names)} on {mesh.size} {kind} device(s) ({shape}) in {workdir}")

  # ---- workdir and data ----------------------------------------------------------------------------------------------
  workdir.mkdir(parents=True, exist_ok=True)
  if config.demo:
    from mllm_jax.demo.write import Sizes
    from mllm_jax.demo.write import write as write_demo

    say(f"writing the digits data set to {workdir / 'data'}")
    write_demo(workdir / "data", seed=0, sizes=Sizes(shapes=config.demo_shapes))

  # ---- the stages ----------------------------------------------------------------------------------------------------
  log = MetricsLog(workdir, wandb_project=config.wandb_project, name=config.name, config=to_dict(config))
  try:
    for name in names:
      if name == "vdim":
        from mllm_jax.train_vdim import train_vdim

        train_vdim(config, workdir, mesh, log, stop)
      else:
        train_stage(config, name, workdir, mesh, log, stop)
      write_report(config, name, workdir)
      if stop.signal:
        raise Stopped(128 + stop.signal, "stopped; the same command continues")
  finally:
    log.close()

  # ---- the finished model, which needs no other file -----------------------------------------------------------------
  if config.save_model and names != ["vdim"]:
    save_model(workdir)
  say(summary(report.read_log(str(workdir / "metrics.jsonl")), workdir, time.time() - started))


def train_stage(config: Config, name: str, workdir: Path, mesh, log, stop: Stop) -> None:
  """One stage from its last checkpoint, or its beginning, to its evaluation."""
  from mllm_jax import build, flops, parameters, train_vdim
  from mllm_jax.data.chat import copy_tokenizer
  from mllm_jax.models.mllm import abstract
  from mllm_jax.training import optimizer as optimizer_lib
  from mllm_jax.training import step as step_lib
  from mllm_jax.training.checkpoint import Checkpoints
  from mllm_jax.training.loop import NotFinite, Reporter, run_steps
  from mllm_jax.weights.fingerprint import fingerprint
  from mllm_jax.weights.folder import TOKENIZER, versions
  from mllm_jax.weights.io import open_weights

  stage: StageConfig = getattr(config, name)
  folder = workdir / name
  say(f"\n== {name} ==")

  # ---- data ----------------------------------------------------------------------------------------------------------
  model_config = build.architecture(config.model, stage.lora, packed=stage.data.batching == "pack")
  tokenizer = build.tokenizer_folder(config.model.llm)
  processor = build.make_processor(model_config, tokenizer, stage.data)
  batches = load_data(config, stage, processor, folder)

  # ---- what is trained, and from where it goes on --------------------------------------------------------------------
  graphdef, shapes = parameters.flatten(abstract(model_config))
  rates = parameters.match(stage.parameters, list(shapes), f"{name}.parameters")
  vdim = train_vdim.settle_vdim(config, workdir, model_config, shapes, mesh)
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
  checkpoints = Checkpoints(folder / "checkpoints", config.keep_checkpoints)
  start = checkpoints.latest()
  if start is not None:
    check_identity(checkpoints.meta(start), identity, folder)
  given = pretrained_projector(config, workdir, identity, shapes, mesh) if name == "finetune" and start is None else {}
  if vdim is not None:
    given = train_vdim.placed_vdim(vdim, config.model, shapes, rates, mesh) | given

  # ---- parameters, optimizer, step -----------------------------------------------------------------------------------
  flat = build.load_parameters(model_config, config.model, rates, config.seed, mesh, given)
  say(parameters.table(flat, rates))
  trainable = {path: value for path, value in flat.items() if rates[path]}
  frozen = {path: value for path, value in flat.items() if not rates[path]}
  optimizer = optimizer_lib.make(stage, trainable)
  state = step_lib.initial_state(optimizer, trainable, mesh)
  if start is not None:
    state = checkpoints.restore(start, state)
  trained_rates = {path: rates[path] for path in trainable}
  count_flops = flops.counter(model_config, shapes, rates)
  del flat, trainable, given
  make_step = step_lib.BucketedStep if stage.data.batching == "group" else step_lib.make_step
  train_step = make_step(
    graphdef,
    stage,
    trained_rates,
    batches.steps,
    config.seed,
    mesh,
    optimizer,
    step_lib.state_shardings(optimizer, state.trainable, mesh),
  )
  start = start or 0
  log.forget_after(name, start)
  write_json(workdir / "config.json", to_dict(config))  # not before all checks: a mistyped command must not spoil a run
  copy_tokenizer(tokenizer, workdir / TOKENIZER)
  say(
    f"{batches.samples:,} samples, {batches.steps:,} steps of {stage.batch_size}"
    + (" packed rows" if stage.data.batching == "pack" else "")
    + (f" in {stage.accumulation} micro-batches" if stage.accumulation > 1 else "")
    + (f", continuing after step {start:,}" if start else "")
  )

  # ---- the loop ------------------------------------------------------------------------------------------------------
  def save(state) -> None:
    checkpoints.save(state, identity | {"config": to_dict(config), "versions": versions()})

  try:
    state = run_steps(
      train_step,
      state,
      frozen,
      batches.iterate(start),
      steps=batches.steps,
      mesh=mesh,
      save=save,
      save_every=config.checkpoint_every,
      stopped=lambda: bool(stop.signal),
      reporter=Reporter(config, name, stage, folder, log, start, batches.steps, count_flops),
    )
    save(state)
  except (DataError, NotFinite) as error:
    raise Stopped(1, str(error)) from error
  finally:
    checkpoints.wait()
    checkpoints.close()
  done = int(state.step)
  if done < batches.steps:
    raise Stopped(128 + stop.signal, f"{name}: saved after step {done} of {batches.steps}; the same command continues")

  # ---- evaluation ----------------------------------------------------------------------------------------------------
  if config.evaluation.path and not (folder / "evaluation.json").is_file():
    model = parameters.unflatten(graphdef, {**frozen, **state.trainable})
    evaluate(config, name, model, processor, mesh, log, done, folder)


def save_model(workdir: Path) -> None:
  """Writes the trained model with its frozen halves and its tokenizer to WORKDIR/model, unless it is there already."""
  import jax

  from mllm_jax import build
  from mllm_jax.weights import folder

  target = workdir / build.FINISHED_MODEL
  if jax.process_count() > 1:
    say(f"several processes do not write {target}; make it with python -m mllm_jax.convert import --model={workdir}")
    return
  if build.finished(str(workdir)):
    return
  try:
    stored, _ = build.open_run(str(workdir))
    folder.write(target, stored.manifest, stored.tensors, stored.tokenizer, overwrite=True)
  except (PlaceError, OSError) as error:
    raise Stopped(
      1, f"trained and saved, but {target} cannot be written: {error}; the same command tries only that again"
    ) from error


def load_data(config: Config, stage: StageConfig, processor, folder: Path):
  """The batches of a stage, after a look at every record. Raises DataError with all that is wrong.

  Where the batching needs to know how long the samples are, that is kept in `folder` for when the run is continued.
  """
  import jax
  from tqdm import tqdm

  from mllm_jax.data import lengths
  from mllm_jax.data.bad_samples import MINIMUM, BadSamples
  from mllm_jax.data.pipeline import TrainingBatches
  from mllm_jax.data.sources.mix import open_data

  records = open_data(stage.data, config.seed)
  check_records(stage, records)
  table = None
  if stage.data.batching != "fixed":
    with tqdm(
      total=len(records), desc="lengths", unit="sample", disable=jax.process_index() > 0, dynamic_ncols=True
    ) as bar:
      table = lengths.measured(
        folder / "lengths.npz", records, processor, bar.update, stage.data.on_bad_sample, config.seed
      )
      bar.update(len(records) - bar.n)
  return TrainingBatches(
    records,
    processor,
    batch_size=stage.batch_size,
    accumulation=stage.accumulation,
    epochs=stage.epochs,
    steps=stage.steps,
    seed=config.seed,
    batching=stage.data.batching,
    buckets=stage.data.buckets,
    row_length=stage.data.row_length,
    lengths=table,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    threads=config.loader_threads,
    workers=config.loader_workers,
    on_bad_sample=stage.data.on_bad_sample,
    bad_samples=BadSamples(stage.data.max_bad_share, folder, minimum=min(MINIMUM, len(records))),
  )


def check_records(stage: StageConfig, records) -> None:
  """Looks at every record, images not decoded. Raises DataError where the stage does not put up with what is found."""
  from mllm_jax.data.bad_samples import check_share
  from mllm_jax.data.records import check

  problems = check(records, max_images=stage.data.max_images, processes=os.cpu_count() or 1)
  if not problems:
    return
  bad = len({sample for sample, _ in problems})
  more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
  lines = "\n  " + "\n  ".join(line for _, line in problems[:10]) + more
  if stage.data.on_bad_sample == "error":
    raise DataError(f"{bad} of {len(records)} samples cannot be used:{lines}")
  check_share(bad, len(records), stage.data.max_bad_share)
  done = {"skip": "are skipped", "replace": "are replaced by others"}[stage.data.on_bad_sample]
  say(f"{bad} of {len(records):,} samples cannot be used and {done}:{lines}")


def evaluate(config: Config, name: str, model, processor, mesh, log, step: int, folder: Path) -> None:
  """Asks the held-out questions and keeps every answer."""
  import copy

  from tqdm import tqdm

  from mllm_jax.data.records import Records
  from mllm_jax.inference.engine import Engine
  from mllm_jax.inference.evaluate import exact_match

  asker = copy.copy(processor)
  asker.template = config.finetune.data.template  # stage 1 has no questions of its own
  records = Records.load(config.evaluation.path, config.evaluation.image_folder)
  with tqdm(desc=f"{name}, held-out questions", unit="question", dynamic_ncols=True) as bar:

    def progress(answered: int, total: int) -> None:
      bar.total = total
      bar.update(answered - bar.n)

    result = exact_match(
      Engine(model, asker.end_id, mesh=mesh),
      asker,
      records,
      batch_size=config.evaluation.batch_size,
      max_new_tokens=config.evaluation.max_new_tokens,
      blank=config.evaluation.blank,
      progress=progress,
    )
  log.write({"stage": name, "step": step, **result.metrics()})
  write_json(folder / "evaluation.json", [dataclasses.asdict(prediction) for prediction in result.predictions])
  say(
    f"{name}: held-out exact match {result.overall.exact_match:.1%}"
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
    lines.append(f'  ask it       python -m mllm_jax.generate --model={workdir} --image=FILE --prompt="..."')
  return "\n".join(lines)


def write_report(config: Config, name: str, workdir: Path) -> None:
  """The page about everything so far, with the answers of the stage `name`."""
  from mllm_jax import report

  rows = report.read_log(str(workdir / "metrics.jsonl"))
  predictions = read_predictions(workdir / name / "evaluation.json")
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
  expected = (ConfigError, DataError, PlaceError)  # what a user can put right before the run
  try:
    run(*parse(argv))
  except expected as error:
    return fail(2, error)
  except Stopped as error:
    return fail(error.status, error)
  except OSError as error:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
      raise
    return fail(
      1,
      f"{error.filename or ''}: {error.strerror}; what was saved before is still there. Make room, or use a --workdir "
      "that can be written, and start the same command again",
    )
  except RuntimeError as error:
    from mllm_jax.training.checkpoint import CheckpointError  # imports jax and orbax, which are there by now

    if not isinstance(error, CheckpointError):
      raise
    return fail(1, error)
  return 0


def fail(status: int, error: Exception | str) -> int:
  print(f"error: {error}", file=sys.stderr, flush=True)
  return status


if __name__ == "__main__":
  sys.exit(main(sys.argv))
