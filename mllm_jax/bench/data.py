"""Decoding, padding, resizing and tokenizing against a PyTorch DataLoader on the same files.

The other side is what LLaVA's users run: a Dataset that opens the picture, pads it to a square, gives it to
transformers' CLIPImageProcessor, tokenizes the prompt chunk by chunk and once more round by round to find its labels,
and a collator that pads. The image processor is the one on Pillow and NumPy that the released code uses
(CLIPImageProcessorPil in transformers 5; the other one, on torchvision, gives other pixels).

Both sides have the same worker processes and see every sample once in each repetition, in turns, the first batch not
counted. Beside samples a second stands the processor time of a sample, which other work on the machine changes less.
Needs `pip install torch==2.13.0`.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from mllm_jax.bench import count
from mllm_jax.config import VisionConfig
from mllm_jax.data.aspects import Square
from mllm_jax.data.chat import VICUNA_SYSTEM, load_tokenizer
from mllm_jax.data.pipeline import TrainingBatches
from mllm_jax.data.processor import Processor
from mllm_jax.data.records import Records

TOKENIZER = Path(__file__).parents[1] / "demo" / "assets" / "llama"
VISION = VisionConfig()
SIZES = ((640, 480), (480, 640), (640, 427), (500, 375))  # of COCO's pictures
WORDS = "what colour is the small bus on the left and how many people stand near it in front of a house".split()
IGNORE, IMAGE_TOKEN = -100, -200  # in the released code's labels and ids


class Speed(NamedTuple):
  """samples: a second. cpu: milliseconds of processor time that a sample takes, in all processes together."""

  samples: float
  cpu: float


def write(folder: Path, samples: int) -> None:
  """A LLaVA JSON with JPEGs of noise on several scales; they take about as many bytes as photographs."""
  draw = np.random.default_rng(0)
  content = []
  for number in range(samples):
    width, height = SIZES[number % len(SIZES)]
    coarse = draw.integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    noisy = np.asarray(picture, np.int16) + draw.integers(-12, 13, (height, width, 3), np.int16)
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{number}.jpg", quality=90)
    turns = []
    for turn in range(draw.integers(1, 6)):
      question, answer = (" ".join(draw.choice(WORDS, draw.integers(5, 25))) for _ in range(2))
      turns += [{"from": "human", "value": ("" if turn else "<image>\n") + question}, {"from": "gpt", "value": answer}]
    content.append({"id": str(number), "image": f"{number}.jpg", "conversations": turns})
  (folder / "data.json").write_text(json.dumps(content))


def ours(folder: Path, batch: int, steps: int, workers: int) -> Speed:
  """This package's batches of the files in a folder."""
  processor = Processor(load_tokenizer(str(TOKENIZER)), Square(VISION, VISION.grid**2), "vicuna_v1", 2048, 1)
  records = Records.load(str(folder / "data.json"), str(folder))
  return timed(iter(TrainingBatches(records, processor, batch_size=batch, threads=1, workers=workers)), batch, steps)


def theirs(folder: Path, batch: int, steps: int, workers: int) -> Speed:
  """A PyTorch DataLoader's with the released way of preparing a sample."""
  import torch

  loader = torch.utils.data.DataLoader(
    Released(folder), batch_size=batch, shuffle=True, num_workers=workers, collate_fn=collate, drop_last=True
  )
  return timed(iter(loader), batch, steps)


def timed(batches: Iterator, batch: int, steps: int) -> Speed:
  """The speed after the first of all batches, which waits for the workers to start."""
  next(batches)
  start, used, count = time.perf_counter(), processor_seconds(), (steps - 1) * batch
  for _ in range(steps - 1):
    next(batches)
  seconds, used = time.perf_counter() - start, processor_seconds() - used
  for _ in batches:
    pass
  return Speed(count / seconds, 1000 * used / count)


def processor_seconds() -> float:
  """Seconds of processor time of this process and its workers so far."""
  total = time.process_time()
  for worker in multiprocessing.active_children():
    try:
      fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # it has ended, or this is no Linux
      continue
    total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
  return total


