"""VDIM forward and backward against the released arithmetic written plainly in PyTorch, on the CPU, in one run.

PyTorch's side is what the released module computes: bicubic upsampling, reflection padding, all 7 x 7 neighbours of
every pixel unfolded, and an einsum with the weights. Both sides have the same inputs and parameters and must come to
the same loss and gradient. They take turns, each in a process of its own with all cores; a measurement is a warm-up and
the median of a few calls of loss and gradients (of the parameters and of the features). Memory is how much the
process's resident set grew at most during these calls over what it held before the first, by the kernel's count
(VmHWM, reset after compiling); for XLA also what the compiler planned.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from mllm_jax.bench import count
from mllm_jax.parameters import readable

SIDE = 14
TAPS = 49


@dataclasses.dataclass(frozen=True)
class Size:
  """What is measured: one image of height x width patches with `channels` features each, `levels` stages."""

  height: int = 24
  width: int = 24
  channels: int = 1024
  levels: int = 2


@dataclasses.dataclass(frozen=True)
class Measurement:
  """Median seconds of a call, most bytes over what was held before, loss and norm of the features' gradient."""

  seconds: float
  peak: int
  loss: float
  gradient_norm: float
  planned: int = 0  # bytes of temporary and output buffers, XLA only


def write_case(file: Path, size: Size) -> None:
  """Inputs and parameters of both sides, as PyTorch has them; parameters under the released names."""
  random = np.random.default_rng(0)
  normal = lambda *shape, scale=1.0: (scale * random.standard_normal(shape)).astype(np.float32)
  arrays = {"features": normal(size.channels, size.height, size.width)}
  arrays["image"] = normal(3, SIDE * size.height, SIDE * size.width)
  n = 2**size.levels
  arrays["cotangent"] = normal(size.channels, n * size.height, n * size.width, scale=1e-3)
  for i in range(1, size.levels + 1):
    shapes = {
      "range_proj.0": (32, 3),
      "range_proj.3": (32, 32),
      "fixup_proj.0": (TAPS, 52),
      "fixup_proj.3": (TAPS,) * 2,
    }
    for name, shape in shapes.items():
      arrays[f"up{i}.{name}.weight"] = normal(*shape, scale=shape[1] ** -0.5)
      arrays[f"up{i}.{name}.bias"] = normal(shape[0], scale=0.1)
  arrays["fixup_proj.1.weight"] = normal(size.channels, size.channels, scale=size.channels**-0.5)
  arrays["fixup_proj.1.bias"] = normal(size.channels, scale=0.1)
  np.savez(file, **arrays)


def measure(call, repeat: int, ready) -> tuple[float, int, object]:
  """(median seconds, most bytes over those held before, last result) of `call`, the first call being a warm-up."""
  try:
    Path("/proc/self/clear_refs").write_text("5")
  except OSError as error:
    raise SystemExit(f"cannot reset the count of peak memory (Linux's /proc/self/clear_refs): {error}") from None
  before, seconds = resident("VmRSS"), []
  for _ in range(repeat + 1):
    start = time.perf_counter()
    result = ready(call())
    seconds.append(time.perf_counter() - start)
  return statistics.median(seconds[1:]), resident("VmHWM") - before, result


def resident(field: str) -> int:
  """VmRSS or VmHWM of this process in bytes."""
  status = Path("/proc/self/status").read_text()
  return int(status.split(f"{field}:")[1].split()[0]) * 1024


