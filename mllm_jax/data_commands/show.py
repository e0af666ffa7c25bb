"""show: one HTML page of samples as the model gets them: pixels, tokens, what is trained on, what is cut off.

    python -m mllm_jax.data show --config=configs/sp_cropping.py --stage=finetune --out=samples.html
    python -m mllm_jax.data show --path=train.json --image_folder=images --llm=weights/vicuna-7b-v1.5

This is where a wrong template, a wrong tokenizer or a cut answer is seen.
"""

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

from mllm_jax.config import ConfigError
from mllm_jax.data.records import DataError
from mllm_jax.data_commands import show_page
from mllm_jax.data_commands.settings import (
  add_data_arguments,
  add_model_arguments,
  data_settings,
  processor,
  tokenizer_name,
)

PURPOSE = "an HTML page of samples as the model gets them; --seed chooses them at random"


def add_arguments(parser: argparse.ArgumentParser) -> None:
  add_data_arguments(parser)
  add_model_arguments(parser)
  parser.add_argument("--count", type=int, default=20, metavar="N", help="samples shown (default: 20, the first ones)")
  parser.add_argument("--ids", metavar="A,B", help="samples with these ids, in place of --count")
  parser.add_argument("--out", default="samples.html", metavar="FILE", help="the page (default: samples.html)")


def run(args: argparse.Namespace) -> int:
  """Writes the page. Raises ConfigError or DataError for what has to be put right first."""
  if args.count < 1:
    raise ConfigError(f"--count={args.count} must be 1 or more")
  settings = data_settings(args)
  records, data = settings.open(), settings.data
  chosen = choose(records, args)
  maker = processor(args, settings)
  if maker is None:
    raise ConfigError(
      "whose tokenizer? name the language model's folder with --llm=DIR, or a recipe with --config=FILE"
    )
  title = f"{Path(records.source).name}: {len(chosen)} of {len(records):,} samples"
  facts = {
    "data": records.source,
    "template": data.template,
    "tokenizer": tokenizer_name(args, settings),
    "places": f"{data.max_length:,}",
    "images": f"{maker.vision.image_size} pixels, {data.image_aspect}, {maker.tokens_per_crop} tokens each crop",
  }
  page = show_page.page(title, facts, records, chosen, maker, bool(args.config), settings.seed)
  try:
    Path(args.out).write_text(page, encoding="utf-8")
  except OSError as error:
    raise DataError(f"{args.out}: cannot be written ({error.strerror}); name another file with --out") from error
  print(f"{len(chosen)} samples in {args.out}")
  return 0


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
