"""The released system's numbers, as arrays; tests/goldens/sp/README.md says what the files hold."""

import functools
import json
import math
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from mllm_jax import parameters
from mllm_jax.weights import mapping, tables
from mllm_jax.weights.tensors import InMemory

# The goldens are small: most of a test's time would go into optimising code that runs once.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
FOLDER = Path(__file__).parent / "goldens" / "sp"
UHD = FOLDER.with_name("uhd")


def read(name: str, folder: Path = FOLDER) -> dict[str, np.ndarray]:
  """All arrays of a golden file. Those it leaves out because they were drawn from a seed are drawn again."""
  with np.load(folder / f"{name}.npz") as file:
    arrays = dict(file)
  if "draws_json" in arrays:
    meta = json.loads(str(arrays["draws_json"]))
    normals = Normals(meta["seed"])
    for array_name, shape, scale, offset in meta["draws"]:
      arrays[array_name] = (offset + scale * normals.draw(math.prod(shape)).reshape(shape)).astype(np.float32)
    if "in.features" in arrays:  # the first row is the class token, which SigLIP has not
      arrays["in.patch_features"] = arrays["in.features"][:, 1:]
  return arrays


def group(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
  """The arrays whose names start with `prefix`, under the rest of their names."""
  return {name[len(prefix) :]: array for name, array in arrays.items() if name.startswith(prefix)}


class Normals:
  """Standard normal float64 numbers as torch's CPU generator draws them from a seed (Mersenne twister, Box-Muller), so
  that megabytes of weights need not be kept.
  """

  def __init__(self, seed: int):
    self.state = np.random.RandomState(seed)

  def uniform(self, count: int) -> np.ndarray:
    words = np.frombuffer(self.state.bytes(8 * count), "<u4").astype(np.uint64).reshape(-1, 2)
    bits = ((words[:, 0] << np.uint64(32)) | words[:, 1]) & np.uint64(2**53 - 1)
    return bits.astype(np.float64) * 2.0**-53

  def draw(self, count: int) -> np.ndarray:
    """The next `count` numbers. torch pairs uniform number i with i + 8 in blocks of 16, draws the last block anew
    where the count is no multiple of 16, and goes pair by pair below 16.
    """
    if count < 16:
      assert count % 2 == 0, "an odd count would leave half a pair in torch's generator"
      first, second = self.uniform(count).reshape(-1, 2).T
      radius, angle = np.sqrt(-2 * np.log1p(-second)), 2 * math.pi * first
      return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).ravel()
    numbers = self.uniform(count)
    whole = count - count % 16
    numbers[:whole] = blocks(numbers[:whole])
    if count % 16:
      numbers[-16:] = blocks(self.uniform(16))
    return numbers


def blocks(uniform: np.ndarray) -> np.ndarray:
  """Box-Muller on blocks of 16."""
  first, second = uniform.reshape(-1, 2, 8).swapaxes(0, 1)
  radius, angle = np.sqrt(-2 * np.log1p(-first)), 2 * math.pi * second
  return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).ravel()


def weights(arrays: dict[str, np.ndarray]) -> InMemory:
  """Arrays in memory as an opened checkpoint."""
  return InMemory(arrays, str(FOLDER))


def fill(module: nnx.Module, prefix: str, table: tables.Table, arrays: dict[str, np.ndarray]) -> nnx.Module:
  """`module`, which lies at `prefix` of a model, with all its arrays read from foreign tensors by `table`."""
  graphdef, flat = parameters.flatten(module)
  targets = {prefix + path: jax.ShapeDtypeStruct(array.shape, array.dtype) for path, array in flat.items()}
  loaded = mapping.load(weights(arrays), table, targets)
  return parameters.unflatten(graphdef, {path.removeprefix(prefix): array for path, array in loaded.items()})


def to_foreign(module: nnx.Module, prefix: str, table: tables.Table) -> dict[str, np.ndarray]:
  """The arrays of a module, or of its gradient, under their foreign names."""
  _, flat = parameters.flatten(module)
  return mapping.export({prefix + path: np.asarray(array) for path, array in flat.items()}, table)


def check_close(
  name: str, actual: np.ndarray, expected: np.ndarray, *, relative: float, floor: float = 0.0, size: float = 0.0
):
  """Asserts max |actual - expected| <= relative * max |expected| (or `size`, where `expected` is a sample of something
  larger) + floor, and reports the deviation.
  """
  difference = np.abs(np.asarray(actual, np.float64) - expected).max()
  bound = relative * max(size, np.abs(expected).max()) + floor
  DEVIATIONS.append((name, float(difference), float(difference / max(size, np.abs(expected).max(), 1e-30))))
  assert actual.shape == expected.shape and difference <= bound, f"{name}: off by {difference:.2e}, allowed {bound:.2e}"


DEVIATIONS: list[tuple[str, float, float]] = []
