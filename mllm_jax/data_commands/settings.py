"""Which data a command looks at, and with what model: from a training recipe, or from options of its own."""

import argparse
import dataclasses
import os

from mllm_jax import preflight
from mllm_jax.command_line import parse
from mllm_jax.config import ConfigError, DataConfig, ModelRecipe, StageConfig, VisionConfig
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
  parser.add_argument("--image_aspect", help="how images are made to fit the tower, as in a recipe (default: pad)")
  parser.add_argument("--on_bad_sample", choices=("error", "skip", "replace"), help="as in a recipe")
  parser.add_argument("--max_bad_share", type=float, help="as in a recipe (default: 0.01)")
  parser.add_argument("--seed", type=int, default=None, help="of all random choices (default: the recipe's, or 0)")
  parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="that share the work")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
  """The options of `processor`."""
  parser.add_argument("--llm", default="", help="folder of the language model, for its tokenizer")
  parser.add_argument("--vision", default="", help="folder of the vision tower, for its image size")
  parser.add_argument("--projector", help="its kind, for the number of visual tokens, as model.projector.kind")
  parser.add_argument(
    "--tokens_per_image",
    type=int,
    default=0,
    help=f"visual tokens, where neither --config nor --projector says it (default: {TOKENS_PER_IMAGE})",
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


def data_settings(args: argparse.Namespace, needed: bool = True) -> DataSettings:
  """What the options say. Raises ConfigError where they name no data and some is needed."""
  recipe = stage = None
  data = DataConfig()
  if args.config:
    workdir = [f"--workdir={args.workdir}"] if args.workdir else []
    recipe, folder, _ = parse(["data", f"--config={args.config}", *getattr(args, "overrides", []), *workdir])
    recipe = preflight.in_workdir(recipe, str(folder))
    stage = getattr(recipe, args.stage)
    data = stage.data
  elif getattr(args, "overrides", []):
    raise ConfigError(f"{args.overrides[0]} overrides a recipe; name it with --config=FILE")
  names = ("path", "image_folder", "template", "max_length", "max_images", "image_aspect")
  names += ("on_bad_sample", "max_bad_share")
  data = dataclasses.replace(
    data, **{name: getattr(args, name) for name in names if getattr(args, name, None) is not None}
  )
  if recipe and recipe.demo and not args.path and not os.path.exists(data.path):
    from mllm_jax.demo.write import Sizes, write

    write(folder / "data", seed=0, sizes=Sizes(shapes=recipe.demo_shapes))
  if needed and not data.path and not data.mix:
    raise ConfigError("which data? name a recipe with --config=FILE, or the data with --path=FILE --image_folder=DIR")
  seed = args.seed if args.seed is not None else (recipe.seed if recipe else 0)
  return DataSettings(data, seed, recipe, stage)


def processor(args: argparse.Namespace, settings: DataSettings) -> Processor | None:
  """What makes rows of the samples; None without a recipe and without --llm.

  Raises:
    ConfigError, DataError: a model's files cannot be used.
  """
  data = settings.data
  if not settings.recipe and not args.llm:
    return None
  if not settings.recipe and not args.vision and not args.projector:
    tokens = args.tokens_per_image or TOKENS_PER_IMAGE
    tokenizer = load_tokenizer(args.llm)
    if data.image_aspect != "pad":
      raise ConfigError(f"--image_aspect={data.image_aspect} needs a model: name --config, or --vision and --projector")
    aspect = Square(VisionConfig(), tokens)
    return Processor(tokenizer, aspect, data.template, data.max_length, data.max_images)
  from mllm_jax import build  # takes seconds
  from mllm_jax.processors import make_processor
  from mllm_jax.weights.known import WeightsError

  recipe = settings.recipe.model if settings.recipe else ModelRecipe()
  given = {name: getattr(args, name) for name in ("llm", "vision") if getattr(args, name)}
  projector = recipe.projector
  if args.projector:
    projector = dataclasses.replace(projector, kind=args.projector)
  if data.image_aspect == "anyres":
    projector = dataclasses.replace(projector, image_newline=True)
  recipe = dataclasses.replace(recipe, projector=projector, **given)
  try:
    model = build.architecture(recipe, (settings.stage or StageConfig()).lora)
    return make_processor(model, build.tokenizer_folder(recipe.llm), data)
  except WeightsError as error:
    raise ConfigError(str(error)) from error


def tokenizer_name(args: argparse.Namespace, settings: DataSettings) -> str:
  """Whose tokenizer it is."""
  return args.llm or (settings.recipe.model.llm if settings.recipe else "")
