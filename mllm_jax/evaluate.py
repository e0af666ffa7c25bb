"""Evaluate a model: python -m mllm_jax.evaluate --model=DIR --benchmark=pope,gqa --data=DIR --out=DIR

Answers are kept in OUT/predictions as they come, so that an interrupted run goes on where it was; OUT/report.json and
OUT/report.html hold the scores, those of earlier calls among them, OUT/submissions the files for servers, OUT/verdicts
what a judge wrote. All devices of one process answer, each with a copy of the model or, with --tensor=N, N together.
Exit status: 0 done, 2 for anything that the caller can put right, 130 when interrupted.
"""

import argparse
import csv
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from mllm_jax import distributed, terminal
from mllm_jax.benchmarks import report, scoring
from mllm_jax.benchmarks.asking import ask, digest
from mllm_jax.benchmarks.catalogue import BENCHMARKS, table
from mllm_jax.benchmarks.judge import KEY, Endpoint
from mllm_jax.benchmarks.question import Benchmark, Question, Result
from mllm_jax.benchmarks.source import Source, check, check_pictures
from mllm_jax.benchmarks.store import Store
from mllm_jax.command_line import Parser
from mllm_jax.config import ConfigError, MeshConfig
from mllm_jax.data.records import DataError

# jax is imported where it is used, so that a mistyped argument is answered at once.

