"""Compile a recipe for a TPU that is not there.

  python -m mllm_jax.compile --config=configs/sp_cropping.py --topology=v5e-16

Every stage's real step is compiled at full size for the topology's chips, with shapes instead of weights: nothing is
downloaded and no accelerator is needed, only its compiler (pip install 'jax[tpu]'). Printed, for one chip: memory,
FLOPs, traffic, collectives, and the step time that the chip's peak rates allow. Exit status: 0 all stages fit, 1 one
does not, 2 something to put right first.

  python -m mllm_jax.compile --config=configs/sp_cropping.py --summary

compiles nothing: parameters by part, visual tokens, and the FLOPs of one image at its largest resolution.
"""

import argparse
import os
import sys
from pathlib import Path

from mllm_jax import preflight
from mllm_jax.command_line import Parser, parse
from mllm_jax.compilation import topologies
from mllm_jax.config import Config, ConfigError
from mllm_jax.run_control import write_json


def arguments() -> argparse.ArgumentParser:
  parser = Parser(prog="python -m mllm_jax.compile", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument("--config", required=True, help="the recipe, FILE[:demo]; --config.FIELD=VALUE overrides a field")
  parser.add_argument("--topology", default="", help="v4-32, v5e-16, v5p-64, v6e-16, ...; cpu-8: CPU devices")
  parser.add_argument("--slices", type=int, default=1, help="how many of that, joined by the data centre's network")
  parser.add_argument("--stage", default="", help="one of the recipe's stages only")
  parser.add_argument(
    "--fit", action="store_true", help="search micro-batches, remat and mesh for the fastest that fits"
  )
  parser.add_argument("--summary", action="store_true", help="sizes and FLOPs only; needs no --topology")
  parser.add_argument("--out", default="", help="JSON file for everything")
  return parser


def summarise(config: Config, args: argparse.Namespace) -> int:
  from mllm_jax.compilation import summary as summary_lib

  found = summary_lib.summarise(config)
  print(summary_lib.text(found), flush=True)
  if args.out:
    write_json(Path(args.out), {"config": args.config, **found.to_json()})
  return 0


def run(config: Config, args: argparse.Namespace) -> int:
  topology = topologies.parse(args.topology, args.slices)
  names = preflight.stage_names(config)
  preflight.check_run(config)
  if args.stage and args.stage not in names:
    raise ConfigError(f"--stage={args.stage} is none of the recipe's stages; it has {', '.join(names)}")
  from mllm_jax.compilation import report as report_lib
  from mllm_jax.compilation import search

  devices = topologies.devices(topology)
  reports, status = [], 0
  for name in [args.stage] if args.stage else names:
    if args.fit:
      print(f"== {name} on {topology.name}: what fits ==", flush=True)
      found = search.fit(config, name, topology, devices, say=lambda line: print(line, flush=True))
      if found is None:
        print(f"error: {name}: nothing fits {topology.name}; use more chips", file=sys.stderr)
        status = 1
        continue
      print(f"fastest: {search.overrides(found)}\n")
    else:
      found = report_lib.compile_stage(config, name, topology, devices)
    print(report_lib.text(found) + "\n", flush=True)
    reports.append(found)
    if not found.fits:
      over = report_lib.gib(found.memory.over)
      print(
        f"error: {name} does not fit {topology.name}: {over} a chip too much; --fit looks for what does",
        file=sys.stderr,
      )
      status = 1
  if args.out:
    write_json(Path(args.out), {"config": args.config, "name": config.name, "stages": [r.to_json() for r in reports]})
  return status


def main(argv: list[str]) -> int:
  args, rest = arguments().parse_known_args(argv[1:])
  wrong = [option for option in rest if not option.startswith("--config.")]
  try:
    if wrong:
      raise ConfigError(f"{wrong[0]!r} is no option (see --help)")
    config, _, _ = parse(["compile", f"--config={args.config}", *rest])
    if not args.summary and not args.topology:
      raise ConfigError("--topology is missing: compile for which chips? Or --summary, which needs none (see --help)")
    if args.out and (Path(args.out).is_dir() or not Path(args.out).parent.is_dir()):
      raise ConfigError(f"--out={args.out} must be a file in a folder that exists")
    if not args.summary:
      topologies.parse(args.topology, args.slices)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # an accelerator that is here is not what is compiled for
    from mllm_jax.weights.errors import WeightsError

    try:
      return summarise(config, args) if args.summary else run(config, args)
    except WeightsError as error:
      raise ConfigError(str(error)) from error
  except ConfigError as error:
    print(f"error: {error}", file=sys.stderr, flush=True)
    return 2


if __name__ == "__main__":
  sys.exit(main(sys.argv))
