"""Train a LLaVA-type model: python -m mllm_jax.train --config=configs/sp_cropping.py --workdir=runs/sp

Everything that a run does stands here, in order. `--config=FILE:demo` is the small version that needs no download, and
`--config.a.b=value` overrides a field of the configuration (mllm_jax/config.py says what they mean). Started again with the same
workdir, a run continues where it was. Exit status: 0 done, 1 stopped by a problem in the run, 2 something to put right first,
128 + n stopped by signal n.
"""

import dataclasses
import errno
import json
import os
import re
import signal
import sys
import time
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from mllm_jax import config as config_lib, preflight
from mllm_jax.config import Config, ConfigError, to_dict
from mllm_jax.data.records import DataError
from mllm_jax.weights.known import WeightsError

CONFIG = config_flags.DEFINE_config_file("config", None, "the recipe: a file of configs/, with :demo behind it for the small one",
                                         lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "folder for checkpoints, logs and the report (default: runs/NAME)")


class Stop:
  """Remembers the first SIGTERM or SIGINT, so that the step under way can end and be saved. A second one interrupts at once."""

  def __init__(self):
    self.signal = 0
    for number in (signal.SIGTERM, signal.SIGINT):
      signal.signal(number, self._remember)

  def _remember(self, number, frame):
    self.signal = number
    say(f"\n{signal.Signals(number).name}: finishing this step and saving; once more to stop at once")
    for each in (signal.SIGTERM, signal.SIGINT):
      signal.signal(each, signal.SIG_DFL)


class Stopped(Exception):
  """The run ends before it is done; `status` is the exit status."""

  def __init__(self, status: int, message: str):
    super().__init__(message)
    self.status = status


def say(*text) -> None:
  """A line for people, from one process only."""
  import jax

  if jax.process_index() == 0:
    print(*text, flush=True)


def run(config: Config, workdir: Path) -> None:
  """All stages of a run, their evaluations, and the report."""
  # ---- before anything heavy: are the files there? ---------------------------------------------------------------------------
  names = preflight.stage_names(config)
  config = preflight.in_workdir(config, str(workdir))
  missing = preflight.missing_files(config)
  if missing:
    raise ConfigError(preflight.explain_missing(missing, config_file()))

  import jax

  from mllm_jax import report, sharding
  from mllm_jax.training.metrics import MetricsLog

  started = time.time()
  stop = Stop()

  # ---- devices ---------------------------------------------------------------------------------------------------------------
  mesh = sharding.make_mesh(config.mesh)
  for name in names:
    preflight.check_stage(name, getattr(config, name), sharding.batch_shards(mesh), jax.process_count())
  shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
  say(f"{config.name}: {' then '.join(names)} on {mesh.size} {mesh.devices.flat[0].platform} device(s) ({shape}) in {workdir}")

  # ---- workdir and data --------------------------------------------------------------------------------------------------------
  workdir.mkdir(parents=True, exist_ok=True)
  write_json(workdir / "config.json", to_dict(config))
  if config.demo:
    from mllm_jax.demo.write import write as write_demo

    say(f"writing the digits data set to {workdir / 'data'}")
    write_demo(workdir / "data", seed=0)

  # ---- the stages ----------------------------------------------------------------------------------------------------------------
  log = MetricsLog(workdir, wandb_project=config.wandb_project, name=config.name, config=to_dict(config))
  try:
    for name in names:
      train_stage(config, name, workdir, mesh, log, stop)
      if stop.signal:
        raise Stopped(128 + stop.signal, "stopped; the same command continues")
  finally:
    log.close()

  # ---- report ----------------------------------------------------------------------------------------------------------------
  rows = report.read_log(str(workdir / "metrics.jsonl"))
  predictions = read_predictions(workdir / names[-1] / "evaluation.json")
  report.write(str(workdir / "report.html"), config=config, log=rows, predictions=predictions)
  say(summary(rows, workdir, time.time() - started))


