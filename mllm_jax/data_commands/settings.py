"""Which data a command looks at, and with what model: from a training recipe, or from options of its own."""

import argparse
import dataclasses
import os

from mllm_jax import preflight
from mllm_jax.command_line import parse
from mllm_jax.config import ConfigError, DataConfig, VisionConfig
from mllm_jax.data.aspects import Square
from mllm_jax.data.chat import load_tokenizer
from mllm_jax.data.processor import Processor
from mllm_jax.data.records import Records
from mllm_jax.data.sources.mix import open_data

TOKENS_PER_IMAGE = VisionConfig().grid ** 2


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
  """The options of `data_settings`."""
  parser.add_argument("--config", default="", help="a training recipe, FILE[:demo]; --config.FIELD=VALUE overrides it")
  parser.add_argument("--stage", default="finetune", choices=("pretrain", "finetune"), help="whose data in the recipe")
  parser.add_argument("--workdir", default="", help='what "{workdir}" in the recipe\'s paths stands for')
  parser.add_argument("--path", help="the data: a JSON or JSONL file, a folder of shards, or tfds:NAME:SPLIT")
  parser.add_argument("--image_folder", help="what relative image paths are relative to")
  parser.add_argument("--template", help="of the conversations (default: vicuna_v1)")
  parser.add_argument("--max_length", type=int, help="places of a row (default: 2048)")
  parser.add_argument("--max_images", type=int, help="images that a row has room for (default: 1)")
  parser.add_argument("--on_bad_sample", choices=("error", "skip", "replace"), help="as in a recipe")
  parser.add_argument("--max_bad_share", type=float, help="as in a recipe (default: 0.01)")
  parser.add_argument("--seed", type=int, default=None, help="of a mix's random shares (default: the recipe's, or 0)")
  parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="that share the work")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
  """The options of `processor`."""
  parser.add_argument("--llm", default="", help="folder of the language model, for its tokenizer (without --config)")
  parser.add_argument(
    "--tokens_per_image", type=int, default=TOKENS_PER_IMAGE, help=f"without --config (default: {TOKENS_PER_IMAGE})"
  )


@dataclasses.dataclass
class DataSettings:
  """data: the stage's, options applied. recipe: the whole configuration, or None where there is none."""

  data: DataConfig
  seed: int
  recipe: object
  stage: object

  def open(self) -> Records:
    """The samples. Raises DataError or ConfigError."""
    return open_data(self.data, self.seed)


def data_settings(args: argparse.Namespace) -> DataSettings:
  """What the options say. Raises ConfigError where they name no data."""
  recipe = stage = None
  data = DataConfig()
  if args.config:
    workdir = [f"--workdir={args.workdir}"] if args.workdir else []
    recipe, folder, _ = parse(["data", f"--config={args.config}", *args.overrides, *workdir])
    recipe = preflight.in_workdir(recipe, str(folder))
    stage = getattr(recipe, args.stage)
    data = stage.data
  elif args.overrides:
    raise ConfigError(f"{args.overrides[0]} overrides a recipe; name it with --config=FILE")
  names = ("path", "image_folder", "template", "max_length", "max_images", "on_bad_sample", "max_bad_share")
  data = dataclasses.replace(
    data, **{name: getattr(args, name) for name in names if getattr(args, name, None) is not None}
  )
  if not data.path and not data.mix:
    raise ConfigError("which data? name a recipe with --config=FILE, or the data with --path=FILE --image_folder=DIR")
  seed = args.seed if args.seed is not None else (recipe.seed if recipe else 0)
  return DataSettings(data, seed, recipe, stage)


def processor(args: argparse.Namespace, settings: DataSettings) -> Processor | None:
  """What makes rows of the samples; None without a recipe and without --llm. Raises what `build` raises."""
  if not settings.recipe and not args.llm:
    return None
  if settings.recipe:
    from mllm_jax import build  # takes seconds

    model = build.architecture(settings.recipe.model, settings.stage.lora)
    return build.make_processor(model, build.tokenizer_folder(settings.recipe.model.llm), settings.data)
  data = settings.data
  tokenizer = load_tokenizer(args.llm)
  return Processor(
    tokenizer, Square(VisionConfig(), args.tokens_per_image), data.template, data.max_length, data.max_images
  )
