"""Writes a data set as ArrayRecord shards with the encoded images inside, which a run reads as data.path.

Every shard holds the same samples whenever it is written, is written beside and then renamed. So the command may be
stopped at any time; started again, it goes on with the shards that are not there.
"""

import argparse
import hashlib
import io
import json
import multiprocessing
import os
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from mllm_jax.data import images
from mllm_jax.data.bad_samples import FILE, check_share
from mllm_jax.data.records import DataError, Records, Sample
from mllm_jax.data.sources import SHARD, outlines
from mllm_jax.data.sources.array_record import (
  MANIFEST,
  PLAN,
  VERSION,
  WRITE_OPTIONS,
  encode_record,
  header_of,
  read_manifest,
)
from mllm_jax.data_commands.settings import add_data_arguments, data_settings

PURPOSE = "write the data as ArrayRecord shards with the images inside; --out is then a data.path"
IDENTIFIED = 1000  # samples whose content tells one data set from another
JPEG_QUALITY = 95


def add_arguments(parser: argparse.ArgumentParser) -> None:
  add_data_arguments(parser)
  parser.add_argument("--out", required=True, help="the folder to write")
  parser.add_argument("--samples_per_shard", type=int, default=2048)
  parser.add_argument("--max_side", type=int, default=0, help="shrink images whose longer side is above it; 0: none")


def run(args: argparse.Namespace) -> int:
  """Returns 0 when the folder is finished. Raises DataError for a bad sample, or too many of them."""
  settings = data_settings(args)
  records, out = settings.open(), Path(args.out)
  if args.samples_per_shard < 1 or args.max_side < 0:
    raise DataError("--samples_per_shard must be 1 or more, and --max_side 0 or more")
  plan = {
    "format": VERSION,
    "samples": len(records),
    "samples_per_shard": args.samples_per_shard,
    "max_side": args.max_side,
    "on_bad_sample": "error" if settings.data.on_bad_sample == "error" else "skip",
    "content": content_hash(records),
  }
  if finished(out, plan):
    print(f"{out} is finished already")
    return 0
  begin(out, plan)
  names = shard_names(len(records), args.samples_per_shard)
  todo = [number for number, name in enumerate(names) if not written(out, name)]
  work = [(number, names[number], plan, str(out)) for number in todo]
  bad = sum(planned(number, plan) - count(out / name) for number, name in enumerate(names) if number not in set(todo))
  seen = sum(planned(number, plan) for number in range(len(names)) if number not in set(todo))
  with tqdm(total=len(records), initial=seen, desc="prepare", unit="sample", dynamic_ncols=True) as bar:
    for number, problems in in_processes(records, work, args.processes):
      bad, seen = bad + len(problems), seen + planned(number, plan)
      with open(out / FILE, "a", encoding="utf-8") if problems else io.StringIO() as file:
        for index, problem in problems:
          file.write(json.dumps({"index": index, "problem": problem}, ensure_ascii=False) + "\n")
      bar.update(planned(number, plan))
  check_share(bad, seen, settings.data.max_bad_share, f"; {out / FILE} lists them")
  if bad == seen:
    raise DataError(f"{records.source}: not one of its {seen} samples can be used; {out / FILE} says why")
  shards = [
    {
      "name": name,
      "samples": count(out / name),
      "bytes": (out / name).stat().st_size,
      "outlines": (out / outlines.name_for(name)).stat().st_size,
    }
    for name in names
  ]
  write_json(out / MANIFEST, {**plan, "shards": shards})
  (out / PLAN).unlink()
  print(f"{seen - bad:,} samples in {len(names)} shards" + (f", {bad:,} bad ones left out" if bad else ""))
  print(f"train on them with data.path={out}")
  return 0