def train_stage(config: Config, name: str, workdir: Path, mesh, log, stop: Stop) -> None:
  """One stage from its last checkpoint, or its beginning, to its evaluation."""
  import jax
  from tqdm import tqdm

  from mllm_jax import build, parameters, sharding
  from mllm_jax.data.pipeline import TrainingBatches
  from mllm_jax.data.records import Records, check
  from mllm_jax.models.mllm import abstract
  from mllm_jax.training import optimizer as optimizer_lib, step as step_lib
  from mllm_jax.training.checkpoint import Checkpoints

  stage: dataclasses.Field = getattr(config, name)
  folder = workdir / name
  folder.mkdir(exist_ok=True)
  say(f"\n== {name} ==")

  # ---- data ------------------------------------------------------------------------------------------------------------------
  model_config = build.architecture(config.model, stage.lora)
  processor = build.make_processor(model_config, stage, config.model.llm)
  records = Records.load(stage.data.path, stage.data.image_folder)
  problems = check(records, max_images=stage.data.max_images)
  if problems:
    more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
    raise DataError(f"{len(problems)} samples cannot be used:\n  " + "\n  ".join(problems[:10]) + more)
  batches = TrainingBatches(records, processor, batch_size=stage.batch_size, accumulation=stage.accumulation,
                            epochs=stage.epochs, steps=stage.steps, seed=config.seed, process_index=jax.process_index(),
                            process_count=jax.process_count(), threads=config.loader_threads)

  # ---- what is trained ---------------------------------------------------------------------------------------------------------
  graphdef, shapes = parameters.flatten(abstract(model_config))
  rates = parameters.match(stage.parameters, list(shapes), f"{name}.parameters")
  checkpoints = Checkpoints(folder / "checkpoints", config.keep_checkpoints)
  start = checkpoints.latest()
  identity = {"stage": name, "seed": config.seed, "samples": len(records), "steps": batches.steps,
              "model": to_dict(model_config), "recipe": recipe_identity(stage), "fingerprints": build.fingerprints(config.model)}
  if start is not None:
    check_identity(checkpoints.meta(start), identity, folder)
  given = {} if start is not None else pretrained(config, name, workdir, shapes, mesh)

  # ---- parameters, optimizer, step -------------------------------------------------------------------------------------------
  flat = build.load_parameters(model_config, config.model, rates, config.seed, mesh, given)
  say(parameters.table(flat, rates))
  trainable = {path: value for path, value in flat.items() if rates[path]}
  frozen = {path: value for path, value in flat.items() if not rates[path]}
  optimizer = optimizer_lib.make(stage, trainable)
  state = step_lib.initial_state(optimizer, trainable, mesh)
  if start is not None:
    state = checkpoints.restore(start, state)
  del flat, trainable, given
  trained_rates = {path: rates[path] for path in state.trainable}
  train_step = step_lib.make_step(graphdef, stage, trained_rates, batches.steps, config.seed, mesh, optimizer,
                                  step_lib.state_shardings(optimizer, state.trainable, mesh))
  start = start or 0
  log.forget_after(name, start)
  say(f"{len(records):,} samples, {batches.steps:,} steps of {stage.batch_size}"
      + (f" in {stage.accumulation} micro-batches" if stage.accumulation > 1 else "")
      + (f", continuing after step {start:,}" if start else ""))

  # ---- the loop --------------------------------------------------------------------------------------------------------------
  bar = tqdm(total=batches.steps, initial=start, desc=name, unit="step", disable=jax.process_index() > 0, dynamic_ncols=True)
  clock = Clock(stage.batch_size)
  in_flight = []  # one step is computed while the next batch is made; its numbers are read after that
  on_many_cpu_devices = mesh.size > 1 and mesh.devices.flat[0].platform == "cpu"

  def settle(step: int, ids: list[str], values) -> None:
    """Reads a finished step's numbers, and logs them when it is time."""
    values = {key: value.item() for key, value in jax.device_get(values).items()}
    clock.tick(values["tokens"])
    bar.update()
    if values["skipped_in_row"]:
      append_line(folder / "nonfinite.jsonl", {"step": step, "loss": str(values["loss"]), "ids": ids})
      bar.write(f"step {step}: loss or gradient is not finite; the step is not applied, its ids are in {folder / 'nonfinite.jsonl'}")
    if step % config.log_every == 0 or step == batches.steps or values["skipped_in_row"]:
      row = {"stage": name, "step": step, **values, **clock.rates()}
      log.write({key: value for key, value in row.items() if isinstance(value, str) or abs(value) < float("inf")})
      bar.set_postfix(loss=f"{values['loss']:.3f}", lr=f"{values['learning_rate']:.1e}",
                      samples_per_s=f"{row['samples_per_s']:.1f}", tokens_per_s=f"{row['tokens_per_s']:.0f}")
    if values["skipped_in_row"] >= config.max_nonfinite:
      raise FloatingPointError(f"{name}, step {step}: {values['skipped_in_row']} steps in a row had a loss or gradient that is not "
                               f"finite (max_nonfinite); saved. Look at the samples named in {folder / 'nonfinite.jsonl'}, or "
                               "lower the learning rate and use another --workdir")

  def save() -> None:
    checkpoints.save(state, identity | {"config": to_dict(config)})

  with jax.set_mesh(mesh), bar:
    try:
      for step, (ids, host_batch) in enumerate(batches.iterate(start), start=start + 1):
        state, values = train_step(state, frozen, sharding.to_device(host_batch, mesh, leading=1))
        in_flight.append((step, ids, values))
        while len(in_flight) > (0 if on_many_cpu_devices else 1):  # CPU devices in one process can deadlock with two in flight
          settle(*in_flight.pop(0))
        if step % config.checkpoint_every == 0:
          save()
        if stop.signal:
          break
      while in_flight:
        settle(*in_flight.pop(0))
    except (FloatingPointError, DataError) as error:
      while in_flight and isinstance(error, DataError):
        settle(*in_flight.pop(0))
      save()
      checkpoints.wait()
      raise Stopped(1, str(error)) from error
  save()
  checkpoints.wait()
  done = int(state.step)
  checkpoints.close()
  if done < batches.steps:
    raise Stopped(128 + stop.signal, f"{name}: saved after step {done} of {batches.steps}; the same command continues")

  # ---- evaluation ------------------------------------------------------------------------------------------------------------
  if config.evaluation.path and not (folder / "evaluation.json").is_file():
    model = parameters.unflatten(graphdef, {**frozen, **state.trainable})
    evaluate(config, name, model, processor, mesh, log, done, folder)


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

    result = exact_match(Engine(model, asker.tokenizer.eos_id, mesh=mesh), asker, records,
                         batch_size=config.evaluation.batch_size, max_new_tokens=config.evaluation.max_new_tokens,
                         blank=config.evaluation.blank, progress=progress)
  log.write({"stage": name, "step": step, **result.metrics()})
  write_json(folder / "evaluation.json", [dataclasses.asdict(prediction) for prediction in result.predictions])
  say(f"{name}: held-out exact match {result.overall.exact_match:.1%}"
      + (f", with the pictures blanked {result.overall.blank:.1%}" if result.overall.blank is not None else ""))


