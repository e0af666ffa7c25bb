"""One of two processes of four CPU devices each, started by test_processes.py: `python pair.py FOLDER`. It goes through
everything that processes do together, and leaves in FOLDER/INDEX.json what it saw."""

import errno
import json
import sys
from pathlib import Path

from mllm_jax import distributed

distributed.start(60)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import Mesh, NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

from mllm_jax import sharding  # noqa: E402
from mllm_jax.batch import Batch  # noqa: E402
from mllm_jax.config import MeshConfig  # noqa: E402
from mllm_jax.data.records import DataError  # noqa: E402
from mllm_jax.run_control import Stopped  # noqa: E402
from mllm_jax.training import checkpoint  # noqa: E402
from mllm_jax.training.loop import run_steps  # noqa: E402
from mllm_jax.training.step import TrainState  # noqa: E402
from mllm_jax.weights.mapping import place  # noqa: E402
from mllm_jax.weights.tensors import InMemory  # noqa: E402

ARRAY = np.arange(4 * 16 * 24, dtype=np.float32).reshape(4, 16, 24)


def state_of(array, step: int = 0) -> TrainState:
  """A state on a mesh of all devices, sharded as a decoder's kernels are, of arrays or of zeros in their place."""
  mesh = sharding.make_mesh(MeshConfig())
  put = lambda x, spec: jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda index: x[index])
  counter = lambda number: put(np.int32(number), P())
  trainable = {"decoder/layers/q_proj/kernel": put(array, P(None, "fsdp")), "projector/bias": put(array[0, 0], P())}
  moments = {path: value * 2 for path, value in trainable.items()}
  return TrainState(counter(step), trainable, moments, counter(0), counter(0))


def main(folder: Path) -> dict:
  index, mesh = jax.process_index(), sharding.make_mesh(MeshConfig())
  assert sharding.row_share(mesh, index) == (index, 2)
  seen = {"devices": jax.device_count(), "gathered": distributed.gather("é" * 3000 * index + str(index))[1][-4:]}
  seen["largest"] = distributed.largest(7 * index)
  seen["first says"] = distributed.first_says(index == 0)
  flags = distributed.Flags(mesh)
  seen["flags"] = [flags.ask(lambda: number * index)() for number in (0, 3)]

  seen["rows"] = [rows_seen(interleaved(1, 8, 1), 4), rows_seen(interleaved(1, 1, 8), 2)]

  # ---- errors -------------------------------------------------------------------------------------------------------
  def stopped(function) -> list:
    try:
      function()
    except Stopped as error:
      return [error.status, str(error)]

  def bad_data():
    with distributed.agreed("data"):
      if index == 1:
        raise DataError("sample 3 is bad")

  seen["agreed"] = stopped(bad_data)
  shared, own = folder / "shared", folder / f"own-{index}"
  for each in (shared, own):
    each.mkdir(exist_ok=True)
  seen["shared folder"] = stopped(lambda: distributed.check_shared(shared))
  seen["own folder"] = stopped(lambda: distributed.check_shared(own))

  # ---- the loop -----------------------------------------------------------------------------------------------------
  seen["bad sample"] = loop(mesh, bad_at=4 if index == 1 else None)
  seen["signal"] = loop(mesh, signal_at=4 if index == 1 else None)
  seen["full disk"] = loop(mesh, full_at=4 if index == 0 else None)
  seen["to the end"] = loop(mesh)

  # ---- weights: each process reads what it holds --------------------------------------------------------------------
  places = {"decoder/layers/q_proj/kernel": P(None, "fsdp"), "decoder/layers/o_proj/kernel": P(None, None, "fsdp")}
  counted = Counted({path: ARRAY for path in places})
  targets = {
    path: jax.ShapeDtypeStruct(ARRAY.shape, jnp.bfloat16, sharding=NamedSharding(mesh, P(*spec)))
    for path, spec in places.items()
  }
  placed = place(counted, targets)
  seen["read"] = counted.bytes
  seen["largest piece"] = counted.largest
  total = jax.jit(lambda x: jax.tree.map(lambda x: x.astype(jnp.float32).sum(), x))(placed)
  seen["sums"] = [float(x) for x in total.values()]

  # ---- checkpoints --------------------------------------------------------------------------------------------------
  restored = checkpoint.Checkpoints(folder / "of_one").restore(5, state_of(0 * ARRAY))
  seen["restored"] = summed(restored.trainable)
  seen["moments"] = summed(restored.optimizer)
  mine = checkpoint.Checkpoints(folder / "of_two")
  mine.save(state_of(ARRAY, 7), {"made by": "two"})
  mine.wait()
  if distributed.is_first():
    alone = checkpoint.Trained(checkpoint.Checkpoints(folder / "of_two", alone=True), 7)
    seen["read alone"] = alone.read("decoder/layers/q_proj/kernel", (slice(1, 2),) * 3).item()
  if index == 1:
    checkpoint.BOOKKEEPING = 2**62
  seen["no room"] = stopped(lambda: mine.save(state_of(ARRAY, 8), {}))
  mine.close()
  return seen


