"""How long a data set's samples are, and what each way of batching makes of them.

An epoch's cost is counted in places: what the decoder computes, padding included. "released" is LLaVA's own sampler on
--devices devices, each padding its rows to the longest of them.
"""

import argparse
import dataclasses
import time
from typing import NamedTuple

import numpy as np

from mllm_jax.config import ConfigError, StageConfig
from mllm_jax.data.grouping import released_order
from mllm_jax.data.lengths import SAMPLES_PER_WORKER, LengthTable, measure
from mllm_jax.data.order import FixedOrder, GroupedOrder, PackedOrder
from mllm_jax.data.pipeline import TrainingBatches
from mllm_jax.data.processor import Processor
from mllm_jax.data.records import Records
from mllm_jax.data_commands.settings import (
  DataSettings,
  add_data_arguments,
  add_model_arguments,
  data_settings,
  processor,
)

PURPOSE = "lengths of the samples, and the padding and the steps of each batching"
SP_TOKENS = 582  # of one image in LLaVA-SP: 24 x 24 patches and 6 spatial tokens
BAR = 40  # characters of the histogram's longest bar
EIGHTHS = " ▏▎▍▌▋▊▉█"
PACKED_LENGTHS = (1, 2, 4)  # rows tried for packing, in max_length


class Cost(NamedTuple):
  """What one epoch takes. rows, steps; places, padding included; used: places that are not padding; note: settings."""

  name: str
  rows: int
  steps: int
  places: int
  used: int
  note: str = ""

  @property
  def padding(self) -> float:
    return 1 - self.used / self.places


def add_arguments(parser: argparse.ArgumentParser) -> None:
  add_data_arguments(parser)
  add_model_arguments(parser)
  parser.add_argument("--batch_size", type=int, default=0, help="rows of a step (128)")
  parser.add_argument("--accumulation", type=int, default=0, help="micro-batches of a step (8)")
  parser.add_argument("--devices", type=int, default=8, help="devices of the released sampler")
  parser.add_argument("--synthetic", type=int, default=0, metavar="N", help="N made-up lengths like mix665k's instead")
  parser.add_argument("--images", type=int, default=0, metavar="N", help="also decode N samples, and time that")
  parser.add_argument("--workers", type=int, default=0, help="processes for --images; 0: threads of this one")


def run(args: argparse.Namespace) -> int:
  """Prints everything. Raises ConfigError or DataError for what has to be put right first."""
  settings = data_settings(args, needed=not args.synthetic)
  sizes = {name: getattr(args, name) for name in ("batch_size", "accumulation") if getattr(args, name)}
  stage = settings.stage or StageConfig(batch_size=128, accumulation=8)
  stage = dataclasses.replace(stage, data=settings.data, **sizes)
  for name in ("batch_size", "accumulation", "synthetic", "images", "workers"):
    if getattr(args, name) < 0:
      raise ConfigError(f"--{name}={getattr(args, name)} must be 0 or more")
  if args.devices < 1:
    raise ConfigError(f"--devices={args.devices} must be 1 or more")
  if args.synthetic and args.images:
    raise ConfigError("--images decodes a data set's pictures; --synthetic has none")
  records = maker = None
  if args.synthetic:
    table = synthetic_lengths(args.synthetic, args.tokens_per_image or SP_TOKENS, settings.seed)
  else:
    maker = processor(args, settings)
    if maker is None:
      raise ConfigError(
        "whose lengths? name the language model's folder with --llm=DIR, or a recipe with --config=FILE"
      )
    records = settings.open()
    table = _measured(records, maker, settings, args.processes)
  print(histogram(np.minimum(table.places, stage.data.max_length), stage.data.max_length))
  print(modalities(table, stage.data.max_length))
  print(cost_table(costs(table, stage, args.devices, settings.seed)))
  if args.images:
    print(decoding(records, maker, args.images, args.workers, settings.seed))
  return 0