def pretrained(config: Config, name: str, workdir: Path, shapes: dict, mesh) -> dict:
  """What a stage starts from beside the towers: for finetune the projector that pretrain left in the same workdir.

  Raises ConfigError where there is none and no released projector is named: a projector that starts from noise would train,
  and be worth nothing.
  """
  import jax
  import jax.numpy as jnp

  from mllm_jax import sharding
  from mllm_jax.training.checkpoint import Checkpoints

  if name != "finetune":
    return {}
  folder = workdir / "pretrain" / "checkpoints"
  checkpoints = Checkpoints(folder) if folder.is_dir() else None
  step = checkpoints.latest() if checkpoints is not None else None
  if step is None:
    if config.model.projector_weights:
      return {}
    raise ConfigError(f"finetune starts from a pre-trained projector, and {folder} holds none; run --config.stages=pretrain first, "
                      "or name a released one in model.projector_weights")
  meta = checkpoints.meta(step)
  if step < meta["steps"]:
    raise ConfigError(f"{folder}: pretrain has done {step} of {meta['steps']} steps; finish it first (--config.stages=pretrain)")
  from mllm_jax.build import check_fingerprints
  check_fingerprints(meta, config.model, str(folder))
  places = sharding.parameter_shardings(shapes, mesh)
  like = {path: jax.ShapeDtypeStruct(shape.shape, jnp.float32, sharding=places[path])
          for path, shape in shapes.items() if path.startswith("projector/")}
  return checkpoints.restore_trainable(step, like)


def recipe_identity(stage) -> dict:
  """What of a stage's configuration decides its result. Where the data lie does not: they may be moved between two starts."""
  content = to_dict(stage)
  content["data"] = {key: value for key, value in content["data"].items() if key not in ("path", "image_folder")}
  return json.loads(json.dumps(content))


def check_identity(saved: dict, now: dict, folder: Path) -> None:
  """Raises ConfigError where a checkpoint is of another run than this one would be, with all differences."""

  def differences(a, b, path):
    if isinstance(a, dict) and isinstance(b, dict):
      return [line for key in sorted(set(a) | set(b)) for line in differences(a.get(key), b.get(key), f"{path}.{key}")]
    return [] if a == b else [f"{path.lstrip('.')}: {a} in the checkpoint, {b} now"]

  now = json.loads(json.dumps(now))
  found = [line for key in now for line in differences(saved.get(key), now[key], key)]
  if found:
    raise ConfigError(f"{folder} holds checkpoints of another run:\n  " + "\n  ".join(found[:12])
                      + "\nSet these back to continue it, or use another --workdir")


