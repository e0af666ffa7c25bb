"""Linear probes on frozen features: python -m mllm_jax.probe --task=text --features=all --vision=DIR --data=DIR

Teaches a linear head on a vision tower's features as they are, or upsampled 2 or 4 times by interpolation or by VDIM,
and tests it (LLaVA-UHD v2, appendix, fig. 8). Exit status: 0 done, 2 for anything that the caller can put right, 130
when interrupted.
"""

import argparse
import contextlib
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from mllm_jax import recipes, terminal
from mllm_jax.command_line import Parser
from mllm_jax.probes import digits, layouts
from mllm_jax.probes.examples import Data

# jax is imported where it is used, so that a mistyped argument or a missing file is answered at once.

CONTENT = """tasks and the layout of their --data:
  text          words: MJSynth (annotation_train.txt, annotation_test.txt) or IIIT5K (traindata.mat, testdata.mat)
  segmentation  COCO-Stuff: images/train2017, images/val2017, annotations/train2017, annotations/val2017
  classes       CUB-200-2011: images.txt, image_class_labels.txt, train_test_split.txt, bounding_boxes.txt, classes.txt

examples:
  python -m mllm_jax.train --config=configs/vdim.py:demo --workdir=runs/vdim_demo
  python -m mllm_jax.probe --task=text --features=all --vdim=runs/vdim_demo --demo
  python -m mllm_jax.probe --task=text --features=all --vision=clip-vit-large-patch14-336 --vdim=runs/vdim \\
    --data=90kDICT32px --test=IIIT5K --workdir=runs/probes

The same command again keeps what is finished. The digits need no --data and no --vision.
"""

# Steps, pictures a step and learning rate of (a published data set, the digits): chosen here, not the paper's.
SETTINGS = {
  "text": ((20_000, 64, 1e-3), (500, 16, 3e-2)),
  "segmentation": ((10_000, 16, 1e-3), (300, 8, 1e-2)),
  "classes": ((5_000, 32, 1e-3), (300, 16, 1e-2)),
}


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
  """The command line. Exits with status 2 where it cannot work."""
  parser = Parser(
    prog="python -m mllm_jax.probe",
    description="Linear probes on a frozen vision tower's features, upsampled or not.",
    epilog=CONTENT,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument("--task", required=True, choices=tuple(SETTINGS))
  parser.add_argument("--features", required=True, choices=("none", "bilinear", "vdim", "all"))
  parser.add_argument(
    "--level", type=int, choices=(1, 2), default=2, help="upsampled 2 or 4 times (default: 2, 4 times)"
  )
  parser.add_argument("--vdim", default="", metavar="PATH", help="a trained VDIM: its file, or the folder of its run")
  parser.add_argument("--vision", default="", metavar="DIR", help="the tower, a Hugging Face folder")
  parser.add_argument("--data", default="", metavar="DIR", help="the data set that is trained on")
  parser.add_argument("--test", default="", metavar="DIR", help="the data set that is tested on (default: --data)")
  parser.add_argument("--demo", action="store_true", help="the digits and the tower that come with the package")
  parser.add_argument("--classes", type=int, choices=(27, 171), default=27, help="of COCO-Stuff (default: 27 groups)")
  parser.add_argument("--workdir", default="", metavar="DIR", help="default: runs/probes, with --demo runs/probes_demo")
  parser.add_argument("--steps", type=int, metavar="N")
  parser.add_argument("--batch_size", type=int, metavar="N")
  parser.add_argument("--learning_rate", type=float, metavar="X")
  parser.add_argument("--seed", type=int, default=0, metavar="N")
  args = parser.parse_args(argv)
  steps, batch_size, learning_rate = SETTINGS[args.task][args.demo]
  args.steps = steps if args.steps is None else args.steps
  args.batch_size = batch_size if args.batch_size is None else args.batch_size
  args.learning_rate = learning_rate if args.learning_rate is None else args.learning_rate
  if min(args.steps, args.batch_size) < 1 or args.learning_rate <= 0 or args.seed < 0:
    parser.error("--steps and --batch_size must be 1 or more, --learning_rate above 0, --seed not negative")
  if args.demo and (args.data or args.test):
    parser.error("--demo has its own data; leave out --data and --test")
  if not args.demo and not (args.data and args.vision):
    parser.error("name --data and --vision, or --demo for the digits")
  if args.features in ("vdim", "all") and not args.vdim:
    parser.error(
      "--features=vdim needs --vdim; for the demo train one with "
      "python -m mllm_jax.train --config=configs/vdim.py:demo --workdir=runs/vdim_demo"
    )
  for name in ("vdim", "vision"):
    value = getattr(args, name)
    if value and "://" not in value and not os.path.exists(value):
      parser.error(f"--{name} {value}: no such file or folder")
  args.vision = args.vision or str(recipes.DEMO_ASSETS / "clip")
  args.workdir = Path(args.workdir or ("runs/probes_demo" if args.demo else "runs/probes"))
  return args


def open_data(args: argparse.Namespace) -> Data:
  """The pictures. Raises DataError where files are missing."""
  if args.demo:
    return digits.make(args.task, args.seed)
  return layouts.open_data(args.task, args.data, args.test or args.data, args.classes)


def probe(args: argparse.Namespace) -> None:
  """Makes the probes that are not finished yet, and the table of all."""
  data = open_data(args)
  import jax

  from mllm_jax import build
  from mllm_jax.probes import features, results, run, tasks
  from mllm_jax.training.metrics import MetricsLog
  from mllm_jax.weights import vdim
  from mllm_jax.weights.fingerprint import fingerprint

  vision = build.part_config(args.vision, "vision")
  settings = run.Settings(args.steps, args.batch_size, args.learning_rate, args.seed)
  task = tasks.make(args.task, data, vision)
  dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
  args.workdir.mkdir(parents=True, exist_ok=True)
  with contextlib.closing(MetricsLog(args.workdir)) as log:
    for kind in features.KINDS if args.features == "all" else (args.features,):
      identity = {
        "task": args.task,
        "features": kind,
        "level": 0 if kind == "none" else args.level,
        "data": "digits" if args.demo else [args.data, args.test or args.data],
        "pictures": [len(data.train), len(data.test)],
        "classes": len(data.classes),
        "settings": dataclasses.asdict(settings),
        "dtype": dtype,
        "vision": os.path.basename(os.path.normpath(args.vision)),
        "tower": build.fingerprint_of(args.vision, "vision"),
        "vdim": fingerprint(vdim.find(args.vdim)) if kind == "vdim" else "",
      }
      if results.finished(args.workdir, args.task, kind, identity):
        print(f"{args.task}, {kind}: finished before, kept", flush=True)
        continue
      graphdef, frozen = features.load(args.vision, vision, kind, args.level, args.vdim, dtype)
      stage = f"{args.task}_{kind}"
      log.forget_after(stage, 0)
      outcome = run.run(task, data, graphdef, frozen, settings, stage, log)
      results.save(args.workdir, args.task, kind, identity, outcome)
  print(results.summarise(args.workdir), end="")
  print(f"{args.workdir}/page/index.html")


def main(argv: Sequence[str] | None = None) -> int:
  args = arguments(argv)
  return terminal.run(lambda: probe(args), left="finished probes are kept, and the same command makes the others")


if __name__ == "__main__":
  sys.exit(main())
