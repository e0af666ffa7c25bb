"""Looks at every sample of a data set, images decoded, and says what is wrong before a run does."""

import argparse
import collections
import dataclasses
import json
import multiprocessing
from collections.abc import Iterator, Sequence

from tqdm import tqdm

from mllm_jax.data import chat, image_files, images
from mllm_jax.data.processor import Processor
from mllm_jax.data.records import DataError, Records, Sample, sample_problems
from mllm_jax.data_commands.settings import add_data_arguments, add_model_arguments, data_settings, processor

PURPOSE = "look at every sample, images decoded: a table of what is wrong, and a file of it"
SAMPLES = 100  # that a process looks at before it reports
EXAMPLES = 3
# Padded to a square and shrunk to 24 x 24 patches (CLIP-L/14 at 336 pixels), a longer strip is thinner than a patch.
LONGEST = 24
USUAL_MODES = ("RGB", "L", "P", "RGBA", "CMYK", "1", "LA")


@dataclasses.dataclass(frozen=True)
class Finding:
  """One thing about one sample. unusable: a run cannot train on it; otherwise it is worth knowing."""

  index: int
  sample: str
  kind: str
  unusable: bool
  text: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
  add_data_arguments(parser)
  add_model_arguments(parser)
  parser.add_argument("--out", default="", help="JSON Lines file for all findings")
  parser.add_argument("--skip_lengths", action="store_true", help="do not tokenize; needs no model's files")


def run(args: argparse.Namespace) -> int:
  """Returns 1 if a sample is unusable, else 0."""
  settings = data_settings(args)
  maker = None if args.skip_lengths else processor(args, settings)
  records = settings.open()
  counts, unusable = collections.Counter(), set()
  examples = collections.defaultdict(list)
  out = open(args.out, "w", encoding="utf-8") if args.out else None
  try:
    for finding in find_all(records, maker, settings.data.max_images, settings.seed, args.processes):
      counts[finding.unusable, finding.kind] += 1
      if len(examples[finding.kind]) < EXAMPLES:
        examples[finding.kind].append(finding)
      if finding.unusable:
        unusable.add(finding.index)
      if out:
        out.write(json.dumps(dataclasses.asdict(finding), ensure_ascii=False) + "\n")
  finally:
    if out:
      out.close()
  if counts:
    print(table(counts, examples))
  if maker is None:
    print("lengths were not looked at; name the language model's folder with --llm, or a recipe with --config")
  print(f"{len(records):,} samples, {len(unusable):,} of them unusable" + (f"; all in {args.out}" if args.out else ""))
  return 1 if unusable else 0


def table(counts: collections.Counter, examples: dict[str, list[Finding]]) -> str:
  """A line for each kind with its count, and the first examples below it; what is unusable comes first."""
  lines = []
  for (unusable, kind), count in sorted(counts.items(), key=lambda item: (not item[0][0], -item[1], item[0][1])):
    lines.append(f"{'unusable' if unusable else 'note':9s} {kind:20s} {count:10,}")
    lines += [f"    {finding.sample}: {finding.text}" for finding in examples[kind]]
  return "\n".join(lines)


def find_all(
  records: Records, maker: Processor | None, max_images: int, seed: int, processes: int
) -> Iterator[Finding]:
  """Findings in the order of the samples, with a progress bar."""
  parts = [range(start, min(start + SAMPLES, len(records))) for start in range(0, len(records), SAMPLES)]
  with tqdm(total=len(records), desc="check", unit="sample", dynamic_ncols=True, smoothing=0) as bar:
    if processes <= 1 or len(parts) == 1:
      for part in parts:
        yield from find_in(records, part, maker, max_images, seed)
        bar.update(len(part))
      return
    # Not forked: threads of the libraries already loaded would leave their locks behind.
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(processes, len(parts)), _remember, (records, maker, max_images, seed)) as pool:
      for part, findings in zip(parts, pool.imap(_find_remembered, parts)):
        yield from findings
        bar.update(len(part))


def _remember(*work) -> None:
  global _work
  _work = work


def _find_remembered(part: range) -> list[Finding]:
  records, *settings = _work
  return find_in(records, part, *settings)


def find_in(records: Records, part: range, maker: Processor | None, max_images: int, seed: int) -> list[Finding]:
  """Everything about some samples."""
  found = []
  for i in part:
    try:
      sample = records[i]
    except DataError as error:
      found.append(Finding(i, f"{records.source}, sample {i}", "structure", True, _without_name(str(error))))
      continue
    add = lambda kind, unusable, text: found.append(Finding(i, sample.name, kind, unusable, text))
    problems = sample_problems(sample, max_images)
    for problem in problems:
      add(problem.kind, True, problem.text)
    empty = sum(turn.role == "gpt" and not turn.text for turn in sample.turns)
    if empty and not any(problem.kind == "no answer" for problem in problems):
      add("empty answer", False, f"{empty} of its answers are empty; they are not trained on")
    missing = any(problem.kind == "missing image" for problem in problems)
    sizes = [] if missing else [_look_at(image, add) for image in sample.images]
    if maker is not None and not problems and None not in sizes:
      _measure(sample, sizes, maker, seed, add)
  return found


def _without_name(text: str) -> str:
  """The part of an error behind the sample's name."""
  return text.partition(": ")[2] or text


def _look_at(image: str | bytes, add) -> tuple[int, int] | None:
  """Says what is to be said about an image; its (width, height), None where it cannot be used."""
  what = image if isinstance(image, str) else f"of {len(image):,} bytes"
  if isinstance(image, str):
    found = image_files.locate(image)
    if found != image:
      add("other extension", False, f"image {image} is missing, and {found} is taken")
  try:
    picture, mode = images.load_with_mode(image)
  except DataError as error:
    add("corrupt image", True, str(error))
    return None
  if mode not in USUAL_MODES:
    add("odd mode", False, f"image {what} has pixels of mode {mode}, which are rescaled to 8 bits")
  width, height = picture.size
  if max(width, height) > LONGEST * min(width, height):
    add("extreme shape", False, f"image {what} has {width} x {height} pixels")
  try:
    images.check_square(picture)
  except DataError as error:
    add("extreme shape", True, f"image {what}: {error}")
    return None
  return picture.size


def _measure(sample: Sample, sizes: Sequence[tuple[int, int]], maker: Processor, seed: int, add) -> None:
  """Whether a row has room for the sample, whose images have these (widths, heights)."""
  try:
    encoded = chat.encode(sample.turns, maker.template, maker.tokenizer, len(sizes), sample.system)
  except DataError as error:
    add("template", True, str(error))
    return
  try:
    sizes = maker.training_sizes(sample, sizes, seed)
    crops = sum(maker.image_cost(*size)[0] for size in sizes)
    length = len(maker.places(encoded, sizes).tokens)
  except DataError as error:
    add("extreme shape", True, str(error))
    return
  if crops > maker.max_images:
    text = f"its images become {crops} crops, and a row has room for {maker.max_images}; raise data.max_images"
    add("too many images", True, text)
    return
  if length <= maker.max_length:
    return
  text = f"takes {length} places of max_length={maker.max_length}"
  if maker.places(encoded, sizes, maker.max_length).loss_weights.any():
    add("truncated", False, f"{text}; what is beyond is cut")
  else:
    add("nothing to train on", True, f"{text}, and no answer is left; raise data.max_length or take the sample out")