def summed(tree) -> float:
  return float(jax.jit(lambda tree: sum(x.sum() for x in jax.tree.leaves(tree)))(tree))


def interleaved(*shape: int) -> Mesh:
  """A mesh in which the processes' devices take turns, as they do where hosts make up a torus."""
  devices = np.array(jax.devices()).reshape(2, 4).T.reshape(shape)
  return Mesh(devices, sharding.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)


def rows_seen(mesh: Mesh, count: int) -> list[int]:
  """The rows of a batch over all processes, sorted, of which each has made its share of `count`."""
  share, shares = sharding.row_share(mesh, jax.process_index())
  own = np.arange(share * count, (share + 1) * count, dtype=np.float32)[:, None]
  batch = sharding.to_device(Batch(*[own] * 8), mesh)
  assert batch.tokens.shape == (shares * count, 1)
  return jax.jit(lambda x: jnp.sort(x.ravel()), out_shardings=sharding.replicated(mesh))(batch.tokens).tolist()


class Counted(InMemory):
  """Counts what is read of it."""

  bytes = largest = 0

  def read(self, name, index=()):
    found = super().read(name, index)
    self.bytes += found.nbytes
    self.largest = max(self.largest, found.nbytes)
    return found


def loop(mesh, bad_at=None, signal_at=None, full_at=None, expected=Stopped) -> list:
  """[how it ended, steps taken, steps saved, steps reported] of up to eight steps; the `_at`s are numbers of batches or
  steps at which something happens to this process."""
  saved, reported = [], []

  class Stop:
    signal = 0

  class Reporter:
    def __enter__(self):
      pass

    def __exit__(self, *error):
      pass

    def flops(self, batch):
      return 0.0

    def settle(self, step, ids, numbers, flops):
      if step == full_at:
        raise OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")
      reported.append(step)

  def batches():
    for number in range(1, 9):
      if number == bad_at:
        raise DataError(f"sample {number} is bad")
      if number == signal_at:
        Stop.signal = 15
      yield [str(number)], Batch(*(np.ones((1, len(mesh.local_devices)), np.float32) for _ in range(8)))

  @jax.jit
  def step(state, frozen, batch):
    total = batch.tokens.sum() + state.trainable["x"].sum()
    return TrainState(state.step + 1, state.trainable, {}, state.skipped, state.skipped), {"sum": total}

  whole = sharding.replicated(mesh)
  zero = jax.device_put(np.int32(0), whole)
  state = TrainState(zero, {"x": jax.device_put(np.float32([1]), whole)}, {}, zero, zero)
  end = ""
  try:
    state = run_steps(
      step,
      state,
      {},
      batches(),
      steps=8,
      mesh=mesh,
      reporter=Reporter(),
      save=lambda state: saved.append(int(state.step)),
      save_every=100,
      stop=Stop,
    )
    saved.append(int(state.step))
    end = str(Stop.signal)
  except expected as error:
    end = f"{error.status} {error}" if expected is Stopped else str(error)
  return [end, saved, reported]


if __name__ == "__main__":
  try:
    found = main(Path(sys.argv[1]))
    Path(sys.argv[1], f"{jax.process_index()}.json").write_text(json.dumps(found))
  except Exception:
    import traceback

    traceback.print_exc()
    distributed.leave(RuntimeError(), 1)