class Clock:
  """Samples and trained tokens a second since the rates were last asked for."""

  def __init__(self, samples_per_step: int):
    self.samples_per_step = samples_per_step
    self.since, self.steps, self.tokens = time.perf_counter(), 0, 0.0

  def tick(self, tokens: float) -> None:
    self.steps += 1
    self.tokens += tokens

  def rates(self) -> dict[str, float]:
    now = time.perf_counter()
    seconds = max(now - self.since, 1e-9)
    rates = {"samples_per_s": self.steps * self.samples_per_step / seconds, "tokens_per_s": self.tokens / seconds}
    self.since, self.steps, self.tokens = now, 0, 0.0
    return rates


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
            lines.append(f"    {kind or 'held-out exact match':28s} {value:7.1%}" + (f"  (blanked {blank:.1%})" if blank is not None else ""))
  lines.append(f"  report       {workdir / 'report.html'}")
  lines.append(f"  ask it       python -m mllm_jax.generate --workdir={workdir} --image=FILE --prompt=\"...\"")
  return "\n".join(lines)


def read_predictions(path: Path) -> list:
  from mllm_jax.inference.evaluate import Prediction, Question

  if not path.is_file():
    return []
  rows = json.loads(path.read_text(encoding="utf-8"))
  tuples = lambda row: {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
  return [Prediction(**{**row, "question": Question(**tuples(row["question"]))}) for row in rows]


def write_json(path: Path, content) -> None:
  """Writes beside, then renames: a reader never finds half a file."""
  partial = path.with_name(path.name + ".partial")
  partial.write_text(json.dumps(content, indent=1), encoding="utf-8")
  os.replace(partial, path)


def append_line(path: Path, row: dict) -> None:
  with open(path, "a", encoding="utf-8") as file:
    file.write(json.dumps(row) + "\n")


def config_file() -> str:
  """The path behind --config, without the part after the colon."""
  return config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")[0]


def plain_error(argv: list[str], error: Exception) -> str:
  """What went wrong on the command line, without the traceback that config_flags puts into its messages."""
  text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
  if "Traceback" in text:
    text = text.strip().splitlines()[-1].partition(": ")[2]
  found = re.search(r"Field (\w+) not found on dataclass <class '[\w.]*?(\w+)'>", text)
  if found:
    known = ", ".join(field.name for field in dataclasses.fields(getattr(config_lib, found[2])))
    options = [argument for argument in argv if re.match(rf"--config[.\w]*\.{found[1]}\b", argument)]
    return f"{options[0] if options else found[1]}: there is no field {found[1]!r}; {found[2]} has {known}"
  return text


def parse(argv: list[str]) -> tuple[Config, Path]:
  """The configuration and the workdir. Raises ConfigError where the command line is wrong."""
  try:
    rest = flags.FLAGS(argv)
  except (flags.Error, KeyError, TypeError, ValueError, AttributeError, ImportError, OSError) as error:
    raise ConfigError(plain_error(argv, error)) from error
  if len(rest) > 1:
    raise ConfigError(f"{rest[1]!r} is no option; options are written --config=FILE, --workdir=DIR, --config.FIELD=VALUE")
  if flags.FLAGS["config"].value is None:
    raise ConfigError("which recipe? for instance --config=configs/sp_cropping.py:demo (--help tells more)")
  if not isinstance(CONFIG.value, Config):
    if not Path(config_file()).is_file():
      raise ConfigError(f"--config={config_file()}: no such file; the recipes are in configs/")
    raise ConfigError(f"{config_file()}: get_config must return a mllm_jax.config.Config")
  return CONFIG.value, Path(WORKDIR.value or f"runs/{CONFIG.value.name}")


def help_text() -> str:
  """The docstring, the options, and every field that can be overridden with its default."""

  def fields(config, prefix):
    for field in dataclasses.fields(config):
      value = getattr(config, field.name)
      if dataclasses.is_dataclass(value):
        yield from fields(value, f"{prefix}.{field.name}")
      else:
        yield f"  --{prefix}.{field.name}={value!r}"

  options = f"  --config=FILE[:demo]  {flags.FLAGS['config'].help}\n  --workdir=DIR  {flags.FLAGS['workdir'].help}"
  return f"{__doc__}\noptions:\n{options}\n\nfields and their defaults:\n" + "\n".join(fields(Config(), "config"))


def main(argv: list[str]) -> int:
  if {"--help", "-h", "--helpshort", "--helpfull"} & set(argv):
    print(help_text())
    return 0
  expected = (ConfigError, DataError, WeightsError)  # what a user can put right before the run
  try:
    run(*parse(argv))
  except expected as error:
    return fail(2, error)
  except Stopped as error:
    return fail(error.status, error)
  except OSError as error:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
      raise
    return fail(1, f"{error.filename or ''}: {error.strerror}; what was saved before is still there. Make room, or use a --workdir "
                   "that can be written, and start the same command again")
  except RuntimeError as error:
    if type(error).__name__ != "CheckpointError":
      raise
    return fail(1, error)
  return 0


def fail(status: int, error: Exception | str) -> int:
  print(f"error: {error}", file=sys.stderr, flush=True)
  return status


if __name__ == "__main__":
  sys.exit(main(sys.argv))