def content_hash(records: Records) -> str:
  """What tells a data set from another: the text of up to IDENTIFIED samples spread over it."""
  digest = hashlib.sha256()
  for i in range(0, len(records), max(1, len(records) // IDENTIFIED)):
    try:
      digest.update(encode_record(records[i], []))
    except DataError as error:
      digest.update(str(error).encode("utf-8", "surrogateescape"))
  return digest.hexdigest()


def finished(out: Path, plan: dict) -> bool:
  """Whether the folder holds all of this already. Raises DataError where it holds something else."""
  manifest = read_manifest(str(out))
  if manifest is None:
    return False
  refuse_other(out, {key: manifest.get(key) for key in plan}, plan)
  return all(written(out, shard["name"]) for shard in manifest["shards"])


def begin(out: Path, plan: dict) -> None:
  """Makes the folder, or takes up the one that was left. Raises DataError where it is of other data."""
  out.mkdir(parents=True, exist_ok=True)
  if (out / PLAN).exists():
    refuse_other(out, json.loads((out / PLAN).read_text(encoding="utf-8")), plan)
  elif any(out.glob("*" + SHARD)) and not (out / MANIFEST).exists():
    raise DataError(f"{out}: holds shards of something else; use another --out")
  write_json(out / PLAN, plan)


def refuse_other(out: Path, there: dict, plan: dict) -> None:
  other = [f"{key} {there.get(key)}, now {plan[key]}" for key in plan if there.get(key) != plan[key]]
  if other:
    raise DataError(f"{out}: was begun with something else ({'; '.join(other)}); use another --out or remove it")


def shard_names(samples: int, per_shard: int) -> list[str]:
  number = -(-samples // per_shard)
  return [f"data-{i:05d}-of-{number:05d}{SHARD}" for i in range(number)]


def written(out: Path, name: str) -> bool:
  """Whether a shard is there, and its outlines, which versions before them did not write."""
  return (out / name).is_file() and (out / outlines.name_for(name)).is_file()


def planned(number: int, plan: dict) -> int:
  """Samples meant for a shard."""
  return min(plan["samples_per_shard"], plan["samples"] - number * plan["samples_per_shard"])


def count(shard: Path) -> int:
  """Records in a shard."""
  from array_record.python import array_record_module

  reader = array_record_module.ArrayRecordReader(str(shard))
  try:
    return reader.num_records()
  finally:
    reader.close()


def in_processes(records: Records, work: list[tuple], processes: int):
  """(shard, [(sample, problem)]) for each shard, as they get ready."""
  if processes <= 1 or len(work) <= 1:
    for each in work:
      yield write_shard(records, *each)
    return
  context = multiprocessing.get_context("spawn")  # the library's threads do not survive a fork
  with context.Pool(min(processes, len(work)), _remember, (records,)) as pool:
    yield from pool.imap_unordered(_write_remembered, work)


def _remember(records: Records) -> None:
  global _records
  _records = records


def _write_remembered(work: tuple) -> tuple[int, list[tuple[int, str]]]:
  return write_shard(_records, *work)


def write_shard(records: Records, number: int, name: str, plan: dict, out: str) -> tuple[int, list[tuple[int, str]]]:
  """Writes one shard. Raises DataError for a bad sample where the plan does not leave them out."""
  from array_record.python import array_record_module

  target, partial = os.path.join(out, name), os.path.join(out, name + ".partial")
  writer = array_record_module.ArrayRecordWriter(partial, WRITE_OPTIONS)
  lines, problems = [], []
  first = number * plan["samples_per_shard"]
  for i in range(first, first + planned(number, plan)):
    try:
      sample = records[i]
      stored = [encoded(image, sample, plan["max_side"]) for image in sample.images]
      sizes = [images.size(image, sample_name=sample.name) for image in stored]
      writer.write(encode_record(sample, stored))
      lines.append(outlines.encode(header_of(sample), sizes))
    except DataError as error:
      if plan["on_bad_sample"] == "error":
        writer.close()
        raise DataError(f"{error}; --on_bad_sample=skip leaves such samples out") from error
      problems.append((i, str(error)))
  writer.close()
  beside = os.path.join(out, outlines.name_for(name))
  outlines.write(beside + ".partial", lines)
  os.replace(beside + ".partial", beside)
  os.replace(partial, target)
  return number, problems


def encoded(image: str | bytes, sample: Sample, max_side: int) -> bytes:
  """The bytes to store. Raises DataError where they are no image that can be decoded."""
  name = f"{sample.name}: image {image if isinstance(image, str) else 'inside the record'}"
  data = images.read(image, name)
  picture, _ = images.decode(data, name)
  if not max_side or max(picture.size) <= max_side:
    return data
  scale = max_side / max(picture.size)
  size = tuple(max(1, round(side * scale)) for side in picture.size)
  with Image.open(io.BytesIO(data)) as stored:
    options = {"format": "JPEG", "quality": JPEG_QUALITY} if stored.format == "JPEG" else {"format": "PNG"}
  buffer = io.BytesIO()
  picture.resize(size, Image.Resampling.BICUBIC).save(buffer, **options)
  return buffer.getvalue()


def write_json(path: Path, content) -> None:
  partial = path.with_name(path.name + ".partial")
  partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
  os.replace(partial, path)
