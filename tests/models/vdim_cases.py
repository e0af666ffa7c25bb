"""The released VDIM's numbers, tests/goldens/uhd/vdim_*.npz and adaptive_conv.npz, and their parameters as a model's.

Made by the released definitions in float32 on a CPU, without dropout, adaptive convolution by its C++ code; w/ are
weights and g/ gradients, as PyTorch has them. Excerpts, so that the folder stays small: of maps the first channels
only, of a stage's kernels the first row; and what was drawn from a seed is drawn again.
"""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from released import blocks

FOLDER = Path(__file__).parents[1] / "goldens" / "uhd"
SIDE = 14


def read(name: str) -> dict[str, np.ndarray]:
  """All arrays of a golden file."""
  with np.load(FOLDER / f"{name}.npz") as file:
    return dict(file)


def draw(seed: int, skip: int, *shape: int) -> np.ndarray:
  """float32 normal numbers as torch's CPU generator draws them from a seed, after `skip` others; by sixteens."""
  count = int(np.prod(shape))
  assert skip % 16 == 0 and count % 16 == 0
  words = np.frombuffer(np.random.RandomState(seed).bytes(4 * (skip + count)), "<u4")[skip:]
  uniform = (words & (2**24 - 1)).astype(np.float32) * np.float32(2**-24)
  return blocks(uniform).reshape(shape)


def to_flat(x: np.ndarray) -> jnp.ndarray:
  """[C, h, w] -> a flat map [h * w, C]."""
  return jnp.asarray(x.reshape(x.shape[0], -1).T)


def from_flat(x, height: int, width: int) -> np.ndarray:
  """The flat map [>= h * w, C] -> [C, h, w]."""
  return np.asarray(x)[: height * width].T.reshape(-1, height, width)


def to_cells(x: np.ndarray) -> jnp.ndarray:
  """[c, 2 h, 2 w] -> [2, 2, c, h * w]: by pixel of a cell."""
  channels, height, width = x.shape
  x = x.reshape(channels, height // 2, 2, width // 2, 2).transpose(2, 4, 0, 1, 3)
  return jnp.asarray(x.reshape(2, 2, channels, -1))


def from_cells(x, height: int, width: int) -> np.ndarray:
  """[2, 2, c, >= h * w] -> [c, 2 h, 2 w]."""
  x = np.asarray(x)[..., : height * width].reshape(2, 2, -1, height, width)
  return x.transpose(2, 3, 0, 4, 1).reshape(-1, 2 * height, 2 * width)


def to_patches(image: np.ndarray) -> jnp.ndarray:
  """A uint8 image [3, 14 h, 14 w] -> its patches float32 [h * w, 588], scaled to -1..1."""
  _, height, width = image.shape
  image = image.astype(np.float32) / np.float32(127.5) - 1
  x = image.reshape(3, height // SIDE, SIDE, width // SIDE, SIDE).transpose(1, 3, 2, 4, 0)
  return jnp.asarray(x.reshape(-1, SIDE * SIDE * 3))


def stage_layers(stage) -> dict:
  """The linear layers of a stage under their released names."""
  (key, second_key), (fixup, second_fixup) = stage.range_proj, stage.fixup
  return {"range_proj.0": key, "range_proj.3": second_key, "fixup_proj.0": fixup, "fixup_proj.3": second_fixup}


def layers(model) -> dict:
  """Those of a whole stack."""
  found = {
    f"up{i}.{name}": layer for i, stage in enumerate(model.stages, 1) for name, layer in stage_layers(stage).items()
  }
  if len(model.stages) == 3:
    return found | {f"fixup_proj_{2**i}x.1": layer for i, layer in enumerate(model.fixup_proj, 1)}
  return found | {"fixup_proj.1": model.fixup_proj[-1]}


def scalars(module, prefix: str = "") -> dict:
  """The scalar parameters of a stage or a stack under their released names."""
  if hasattr(module, "stages"):
    return {name: x for i, stage in enumerate(module.stages, 1) for name, x in scalars(stage, f"up{i}.").items()}
  return {f"{prefix}range_temp": module.range_temp, f"{prefix}sigma_spatial": module.sigma_spatial}


def fill(module: nnx.Module, arrays: dict[str, np.ndarray]) -> nnx.Module:
  """`module`, a stage or a stack, with the weights of a golden file."""
  for name, layer in (layers if hasattr(module, "stages") else stage_layers)(module).items():
    layer.kernel[...] = jnp.asarray(arrays[f"w/{name}.weight"][:, :, 0, 0].T)
    layer.bias[...] = jnp.asarray(arrays[f"w/{name}.bias"])
  for name, scalar in scalars(module).items():
    scalar[...] = jnp.asarray(arrays[f"w/{name}"])
  return module


def gradients(module: nnx.Module) -> dict[str, np.ndarray]:
  """All arrays of a module under the names that golden files have for its gradients."""
  found = {}
  for name, layer in (layers if hasattr(module, "stages") else stage_layers)(module).items():
    found[f"g/{name}.weight"] = np.asarray(layer.kernel[...]).T[..., None, None]
    found[f"g/{name}.bias"] = np.asarray(layer.bias[...])
  return found | {f"g/{name}": np.asarray(scalar[...]) for name, scalar in scalars(module).items()}
