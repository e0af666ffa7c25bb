"""LLaVA-SP-cropping's LoRA step on this device, beside the same step in PyTorch: samples a second, MFU, peak memory.

The step is the trainer's own, tower in front, on one device; the weights are random, and so is the batch, whose rows
hold a picture each and no padding. PyTorch's side is what one would run instead, from transformers' CLIPVisionModel and
LlamaForCausalLM and PEFT's LoRA, with the same sizes, types, dropout, schedule and AdamW; --remat=full or named is its
gradient checkpointing of whole layers. On a GPU both compute in bfloat16, on a CPU in float32.

Each side is a process of its own, and the two take turns of a few steps. Where the card has no room for both they run
one after the other, and --only=ours or --only=torch runs one alone. jax takes memory as it needs it beside the other
side, and 92 % of the card alone; XLA_PYTHON_CLIENT_PREALLOCATE and XLA_PYTHON_CLIENT_MEM_FRACTION, where they are set,
say otherwise. XLA_FLAGS are taken as they are set: launch/gpu_local.sh --dry-run prints those that it trains with.
"""

import argparse
import dataclasses
import importlib.util
import multiprocessing
import os
import statistics
import sys
import traceback
from collections.abc import Callable
from typing import Any

from mllm_jax.bench import count

NAMES = {"ours": "ours", "torch": "PyTorch"}
FULL = ("out of memory", "resource_exhausted")  # what jax and PyTorch say then, in small letters


class NoRoom(Exception):
  """A side does not fit on the device."""


@dataclasses.dataclass(frozen=True)
class Measured:
  """Of a side: what it told at first, seconds of each turn, most bytes and how that is known."""

  facts: dict[str, Any]
  seconds: list[float]
  peak: tuple[int, str]


class Side:
  """A side in a process of its own, which computes when it is asked to. Raises NoRoom and SystemExit."""

  def __init__(self, whose: str, options: tuple, platform: str, beside: bool):
    own = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if beside else {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}
    context = multiprocessing.get_context("spawn")
    self.whose, (self.pipe, theirs) = whose, context.Pipe()
    arguments = (theirs, whose, options, platform, own if whose == "ours" else {"JAX_PLATFORMS": "cpu"})
    self.process = context.Process(target=serve, args=arguments, daemon=True)
    self.process.start()
    theirs.close()
    self.facts = self._answer()

  def turn(self) -> float:
    self.pipe.send("turn")
    return self._answer()

  def finish(self) -> tuple[int, str]:
    """The peak; the process has then ended, and the device is free."""
    self.pipe.send("peak")
    peak = self._answer()
    self.process.join()
    return peak

  def _answer(self) -> Any:
    try:
      answer, problem = self.pipe.recv()
    except EOFError:
      self.process.join()
      raise SystemExit(f"{NAMES[self.whose]}: ended with status {self.process.exitcode} (killed for memory?)") from None
    if problem:
      self.process.join()
      full = any(text in problem.lower() for text in FULL)
      raise NoRoom(problem) if full else SystemExit(f"{NAMES[self.whose]}: {problem}")
    return answer


def serve(pipe, whose: str, options: tuple, platform: str, environment: dict[str, str]) -> None:
  """What runs in that process: sends facts, then answers "turn" with seconds and, at last, "peak"."""
  for name, value in environment.items():
    if name == "JAX_PLATFORMS" or name not in os.environ:
      os.environ[name] = value  # before jax is imported
  try:
    side = (our_side if whose == "ours" else torch_side)(options, platform)
    pipe.send((side.facts, ""))
    while pipe.recv() == "turn":
      pipe.send((side.turn(), ""))
    pipe.send((side.peak(), ""))
  except SystemExit as error:
    pipe.send((None, str(error)))
  except Exception as error:
    traceback.print_exc()
    pipe.send((None, f"{type(error).__name__}: {error}"))


def our_side(options: tuple, platform: str):
  import jax

  from mllm_jax.bench import train_case

  case = train_case.make_case(*options, accelerator=jax.default_backend() != "cpu")
  return train_case.Ours(case, train_case.make_batch(case))


def torch_side(options: tuple, platform: str):
  """On the platform that jax has; "": the one that PyTorch has."""
  import torch

  from mllm_jax.bench import train_case, train_torch

  platform = platform or ("gpu" if torch.cuda.is_available() else "cpu")
  case = train_case.make_case(*options, accelerator=platform != "cpu")
  side = train_torch.Torch(case, train_case.make_batch(case), platform)
  side.warm_up()
  return side