def _measured(records: Records, maker: Processor, settings: DataSettings, processes: int) -> LengthTable:
  from tqdm import tqdm

  workers = min(processes, len(records) // SAMPLES_PER_WORKER)
  with tqdm(total=len(records), desc="lengths", unit="sample", dynamic_ncols=True) as bar:
    return measure(records, maker, workers, bar.update, settings.data.on_bad_sample, settings.seed)


def synthetic_lengths(count: int, tokens_per_image: int = SP_TOKENS, seed: int = 0) -> LengthTable:
  """Lengths like those of LLaVA-1.5's mix665k: 62 % questions and answers of many short turns, 24 % long answers, 6 %
  long conversations without an image, 8 % captions. The shapes are assumed, not measured."""
  rng = np.random.default_rng(seed)
  kind = rng.choice(4, count, p=[0.62, 0.24, 0.06, 0.08])
  system = 45  # places of Vicuna's system text with its roles
  turns = 1 + rng.poisson(rng.gamma(2.0, 3.0, count))
  text = np.choose(
    kind,
    [
      turns * rng.integers(12, 26, count),
      rng.lognormal(np.log(230), 0.5, count).astype(int),
      rng.lognormal(np.log(900), 0.9, count).astype(int),
      rng.integers(15, 60, count),
    ],
  )
  images = (kind != 2).astype(np.int32)
  places = (system + text + images * tokens_per_image).astype(np.int32)
  words = np.maximum(1, text * 3 // 4).astype(np.int32)  # about four tokens are three English words
  return LengthTable(places, images, words, images)


def costs(table: LengthTable, stage: StageConfig, devices: int = 8, seed: int = 0) -> list[Cost]:
  """What an epoch takes with each batching, the released sampler first.

  Raises:
    ConfigError: the batch does not divide over micro-batches or devices.
  """
  data, batch, micro_batches = stage.data, stage.batch_size, stage.accumulation
  if batch % devices or batch % micro_batches or len(table) < batch:
    raise ConfigError(
      f"batch_size={batch} must be a multiple of --devices={devices} and of accumulation={micro_batches}, and "
      f"there are {len(table)} samples"
    )
  places = np.minimum(table.places, data.max_length)
  used = int(places.sum())

  order = released_order(table.signed_words, batch // devices, devices, np.random.default_rng([seed, 0]).permutation)
  starts = range(0, len(order), batch // devices)
  longest = [places[order[i : i + batch // devices]] for i in starts]
  released = sum(len(part) * int(part.max()) for part in longest)
  steps = -(-len(table) // batch)
  result = [Cost("released", len(table), steps, released, used, f"{devices} devices x {batch // devices} rows")]

  fixed = FixedOrder(len(table), data.max_length, batch, 1.0, 0, seed)
  result.append(Cost("fixed", len(table), fixed.steps, len(table) * data.max_length, used, f"{data.max_length}"))

  grouped = GroupedOrder(table, data.max_length, data.buckets, batch, micro_batches, 1.0, 0, seed)
  rows = batch // micro_batches
  total = sum(grouped.length(i) for i in range(grouped.steps * micro_batches)) * rows
  lengths = "/".join(map(str, grouped.buckets))
  result.append(
    Cost("group", grouped.steps * batch, grouped.steps, total, used, f"{micro_batches} x {rows} of {lengths}")
  )

  image_length = places[table.crops > 0].mean() if table.crops.any() else data.max_length
  for row_length in [data.row_length] if data.row_length else [n * data.max_length for n in PACKED_LENGTHS]:
    crops = data.max_images
    if data.batching != "pack":
      crops = max(int(table.crops.max()), round(row_length / image_length * table.crops[table.crops > 0].mean()), 1)
    packed = PackedOrder(table, data.max_length, row_length, crops, 1, 1.0, 0, seed)
    unused = 1 - int(table.crops.sum()) / (packed.steps * crops)
    note = f"{row_length}, max_images {crops} ({unused:.0%} unused)"
    result.append(Cost("pack", packed.steps, packed.steps // batch, packed.steps * row_length, used, note))
  return result


def cost_table(rows: list[Cost]) -> str:
  """The costs as text, each epoch's places beside the first row's."""
  lines = [f"{'batching':10s} {'rows':>9s} {'steps':>8s} {'padding':>8s} {'places':>9s} {'epoch':>7s}  rows of"]
  for row in rows:
    lines.append(
      f"{row.name:10s} {row.rows:9,d} {row.steps:8,d} {row.padding:8.1%} {row.places / 1e6:8.1f}M "
      f"{row.places / rows[0].places:7.1%}  {row.note}"
    )
  return "\n".join(lines)


def histogram(places: np.ndarray, max_length: int, bins: int = 16) -> str:
  """How many samples are how long, as bars."""
  edges = np.unique(max_length * np.arange(bins + 1) // bins)
  counts, _ = np.histogram(places, edges + (np.arange(len(edges)) > 0))  # a bin holds its upper edge
  lines = [f"{'places':>13s}"]
  for low, high, count in zip(edges[:-1], edges[1:], counts):
    eighths = round(8 * BAR * int(count) / max(1, int(counts.max())))
    bar = EIGHTHS[8] * (eighths // 8) + (EIGHTHS[eighths % 8] if eighths % 8 else "")
    lines.append(f"{low + 1:6d}-{high:6d} {count:9,d} {bar}")
  return "\n".join(lines) + "\n"


def modalities(table: LengthTable, max_length: int) -> str:
  """Samples with one image, with several and with none, and how many are too long."""
  lines = [f"{'samples':18s} {'number':>9s} {'share':>7s} {'mean':>7s} {'longest':>8s} {'truncated':>10s}"]
  kinds = {
    "one image": table.images == 1,
    "several images": table.images > 1,
    "text only": table.images == 0,
    "all": table.images >= 0,
  }
  for name, chosen in kinds.items():
    places = table.places[chosen]
    if len(places):
      lines.append(
        f"{name:18s} {len(places):9,d} {len(places) / len(table):7.1%} {places.mean():7.0f} {places.max():8,d} "
        f"{(places > max_length).mean():10.2%}"
      )
  return "\n".join(lines) + "\n"


def decoding(records: Records, processor: Processor, count: int, workers: int, seed: int) -> str:
  """Samples a second from the files to rows."""
  batch_size = max(1, min(16, len(records), count // 4))
  batches = iter(
    TrainingBatches(
      records, processor, batch_size=batch_size, steps=1 + -(-count // batch_size), seed=seed, workers=workers
    )
  )
  next(batches)  # starting threads or processes is not counted
  start = time.perf_counter()
  made = sum(len(ids) for ids, _ in batches)
  seconds = time.perf_counter() - start
  return f"\n{made / seconds:.1f} samples/s decoded, resized and tokenized ({workers or 'no'} worker processes)"