def with_jax(arrays: dict[str, np.ndarray], size: Size, repeat: int) -> Measurement:
  """This project's side."""
  import jax
  import jax.numpy as jnp
  from flax import nnx

  from mllm_jax.models.projectors.vdim import Vdim

  channels_last = lambda x: jnp.asarray(x.reshape(x.shape[0], -1).T)
  model = Vdim(size.levels, size.channels, rngs=nnx.Rngs(0), keep=(size.levels,))
  layers = {"fixup_proj.1": model.fixup_proj[-1]}
  for i, stage in enumerate(model.stages, 1):
    layers |= {f"up{i}.range_proj.0": stage.range_proj[0], f"up{i}.range_proj.3": stage.range_proj[1]}
    layers |= {f"up{i}.fixup_proj.0": stage.fixup[0], f"up{i}.fixup_proj.3": stage.fixup[1]}
  for name, layer in layers.items():
    layer.kernel[...] = jnp.asarray(arrays[f"{name}.weight"].T)
    layer.bias[...] = jnp.asarray(arrays[f"{name}.bias"])
  patches = arrays["image"].reshape(3, size.height, SIDE, size.width, SIDE).transpose(1, 3, 2, 4, 0)
  patches = jnp.asarray(patches.reshape(1, size.height * size.width, -1))
  features, cotangent = channels_last(arrays["features"])[None], channels_last(arrays["cotangent"])
  grids = jnp.asarray([[size.height, size.width]], jnp.int32)

  def loss(model, features, patches, cotangent):
    return (model(features, patches, grids)[size.levels][0] * cotangent).sum()

  inputs = (model, features, patches, cotangent)
  step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*inputs).compile()
  memory = step.memory_analysis()
  seconds, peak, (value, (_, gradient)) = measure(lambda: step(*inputs), repeat, jax.block_until_ready)
  planned = memory.temp_size_in_bytes + memory.output_size_in_bytes
  return Measurement(seconds, peak, float(value), float(jnp.linalg.norm(gradient)), planned)


def with_torch(arrays: dict[str, np.ndarray], size: Size, repeat: int) -> Measurement:
  """The released arithmetic, step by step."""
  try:
    import torch
    import torch.nn.functional as F
  except ImportError:
    raise SystemExit("this benchmark compares with PyTorch, which is not installed: pip install 'mllm_jax[torch]'")
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  parameters = {
    name: torch.from_numpy(array) for name, array in arrays.items() if name.split(".")[-1] in ("weight", "bias")
  }
  for i in range(1, size.levels + 1):
    parameters |= {f"up{i}.range_temp": torch.zeros(()), f"up{i}.sigma_spatial": torch.ones(())}
  features, image, cotangent = (torch.from_numpy(arrays[name])[None] for name in ("features", "image", "cotangent"))
  for leaf in (features, *parameters.values()):
    leaf.requires_grad_()
  conv = lambda x, name: F.conv2d(x, parameters[f"{name}.weight"][..., None, None], parameters[f"{name}.bias"])

  def stage(source, name):
    height, width = 2 * source.shape[2], 2 * source.shape[3]
    guidance = F.adaptive_avg_pool2d(image, (height, width))
    keys = conv(F.gelu(conv(guidance, f"{name}.range_proj.0")), f"{name}.range_proj.3")
    neighbours = F.unfold(F.pad(keys, (3,) * 4, mode="reflect"), 7).reshape(1, 32, TAPS, height, width)
    scores = torch.einsum("bcphw,bchw->bphw", neighbours, keys)
    kernel = torch.softmax(parameters[f"{name}.range_temp"].exp().clamp(1e-4, 1e4) * scores, dim=1)
    square = torch.linspace(-1, 1, 7) ** 2
    distance = (square[:, None] + square).reshape(1, TAPS, 1, 1)
    kernel = kernel * torch.exp(-distance / (2 * parameters[f"{name}.sigma_spatial"] ** 2))
    kernel = kernel / kernel.sum(1, keepdim=True).clamp(min=1e-7)
    hidden = F.gelu(conv(torch.cat([kernel, guidance], 1), f"{name}.fixup_proj.0"))
    kernel = kernel + 0.1 * conv(hidden, f"{name}.fixup_proj.3")
    upsampled = F.interpolate(source, (height, width), mode="bicubic", align_corners=False)
    windows = F.unfold(F.pad(upsampled, (3,) * 4, mode="reflect"), 7).reshape(1, size.channels, TAPS, height, width)
    return torch.einsum("bcphw,bphw->bchw", windows, kernel)

  def step():
    x = features
    for i in range(1, size.levels + 1):
      x = stage(x, f"up{i}")
    loss = ((x + 0.1 * conv(x, "fixup_proj.1")) * cotangent).sum()
    return loss.detach(), torch.autograd.grad(loss, (features, *parameters.values()))

  seconds, peak, (loss, gradients) = measure(step, repeat, lambda result: result)
  return Measurement(seconds, peak, float(loss), float(gradients[0].norm()))


