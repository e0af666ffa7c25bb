"""show: one HTML page of samples as the model gets them: pixels, tokens, what is trained on, what is cut off.

    python -m mllm_jax.data show --config=configs/sp_cropping.py --stage=finetune --out=samples.html
    python -m mllm_jax.data show --path=train.json --image_folder=images --llm=weights/vicuna-7b-v1.5

This is where a wrong template, a wrong tokenizer or a cut answer is seen.
"""

import argparse
import dataclasses
import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path

from mllm_jax.config import Config, ConfigError, DataConfig, ModelConfig
from mllm_jax.data.records import DataError

PURPOSE = "an HTML page of samples as the model gets them"
STAGES = ("pretrain", "finetune")


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """The options of this command."""
  parser.add_argument(
    "--config", metavar="FILE", help="a recipe, as the trainer takes it (FILE:demo for the small one)"
  )
  parser.add_argument("--stage", choices=STAGES, default="finetune", help="whose data is shown (default: finetune)")
  parser.add_argument("--workdir", default="", metavar="DIR", help="what {workdir} stands for in the recipe's paths")
  parser.add_argument("--path", metavar="FILE", help="LLaVA JSON or JSONL, in place of the recipe's")
  parser.add_argument("--image_folder", metavar="DIR", help="what image paths are relative to")
  parser.add_argument("--llm", metavar="DIR", help="the language model's folder, for its tokenizer")
  parser.add_argument("--vision", metavar="DIR", help="the vision tower's folder, for its image size")
  parser.add_argument("--projector", choices=("spatial", "mlp2x_gelu"), help="how many visual tokens an image has")
  parser.add_argument("--template", help="of the conversations")
  parser.add_argument("--max_length", type=int, metavar="N", help="places after which a sample is cut off")
  parser.add_argument("--image_aspect", choices=("pad", "anyres"), help="how images are made to fit the tower")
  parser.add_argument("--count", type=int, default=20, metavar="N", help="samples shown (default: 20)")
  parser.add_argument(
    "--seed", type=int, metavar="N", help="choose them at random; without it the first ones are shown"
  )
  parser.add_argument("--ids", metavar="A,B", help="samples with these ids, in place of --count")
  parser.add_argument("--out", default="samples.html", metavar="FILE", help="the page (default: samples.html)")


def run(args: argparse.Namespace) -> int:
  """Writes the page. Exit status: 0 done, 2 something to put right first."""
  from mllm_jax import build
  from mllm_jax.data.records import Records
  from mllm_jax.data_commands import show_page
  from mllm_jax.weights.known import WeightsError

  try:
    model, data, llm = settings(args)
    records = Records.load(data.path, data.image_folder)
    chosen = choose(records, args)
    processor = build.make_processor(model, build.tokenizer_folder(llm), data)
    title = f"{os.path.basename(data.path)}: {len(chosen)} of {len(records):,} samples"
    facts = {
      "data": data.path,
      "template": data.template,
      "tokenizer": llm,
      "places": f"{data.max_length:,}",
      "images": f"{model.vision.image_size} pixels, {data.image_aspect}, {processor.tokens_per_crop} tokens each crop",
    }
    Path(args.out).write_text(
      show_page.page(title, facts, records, chosen, processor, bool(args.config)), encoding="utf-8"
    )
  except (ConfigError, DataError, WeightsError, OSError) as error:
    print(f"show: {error}", file=sys.stderr)
    return 2
  print(f"{len(chosen)} samples in {args.out}")
  return 0


def settings(args: argparse.Namespace) -> tuple[ModelConfig, DataConfig, str]:
  """(model, data, the language model's folder) from a recipe, the options, or both.

  Raises ConfigError where neither names the data, or the recipe cannot be read.
  """
  from mllm_jax import build, preflight
  from mllm_jax.command_line import parse

  config = Config()
  if args.config:
    given = [f"--config={args.config}", *getattr(args, "overrides", [])]
    config, workdir, _ = parse(["show", *given, *([f"--workdir={args.workdir}"] if args.workdir else [])])
    config = preflight.in_workdir(config, str(workdir))
    if config.demo and not args.path:
      from mllm_jax.demo.write import write

      write(workdir / "data", seed=0)
  elif not args.path:
    raise ConfigError("which data? --config=FILE of a recipe, or --path=FILE with --llm=DIR")
  given = lambda names: {name: value for name in names if (value := getattr(args, name)) is not None}
  stage = getattr(config, args.stage)
  data = dataclasses.replace(stage.data, **given(("path", "image_folder", "template", "max_length", "image_aspect")))
  recipe = dataclasses.replace(config.model, **given(("llm", "vision")))
  projector = recipe.projector
  if args.projector:
    projector = dataclasses.replace(projector, kind=args.projector)
  if data.image_aspect == "anyres":
    projector = dataclasses.replace(projector, image_newline=True)
  model = build.architecture(dataclasses.replace(recipe, projector=projector), stage.lora)
  return model, data, recipe.llm


def choose(records: Sequence, args: argparse.Namespace) -> list[int]:
  """The places of the samples to show. Raises DataError for ids that the data does not have."""
  if args.ids:
    wanted = [name.strip() for name in args.ids.split(",") if name.strip()]
    places: dict[str, int] = {}
    for place in range(len(records)):
      try:
        places.setdefault(records[place].id, place)
      except DataError:
        continue  # a sample without a structure has no id to be asked for by
    missing = [name for name in wanted if name not in places]
    if missing:
      raise DataError(f"{records.source}: no sample has the id {', '.join(missing)}; compare --ids with the file")
    return [places[name] for name in wanted]
  count = min(args.count, len(records))
  if args.seed is None:
    return list(range(count))
  return sorted(random.Random(args.seed).sample(range(len(records)), count))


def main(argv: Sequence[str] | None = None) -> int:
  """The command by itself. Fields of the recipe are overridden as the trainer's are: --config.a.b=VALUE."""
  parser = argparse.ArgumentParser(prog="python -m mllm_jax.data_commands.show", description=PURPOSE)
  add_arguments(parser)
  args, rest = parser.parse_known_args(argv)
  unknown = [option for option in rest if not option.startswith("--config.")]
  if unknown:
    parser.error(f"unknown option {unknown[0]}")
  args.overrides = rest
  return run(args)


if __name__ == "__main__":
  sys.exit(main())