class Released:
  """A Dataset as LLaVA's users write it."""

  def __init__(self, folder: Path):
    from transformers import AutoTokenizer

    try:
      from transformers import CLIPImageProcessorPil as ImageProcessor
    except ImportError:  # before transformers 5
      from transformers import CLIPImageProcessor as ImageProcessor

    self.folder = folder
    self.samples = json.loads((folder / "data.json").read_text())
    self.tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    side = VISION.image_size
    self.images = ImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})

  def __len__(self) -> int:
    return len(self.samples)

  def __getitem__(self, index: int) -> dict:
    import torch

    sample = self.samples[index]
    image = Image.open(self.folder / sample["image"]).convert("RGB")
    side = max(image.size)
    square = Image.new("RGB", (side, side), tuple(int(255 * mean) for mean in self.images.image_mean))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    pixels = self.images.preprocess(square, return_tensors="pt")["pixel_values"][0]
    turns = [turn["value"] for turn in sample["conversations"]]
    rounds = [f"USER: {question} ASSISTANT: {answer}</s>" for question, answer in zip(turns[::2], turns[1::2])]
    ids = self.tokenize(f"{VICUNA_SYSTEM} " + "".join(rounds))
    labels = list(ids)
    place = 1
    for text in rounds:
      length = len(self.tokenize(text))
      asked = len(self.tokenize(text.split(" ASSISTANT: ")[0] + " ASSISTANT: ")) - 2
      labels[place : place + asked] = [IGNORE] * asked
      place += length
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "image": pixels}

  def tokenize(self, text: str) -> list[int]:
    """Chunk by chunk, each as a text of its own."""
    chunks = [self.tokenizer(chunk).input_ids for chunk in text.split("<image>")]
    return chunks[0] + [token for chunk in chunks[1:] for token in [IMAGE_TOKEN, *chunk[1:]]]


def collate(rows: list[dict]) -> dict:
  """Pads to the longest row."""
  import torch

  pad = lambda name, value: torch.nn.utils.rnn.pad_sequence([row[name] for row in rows], True, value)
  return {
    "input_ids": pad("input_ids", 0),
    "labels": pad("labels", IGNORE),
    "images": torch.stack([row["image"] for row in rows]),
  }


def run(folder: Path, samples: int, batch: int, workers: int, repeat: int) -> dict[str, list[Speed]]:
  """The speeds of both sides in every repetition; the order of the sides changes each time."""
  write(folder, samples)
  sides = {"mllm_jax": ours, "PyTorch": theirs}
  speeds = {name: [] for name in sides}
  for number in range(repeat):
    for name in list(sides)[:: (-1) ** number]:
      speeds[name].append(sides[name](folder, batch, samples // batch, workers))
  return speeds


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(
    prog="python -m mllm_jax.bench data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--samples", type=count, default=960, help="of which each repetition sees all (default: 960)")
  parser.add_argument("--batch", type=count, default=16)
  parser.add_argument("--workers", type=count, default=2, help="processes on each side (default: 2)")
  parser.add_argument("--repeat", type=count, default=5, help="how often each side is measured (default: 5)")
  args = parser.parse_args(argv)
  if args.samples < 2 * args.batch:
    parser.error("--samples must be two batches or more")
  try:
    import torch  # noqa: F401
  except ImportError:
    print("error: the other side of this benchmark needs PyTorch: pip install torch==2.13.0", file=sys.stderr)
    return 2
  folder = Path(tempfile.mkdtemp(prefix="mllm_jax_bench_"))
  try:
    speeds = run(folder, args.samples, args.batch, args.workers, args.repeat)
  finally:
    shutil.rmtree(folder, ignore_errors=True)
  print(table(speeds))
  print(f"load of the machine, last minute: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
  return 0


def table(speeds: dict[str, list[Speed]]) -> str:
  """Medians of both sides, all repetitions behind them, and ratios."""
  lines, medians = [], {}
  for name, found in speeds.items():
    medians[name] = Speed(*(statistics.median(values) for values in zip(*found)))
    each = ", ".join(f"{speed.samples:.0f}" for speed in found)
    lines.append(
      f"{name:10s} {medians[name].samples:7.1f} samples/s {medians[name].cpu:7.2f} ms of CPU each   ({each})"
    )
  mine, other = medians["mllm_jax"], medians["PyTorch"]
  return "\n".join([*lines, f"ratio      {mine.samples / other.samples:7.2f}           {other.cpu / mine.cpu:7.2f}"])
