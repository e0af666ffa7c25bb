"""Importing weights against `cp` on the same files, and how much memory importing and loading take.

The weights are made on the spot: a Vicuna-shaped decoder with as many layers as the size asks for, CLIP-L/14-336 and
LLaVA-SP's projector, in bfloat16, under the names that the published checkpoints have. Each measurement is a process of
its own; its peak memory is what the kernel says its resident set was at most (VmHWM), mapped files included.
"""

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from mllm_jax.bench import count
from mllm_jax.config import DecoderConfig, ProjectorConfig, VisionConfig
from mllm_jax.parameters import readable
from mllm_jax.weights import assemble, clip, llama, spatial
from mllm_jax.weights.mapping import Theirs
from mllm_jax.weights.write import write_safetensors, write_torch_bin

BF16 = np.dtype(ml_dtypes.bfloat16)
LAYER_BYTES = 2 * 202_383_360  # of one layer of a 7B decoder
PEAK = "\nimport re\nprint(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1], time.time() - begin)"
IMPORT = (
  "import sys, time; begin = time.time()\nfrom mllm_jax.convert import main\nassert main(sys.argv[1:]) == 0" + PEAK
)
LOAD = (
  "import sys, time; begin = time.time()\nimport jax\nfrom mllm_jax import build\n"
  "stored = build.open_any('', **dict(a.split('=') for a in sys.argv[1:]))\n"
  "model = build.put(stored, stored.config(), None, None)\n"
  "jax.block_until_ready(jax.tree.leaves(model))" + PEAK
)


class Random:
  """Tensors of given shapes, filled with the same 64 MiB of random numbers again and again."""

  def __init__(self, shapes: dict[str, tuple[int, ...]]):
    self.shapes = shapes
    block = np.random.default_rng(0).normal(0, 0.02, 2**25).astype(np.float32)
    self.block = block.astype(BF16)

  def names(self) -> list[str]:
    return list(self.shapes)

  def shape(self, name: str) -> tuple[int, ...]:
    return self.shapes[name]

  def dtype(self, name: str) -> np.dtype:
    return BF16

  def read(self, name: str, index=()) -> np.ndarray:
    shape = [part.stop - part.start for part in index] if index else self.shapes[name]
    return np.resize(self.block, shape)

  def release(self, name: str) -> None:
    pass


def make(folder: Path, size: int) -> None:
  """Writes about `size` bytes of weights: folder/clip, folder/llm, folder/projector/model.bin."""
  vision, projector = VisionConfig(), ProjectorConfig()
  fixed = 1_761_000_000 + 600_000_000 + 524_000_000  # projector, tower, embedding table and head
  decoder = DecoderConfig(layers=max(1, round((size - fixed) / LAYER_BYTES)))
  parts = {"vision": vision, "decoder": decoder, "projector": projector}
  shapes = {name: assemble.part_shapes(name, parts) for name in parts}
  for name in ("clip", "llm", "projector"):
    (folder / name).mkdir(parents=True)
  write_safetensors(folder / "clip", Theirs(Random(shapes["vision"]), clip.table(vision)))
  write_safetensors(folder / "llm", Theirs(Random(shapes["decoder"]), llama.table(decoder)), shard_bytes=2 * 10**9)
  table = spatial.table(projector, vision.grid)
  write_torch_bin(folder / "projector" / "model.bin", Theirs(Random(shapes["projector"]), table))
  tower = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, patch_size=14)
  (folder / "clip" / "config.json").write_text(
    json.dumps(tower | {"model_type": "clip_vision_model", "image_size": vision.image_size})
  )
  language = dict(model_type="llama", num_hidden_layers=decoder.layers, rms_norm_eps=decoder.norm_eps)
  (folder / "llm" / "config.json").write_text(json.dumps(language))


def used(folder: Path) -> int:
  """Bytes of all files in a folder."""
  return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def measure(code: str, arguments: list[str]) -> tuple[float, int]:
  """(seconds, peak bytes) of a program in a process of its own, on the first CPU device."""
  environment = os.environ | {"JAX_PLATFORMS": "cpu"}
  result = subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True)
  if result.returncode:
    raise RuntimeError(result.stderr)
  peak, seconds = result.stdout.split()[-2:]
  return float(seconds), int(peak) * 1024


def settle() -> None:
  """Writes out what is still in memory, so that one measurement does not pay for the one before."""
  os.sync()
  time.sleep(1)


@dataclasses.dataclass(frozen=True)
class Result:
  """Seconds of each repetition, and peaks in bytes."""

  size: int
  copies: list[float]
  imports: list[float]
  import_peak: int
  load_seconds: float
  load_peak: int


def run(folder: Path, size: int, repeat: int) -> Result:
  """Makes the weights and measures, cp and import in turns."""
  source, out = folder / "source", folder / "out"
  print(f"making {readable(size)} of weights in {folder}", flush=True)
  make(source, size)
  parts = {"vision": source / "clip", "llm": source / "llm", "projector": source / "projector"}
  copies, imports, peaks = [], [], []
  for _ in range(repeat):
    settle()
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(out)], check=True)
    copies.append(time.perf_counter() - start)
    shutil.rmtree(out)
    settle()
    seconds, peak = measure(IMPORT, ["import", *(f"--{name}={path}" for name, path in parts.items()), f"--out={out}"])
    imports.append(seconds)
    peaks.append(peak)
    shutil.rmtree(out)
  load_seconds, load_peak = measure(LOAD, [f"{name}={path}" for name, path in parts.items()])
  return Result(used(source), copies, imports, max(peaks), load_seconds, load_peak)


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(
    prog="python -m mllm_jax.bench convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--gigabytes", type=float, default=4.0, help="of weights (default: 4; at least 3)")
  parser.add_argument("--repeat", type=count, default=3, help="how often each is measured (default: 3)")
  parser.add_argument(
    "--folder", default="", help="where to work; needs three times the size (default: a temporary one)"
  )
  args = parser.parse_args(argv)
  folder = Path(tempfile.mkdtemp(prefix="mllm_jax_bench_", dir=args.folder or None))
  try:
    result = run(folder, int(args.gigabytes * 2**30), args.repeat)
  finally:
    shutil.rmtree(folder, ignore_errors=True)
  copy, convert = statistics.median(result.copies), statistics.median(result.imports)
  speed = lambda seconds: f"{result.size / seconds / 1e9:.2f} GB/s"
  print(f"size             {readable(result.size)}")
  print(f"cp               {copy:.1f} s, {speed(copy)}   ({', '.join(f'{x:.1f}' for x in result.copies)})")
  print(f"import           {convert:.1f} s, {speed(convert)}   ({', '.join(f'{x:.1f}' for x in result.imports)})")
  print(f"speed of import / speed of cp   {copy / convert:.2f}")
  print(f"peak memory of import           {readable(result.import_peak)}")
  print(f"load             {result.load_seconds:.1f} s, {speed(result.load_seconds)}")
  print(f"peak memory of load / size      {result.load_peak / result.size:.2f}   ({readable(result.load_peak)})")
  return 0