SIDES = {"jax": with_jax, "torch": with_torch}


def in_process(side: str, file: Path, size: Size, repeat: int) -> Measurement:
  """One side measured in a process of its own."""
  code = "import sys; from mllm_jax.bench import vdim; vdim.child(*sys.argv[1:])"
  arguments = [side, str(file), json.dumps(dataclasses.asdict(size)), str(repeat)]
  environment = os.environ | {"JAX_PLATFORMS": "cpu"}
  result = subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True)
  if result.returncode:
    raise SystemExit(result.stderr.strip() or f"{side}: exit status {result.returncode} (killed for memory?)")
  return Measurement(**json.loads(result.stdout.splitlines()[-1]))


def child(side: str, file: str, size: str, repeat: str) -> None:
  """What runs in that process: prints the measurement."""
  with np.load(file) as arrays:
    measurement = SIDES[side](dict(arrays), Size(**json.loads(size)), int(repeat))
  print(json.dumps(dataclasses.asdict(measurement)))


def run(folder: Path, size: Size, rounds: int, repeat: int) -> dict[str, list[Measurement]]:
  """Measurements of both sides in turns. Raises SystemExit where they do not agree on what they compute."""
  file = folder / "case.npz"
  write_case(file, size)
  results = {side: [] for side in SIDES}
  for _ in range(rounds):
    for side in SIDES:
      results[side].append(in_process(side, file, size, repeat))
  ours, theirs = results["jax"][0], results["torch"][0]
  for name in ("loss", "gradient_norm"):
    if not np.isclose(getattr(ours, name), getattr(theirs, name), rtol=1e-3):
      raise SystemExit(f"{name} differs: {getattr(ours, name)} here, {getattr(theirs, name)} in PyTorch")
  return results


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(
    prog="python -m mllm_jax.bench vdim", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--height", type=count, default=Size.height, help="of the patch grid (default: %(default)s)")
  parser.add_argument("--width", type=count, default=Size.width, help="of the patch grid (default: %(default)s)")
  parser.add_argument("--channels", type=count, default=Size.channels, help="of the features (default: %(default)s)")
  parser.add_argument("--levels", type=int, default=Size.levels, choices=(1, 2), help="stages (default: %(default)s)")
  parser.add_argument("--rounds", type=count, default=2, help="processes of each side (default: %(default)s)")
  parser.add_argument("--repeat", type=count, default=1, help="timed calls in a process (default: %(default)s)")
  args = parser.parse_args(argv)
  size = Size(args.height, args.width, args.channels, args.levels)
  with tempfile.TemporaryDirectory(prefix="mllm_jax_bench_") as folder:
    results = run(Path(folder), size, args.rounds, args.repeat)
  print(
    f"VDIM {2**size.levels}x, {size.channels} channels on {size.height} x {size.width}, float32, loss and gradients"
  )
  for side, measurements in results.items():
    seconds = ", ".join(f"{m.seconds:.2f}" for m in measurements)
    planned = f", {readable(measurements[0].planned)} as compiled" if measurements[0].planned else ""
    print(f"{side:6s} {seconds} s   peak {readable(max(m.peak for m in measurements))}{planned}")
  pairs = list(zip(results["torch"], results["jax"]))
  ratios = [theirs.seconds / ours.seconds for theirs, ours in pairs]
  print(f"time of PyTorch / time here    {statistics.median(ratios):.2f}   ({', '.join(f'{r:.2f}' for r in ratios)})")
  memory = max(theirs.peak for theirs, _ in pairs) / max(ours.peak for _, ours in pairs)
  print(f"memory of PyTorch / here       {memory:.2f}")
  return 0
