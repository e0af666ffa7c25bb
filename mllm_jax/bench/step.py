"""Host time of a training step at the size of LLaVA-SP-7B's LoRA stage: handing over the batch, dispatch, numbers, log.

Everything that the trainer does between two steps is done, on a state of as many arrays as the real one has, but of one
element each, so that nearly all of the time is the host's; the batch is as large as one host's share of the paper's.
Beside it the same with layers that are not stacked: one array a layer, as most checkpoints and libraries keep them. The
two take turns. Milliseconds a step; devices that do not compute beside the host (the CPU) add their own little work.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax import parameters, recipes, sharding
from mllm_jax.batch import Batch
from mllm_jax.bench import count
from mllm_jax.config import Config, LoraConfig, MeshConfig, ModelConfig, ProjectorConfig, StageConfig
from mllm_jax.models.mllm import abstract
from mllm_jax.training import optimizer as optimizer_lib
from mllm_jax.training import step as step_lib
from mllm_jax.training.loop import Reporter, run_steps
from mllm_jax.training.metrics import MetricsLog

PROJECTOR = ProjectorConfig(kind="spatial", maps="cropping", stride=2, dfi_kernel=16, conv_width=512)


class Stop:
  signal = 0


def paths(stacked: bool) -> list[str]:
  """The parameters of the 7B model with adapters by path; each layer's on its own where they are not `stacked`."""
  _, shapes = parameters.flatten(abstract(ModelConfig(projector=PROJECTOR, lora=LoraConfig(rank=128))))
  if stacked:
    return list(shapes)
  unstacked = lambda path, shape: [path.replace("/layers/", f"/layers/{layer}/") for layer in range(shape[0])]
  return [each for path, x in shapes.items() for each in (unstacked(path, x.shape) if "/layers/" in path else [path])]


def batches(rows: int, places: int) -> Iterator[tuple[list[str], Batch]]:
  """The same batch again and again."""
  row = np.zeros((1, rows, places), np.int32)
  patches = np.zeros((1, rows, 1, 576, 588), np.uint8)
  weights, grids = row.astype(np.float32), np.zeros((1, rows, 1, 2), np.int32)
  batch = Batch(row, row, weights, row, row, row, patches, grids)
  while True:
    yield ["sample"] * rows, batch


class Side:
  """A state with the arrays of one way to keep layers."""

  def __init__(self, stacked: bool, folder: Path):
    self.names = paths(stacked)
    stage = StageConfig(parameters=recipes.parameter_table(2e-5, 2e-4))
    patterns = [(pattern.replace("layers/", "layers/(\\d+/)?"), rate) for pattern, rate in stage.parameters]
    rates = parameters.match(patterns, self.names, "parameters")
    self.mesh = sharding.make_mesh(MeshConfig())
    put = lambda dtype: jax.device_put(jnp.ones((1,), dtype), sharding.replicated(self.mesh))
    trainable = {path: put(jnp.float32) for path in self.names if rates[path]}
    self.frozen = {path: put(jnp.bfloat16) for path in self.names if not rates[path]}
    optimizer = optimizer_lib.make(stage, trainable)
    self.state = jax.jit(lambda x: _state(optimizer, x))(trainable)
    apply = step_lib._apply(stage, {path: rates[path] for path in trainable}, 10**6, optimizer)

    def step(state, frozen, batch):
      loss = sum(x.astype(jnp.float32).sum() for x in jax.tree.leaves(frozen)) + batch.tokens[0, 0, 0]
      grads = jax.tree.map(lambda x: 1e-3 * x, state.trainable)
      return apply(state, (loss, jnp.float32(1), grads))

    self.step = jax.jit(step, donate_argnums=0)
    self.config = Config(name="bench", log_every=10)
    self.folder = folder
    folder.mkdir()

  def take(self, steps: int, rows: int, length: int) -> float:
    """Milliseconds a step."""
    log = MetricsLog(self.folder)
    start = int(self.state.step)
    since = time.perf_counter()
    self.state = run_steps(
      self.step,
      self.state,
      self.frozen,
      batches(rows, length),
      steps=start + steps,
      mesh=self.mesh,
      reporter=Reporter(self.config, "bench", self.folder, log, start, start + steps, flops=lambda batch: 0.0),
      save=lambda state: None,
      save_every=10**9,
      stop=Stop(),
    )
    found = 1e3 * (time.perf_counter() - since) / steps
    log.close()
    return found


def _state(optimizer, trainable) -> step_lib.TrainState:
  zero = jnp.zeros((), jnp.int32)
  return step_lib.TrainState(zero, trainable, optimizer.init(trainable), zero, zero)


def measure(steps: int, repeat: int, rows: int, length: int) -> dict[str, tuple[int, list[float]]]:
  """{way to keep layers: (arrays that a step takes, milliseconds a step, of each turn)}."""
  with tempfile.TemporaryDirectory() as folder:
    sides = {name: Side(name == "stacked", Path(folder) / name) for name in ("stacked", "one array a layer")}
    found = {name: [] for name in sides}
    for side in sides.values():
      side.take(3, rows, length)  # compiles
    for _ in range(repeat):
      for name, side in sides.items():
        found[name].append(side.take(steps, rows, length))
    return {name: (len(jax.tree.leaves((side.state, side.frozen))), found[name]) for name, side in sides.items()}


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(prog="python -m mllm_jax.bench step", description=__doc__)
  parser.add_argument("--steps", type=count, default=100, help="of a turn")
  parser.add_argument("--repeat", type=count, default=5, help="turns of each")
  parser.add_argument("--rows", type=count, default=16, help="of a host's share of a batch")
  parser.add_argument("--length", type=count, default=2048, help="places of a row")
  options = parser.parse_args(argv)
  found = measure(options.steps, options.repeat, options.rows, options.length)
  for name, (arrays, times) in found.items():
    turns = ", ".join(f"{ms:.2f}" for ms in times)
    print(f"{name:18s} {arrays:5d} arrays  {statistics.median(times):7.2f} ms a step  ({turns})")
  stacked, single = (statistics.median(times) for _, times in found.values())
  print(f"{'ratio':18s} {single / stacked:27.1f}")
  return 0