def measure(start: Callable[[str, str, bool], Side], only: str, repeat: int) -> tuple[dict[str, Measured], str]:
  """What each side that was asked for came to, and how they were measured together. `start` gives a side from its name,
  its platform and whether it runs beside the other. Raises NoRoom where the first does not fit."""
  if only:
    return take_turns({only: start(only, "", False)}, repeat), "alone"
  ours = start("ours", "", True)
  platform = ours.facts["platform"]
  try:
    theirs = start("torch", platform, True)
  except NoRoom:
    found = take_turns({"ours": ours}, repeat)
    try:
      return found | take_turns({"torch": start("torch", platform, False)}, repeat), "one side after the other"
    except NoRoom as error:
      return found, f"PyTorch's step does not fit on the device: {error}"
  return take_turns({"ours": ours, "torch": theirs}, repeat), "in turns"


def take_turns(sides: dict[str, Side], repeat: int) -> dict[str, Measured]:
  seconds = {whose: [] for whose in sides}
  for _ in range(repeat):
    for whose, side in sides.items():
      seconds[whose].append(side.turn())
  return {whose: Measured(side.facts, seconds[whose], side.finish()) for whose, side in sides.items()}


def report(found: dict[str, Measured], how: str) -> list[str]:
  """What to print."""
  from mllm_jax.parameters import readable

  facts = next(iter(found.values())).facts
  lines = [
    f"sp_cropping's LoRA step, {facts['model']}: {facts['rows']} rows of {facts['length']} places, {facts['dtype']}, "
    f"remat {facts['remat']}, on {facts['device']}; {facts['flops']:.3e} model FLOPs"
  ]
  for whose, side in found.items():
    facts = side.facts
    steps = facts["steps"] / statistics.median(side.seconds)
    mfu = f"MFU {facts['flops'] * steps / facts['device_flops']:.1%}" if facts["device_flops"] else "MFU not known"
    turns = ", ".join(f"{seconds / facts['steps']:.3f}" for seconds in side.seconds)
    size, known = side.peak
    lines += [
      f"{NAMES[whose]:8s} {facts['rows'] * steps:8.2f} samples/s {facts['tokens'] * steps:10,.0f} tokens/s   {mfu}   "
      f"peak {readable(size)} ({known})",
      f"         attention {facts['attention']}, first loss {facts['loss']:.4f}, seconds a step of each turn: {turns}",
    ]
  if len(found) == 2:
    ours, theirs = (side.seconds for side in found.values())
    ratios = sorted(b / a for a, b in zip(ours, theirs))
    lines.append(
      f"ratio    {statistics.median(theirs) / statistics.median(ours):.2f} times PyTorch's samples/s "
      f"({ratios[0]:.2f} to {ratios[-1]:.2f}), {how}"
    )
  return lines if len(found) == 2 or how == "alone" else [*lines, how]


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(
    prog="python -m mllm_jax.bench train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  sizes, remats = ("demo", "300m", "7b"), ("none", "named", "offload", "full")
  parser.add_argument("--model", choices=sizes, default="", help="default: 7b, on a CPU demo")
  parser.add_argument("--batch", type=count, default=0, help="rows, a picture each (default: 16)")
  parser.add_argument("--length", type=count, default=0, help="places of a row (default: the recipe's, 2048; demo 192)")
  parser.add_argument("--remat", choices=remats, default="", help="default: the recipe's, full; demo none")
  parser.add_argument("--repeat", type=count, default=5, help="turns of each side (default: 5)")
  parser.add_argument("--only", choices=list(NAMES), default="", help="one side alone")
  args = parser.parse_args(argv)
  missing = [name for name in ("torch", "peft") if importlib.util.find_spec(name) is None]
  if missing and args.only != "ours":
    print(f"{' and '.join(missing)} not installed: pip install 'mllm_jax[torch]', or --only=ours", file=sys.stderr)
    return 2
  options = (args.model, args.batch, args.length, args.remat)
  try:
    found, how = measure(lambda whose, *rest: Side(whose, options, *rest), args.only, args.repeat)
  except NoRoom as error:
    print(f"does not fit on the device: {error}; try a smaller --batch, --remat=full or --only", file=sys.stderr)
    return 1
  print("\n".join(report(found, how)))
  return 0 if args.only or len(found) == 2 else 1