SERVER_SCORES = "server_scores.json"
LONGEST_SIDE = "longest_side"
SETTINGS = ("beams", "max_slices", LONGEST_SIDE)
ALONE = "an evaluation is one process, which uses all of its machine's devices; start it once, on one host"
EXAMPLES = f"""examples:
  python -m mllm_jax.evaluate --list
  python -m mllm_jax.evaluate --model=runs/sp --benchmark=pope,mme --data=playground/data/eval --out=scores/sp
  python -m mllm_jax.evaluate --benchmark=pope,mme --data=playground/data/eval --out=scores/sp --score_only
  python -m mllm_jax.evaluate --model=runs/sp --benchmark=mm_vet --data=playground/data/eval --out=scores/sp \\
    --judge_url=https://api.openai.com/v1 --judge_model=gpt-4o

LLaVA-UHD v2's released code asks with --max_slices=9 and, each in a call of its own,
  mme                                                            --num_beams=5
  ai2d                                                           no more than that
  docvqa, chartqa, gqa, scienceqa                                --longest_side=1024
  textvqa                                                        --longest_side=1536
  ocrbench, mmmu, seed, mmbench_en_test, realworldqa, hrbench4k  --longest_side=1024 --num_beams=3

The judge's key is taken from the environment's {KEY}. Scores that servers gave, {{"vqav2": 79.1}} in
OUT/{SERVER_SCORES}, count in the averages.
"""


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
  """The command line, `benchmarks` made of its names. Exits with status 2 where it cannot work."""
  parser = Parser(
    prog="python -m mllm_jax.evaluate",
    description="Score a model on the benchmarks that papers report, out of their published files.",
    epilog=EXAMPLES,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  add = parser.add_argument
  add("--list", action="store_true", help="print every benchmark: name, metric, prompt, files; and end")
  add("--model", metavar="DIR", help="a training run's folder, a converted model, or a checkpoint to import")
  add("--benchmark", default="", metavar="NAMES", help="names of --list, with commas between them")
  add("--data", metavar="DIR", help="the folder with the published files, as --list names them below it")
  add("--out", metavar="DIR", help="where answers and reports go")
  add("--num_beams", type=int, default=1, metavar="N", help="of beam search (default: 1, greedy)")
  add("--max_slices", type=int, default=0, metavar="N", help="of a picture (default: as trained; UHD v2's paper: 9)")
  add(
    "--longest_side", type=int, default=0, metavar="N", help="pixels that pictures are first resized to (default: no)"
  )
  add("--limit", type=int, metavar="N", help="only the first N questions of each benchmark")
  add("--batch_size", type=int, default=16, metavar="N", help="rows answered at once, on all devices (default: 16)")
  add("--tensor", type=int, default=1, metavar="N", help="devices that hold one copy of the model (default: 1)")
  add("--score_only", action="store_true", help="score the answers that are there, without a model")
  add("--judge_url", metavar="URL", help="of a judge that speaks OpenAI's API, up to /v1")
  add("--judge_model", metavar="NAME", help="which model is the judge")
  args = parser.parse_args(argv)
  if args.list:
    return args
  for name in ("benchmark", "data", "out", *([] if args.score_only else ["model"])):
    if not getattr(args, name):
      parser.error(f"--{name} is missing")
  names = list(dict.fromkeys(filter(None, args.benchmark.split(","))))
  unknown = [name for name in names if name not in BENCHMARKS]
  if unknown:
    parser.error(f"--benchmark {unknown[0]}: unknown; known: {', '.join(BENCHMARKS)}")
  for name in ("num_beams", "batch_size", "limit", "max_slices", "longest_side", "tensor"):
    if getattr(args, name) not in (None, parser.get_default(name)) and getattr(args, name) < 1:
      parser.error(f"--{name} is {getattr(args, name)}; it must be at least 1")
  if args.num_beams > args.batch_size:
    parser.error(f"--num_beams {args.num_beams} takes as many rows, and --batch_size is {args.batch_size}; raise it")
  args.benchmarks = [BENCHMARKS[name] for name in names]
  for benchmark in args.benchmarks:
    if benchmark.judge and not (args.judge_url and args.judge_model):
      parser.error(f"--benchmark {benchmark.name} needs a judge; give --judge_url and --judge_model")
  if args.model and "://" not in args.model and not os.path.isdir(args.model):
    parser.error(f"--model {args.model}: no such folder; name a training run's --workdir, or a model's folder")
  if not os.path.isdir(args.data):
    parser.error(f"--data {args.data}: no such folder")
  return args


def read_questions(benchmark: Benchmark, source: Source) -> list[Question]:
  """A benchmark's questions, its files and pictures checked. Raises DataError that names what is missing or wrong."""
  check(benchmark, source)
  try:
    questions = benchmark.read(source)
  except (LookupError, TypeError, ValueError, AttributeError, StopIteration, OSError, csv.Error) as error:
    files = ", ".join(file.pattern for file in benchmark.files)
    what = f"{type(error).__name__}: {error}"
    raise DataError(f"{benchmark.name}: {files} have not the published form ({what}); get them again") from error
  if len({question.id for question in questions}) < len(questions) or not questions:
    raise DataError(f"{benchmark.name}: its files hold no questions, or some of them twice; get them again")
  check_pictures(benchmark, questions)
  return questions


def predictions(args: argparse.Namespace, benchmark: Benchmark) -> Path:
  """The file of a benchmark's answers."""
  return Path(args.out) / "predictions" / f"{benchmark.name}.jsonl"


def settings_of(args: argparse.Namespace) -> dict[str, int]:
  """How benchmarks are asked."""
  settings = {"beams": args.num_beams, "max_slices": args.max_slices}
  return settings | ({LONGEST_SIDE: args.longest_side} if args.longest_side else {})  # answers without it are older


def head(benchmark: Benchmark, questions: Sequence[Question], model: dict, settings: dict[str, int]) -> dict:
  """What answers depend on."""
  asked = settings | {"max_new_tokens": benchmark.max_new_tokens}
  return {"benchmark": benchmark.name, "questions": digest(questions), **asked, **model}


def stored_head(path: Path) -> dict:
  """What the answers in a file were made with. Raises ConfigError where there are none."""
  try:
    with path.open(encoding="utf-8") as file:
      return json.loads(file.readline())
  except (OSError, ValueError) as error:
    raise ConfigError(f"{path}: no answers to score; run without --score_only first") from error


def describe(path: str) -> dict:
  """What tells a model from others before it is loaded: name, fingerprint of its parameters and its template, and
  whether it sees pictures padded to a square."""
  from mllm_jax.build import data_of, open_any

  stored = open_any(path)
  hashed = hashlib.sha256(stored.manifest.template.encode())
  for name in sorted(stored.tensors.names()):
    shape = stored.tensors.shape(name)
    corner = tuple(slice(0, min(side, 8)) for side in shape)
    hashed.update(f"{name} {shape} {stored.tensors.dtype(name)}".encode())
    hashed.update(stored.tensors.read(name, corner).tobytes())
    stored.tensors.release(name)
  name = os.path.basename(os.path.normpath(path))
  padded = data_of(stored).image_aspect == "pad"
  return {"model": name, "fingerprint": hashed.hexdigest()[:16], "padded": padded}


def load_engine(path: str, rows: int, max_slices: int, tensor: int):
  """(what answers, what makes its prompts). Rows are split over all devices, each `tensor` of which hold one model.

  Raises ConfigError where that does not divide them, or this is one of several processes.
  """
  import jax

  from mllm_jax.build import load
  from mllm_jax.inference.engine import Engine
  from mllm_jax.sharding import make_mesh

  if jax.process_count() > 1:
    raise ConfigError(f"{ALONE}; jax sees {jax.process_count()} of them")
  mesh = make_mesh(MeshConfig(data=-1, fsdp=1, tensor=tensor)) if len(jax.devices()) > 1 or tensor > 1 else None
  model, processor = load(path, mesh, max_slices=max_slices)
  return Engine(model, processor, rows=rows, mesh=mesh), processor


def bar(benchmark: Benchmark, total: int, done: int, unit: str = "q") -> tqdm:
  """Progress on standard error, with questions a second and the time left."""
  return tqdm(total=total, initial=done, desc=benchmark.name, unit=unit, dynamic_ncols=True)


def collect(args: argparse.Namespace) -> dict[str, tuple[dict, list[Question], Store]]:
  """By benchmark: the model, the questions with their files checked, and the answers so far."""
  found = {}
  model = None if args.score_only else describe(args.model)
  for benchmark in args.benchmarks:
    old = stored_head(predictions(args, benchmark)) if args.score_only else None
    whose = model or {key: old.get(key) for key in ("model", "fingerprint", "padded")}
    questions = read_questions(benchmark, Source(Path(args.data), whose["padded"]))
    settings = settings_of(args) if old is None else {key: old[key] for key in SETTINGS if key in old}
    store = Store(predictions(args, benchmark), head(benchmark, questions, whose, settings))
    found[benchmark.name] = (whose, questions, store)
  models = sorted({whose["fingerprint"] for whose, _, _ in found.values()})
  if len(models) > 1:
    raise ConfigError(f"--out {args.out} holds answers of {len(models)} models ({', '.join(models)}); score each alone")
  return found


def score(
  args: argparse.Namespace,
  benchmark: Benchmark,
  questions: Sequence[Question],
  asked: Sequence[Question],
  store: Store,
  source: Source,
) -> scoring.Scored:
  """The results and summary of the `asked` ones of a benchmark's questions, and the file for its server."""
  results = scoring.answered(benchmark, asked, store.rows)
  if benchmark.judge:
    results = judged(args, benchmark, questions, results)
  submission = ""
  if benchmark.submission and len(asked) == len(questions):
    folder = Path(args.out) / "submissions"
    folder.mkdir(parents=True, exist_ok=True)
    submission = str(benchmark.submission(results, source, folder).relative_to(args.out))
  summary = benchmark.summarise(results) if benchmark.scored else None
  settings = {name: store.head.get(name, 0) for name in SETTINGS}
  return scoring.Scored(benchmark, results, len(questions), summary, settings, submission)


def judged(args: argparse.Namespace, benchmark: Benchmark, questions: Sequence[Question], results: Sequence[Result]):
  """The results with a judge's verdicts; of a benchmark that was asked in an earlier call, with those that are there.

  Raises DataError where verdicts are missing.
  """
  path = Path(args.out) / "verdicts" / f"{benchmark.name}.jsonl"
  asks = benchmark in args.benchmarks
  judge = args.judge_model if asks else stored_head(path).get("judge")
  verdicts = Store(path, {"benchmark": benchmark.name, "judge": judge, "questions": digest(questions)})
  if not asks and any(result.question.id not in verdicts.rows for result in results):
    raise DataError(f"{path}: verdicts are missing; name {benchmark.name} and its judge again")
  with bar(benchmark, len(results), 0, " verdicts") as shown:
    return scoring.judged(benchmark, results, Endpoint(args.judge_url, judge), verdicts, shown.update)


def earlier(args: argparse.Namespace, fingerprint: str) -> list[scoring.Scored]:
  """What else OUT holds answers to, by the model of that fingerprint. What is left out is said."""
  scored = []
  for benchmark in BENCHMARKS.values():
    path = predictions(args, benchmark)
    if benchmark in args.benchmarks or not path.exists():
      continue
    try:
      old = stored_head(path)
      if old.get("fingerprint") != fingerprint:
        raise ConfigError(f"{path} is of another model ({old.get('model')})")
      source = Source(Path(args.data), old.get("padded"))
      questions = read_questions(benchmark, source)
      store = Store(path, old | {"questions": digest(questions)})
      asked = [question for question in questions if question.id in store.rows]
      scored += [score(args, benchmark, questions, asked, store, source)] if asked else []
    except (DataError, ConfigError) as error:
      terminal.note(f"left out of the report: {error}")
  return scored


def server_scores(args: argparse.Namespace) -> dict[str, float]:
  """What servers gave. Raises ConfigError where the file does not hold that."""
  path = Path(args.out) / SERVER_SCORES
  if not path.exists():
    return {}
  try:
    return {name: float(value) for name, value in json.loads(path.read_text(encoding="utf-8")).items()}
  except (ValueError, TypeError, AttributeError) as error:
    raise ConfigError(f'{path}: {error}; it holds scores by benchmark, such as {{"vqav2": 79.1}}') from error


def evaluate(args: argparse.Namespace) -> None:
  """Asks, scores and reports. What the caller can put right is a DataError, ConfigError, PlaceError or OSError."""
  processes = distributed.variables(os.environ) or distributed.slurm(os.environ) or {"num_processes": 1}
  if processes["num_processes"] > 1:
    raise ConfigError(f"{ALONE}; the environment is that of one of {processes['num_processes']}")
  given = server_scores(args)
  found = collect(args)
  if not args.score_only:
    try:  # not after hours of answers
      predictions(args, args.benchmarks[0]).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise ConfigError(f"--out {args.out}: {error.strerror}; name a folder that can be made") from error
    missing = {
      b.name: sum(q.id not in found[b.name][2].rows for q in found[b.name][1][: args.limit]) for b in args.benchmarks
    }
    engine = processor = None
    if any(missing.values()):
      engine, processor = load_engine(args.model, args.batch_size, args.max_slices, args.tensor)
    for benchmark in args.benchmarks:
      _, questions, store = found[benchmark.name]
      asked = questions[: args.limit]
      with bar(benchmark, len(asked), len(asked) - missing[benchmark.name]) as shown:
        how = {"beams": args.num_beams, "longest_side": args.longest_side, "batch_size": args.batch_size}
        ask(engine, processor, benchmark, asked, store, **how, progress=shown.update)
  scored = []
  for benchmark in args.benchmarks:
    model, questions, store = found[benchmark.name]
    source = Source(Path(args.data), model["padded"])
    scored.append(score(args, benchmark, questions, questions[: args.limit], store, source))
  for entry in scored:
    told = "" if entry.summary is None else f"{entry.summary.score:.2f}"
    print("\t".join(filter(None, [entry.benchmark.name, told, entry.submission])))
  order = list(BENCHMARKS.values())
  scored = sorted([*scored, *earlier(args, model["fingerprint"])], key=lambda entry: order.index(entry.benchmark))
  report.write(Path(args.out), model["model"], model["fingerprint"], scored, given)


def main(argv: Sequence[str] | None = None) -> int:
  args = arguments(argv)
  if args.list:
    print(table())
    return 0
  return terminal.run(lambda: evaluate(args), left="run the same again to go on")


if __name__ == "__main__":
  sys.exit(main())
