"""A trained VDIM in a file of its own: its parameters by our paths, in safetensors, and what they are for.

A run has one in its folder, WORKDIR/vdim/vdim.safetensors, from which all of its later stages read their VDIM.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mllm_jax.weights.errors import WeightsError
from mllm_jax.weights.io import open_weights

PATH = "projector/pyramid/"  # what its parameters' paths begin with
ABOUT = "mllm_jax vdim"
FILE = Path("vdim") / "vdim.safetensors"


def in_run(workdir: str | Path) -> Path:
  """Where the VDIM of a run is."""
  return Path(workdir) / FILE


def write(path: Path, arrays: Mapping[str, np.ndarray], texts: Mapping[str, str]) -> None:
  """Writes parameters by their paths as float32, beside and then renamed. texts: stand in the file, see `about`.

  The same content gives the same bytes, and so the same fingerprint: safetensors puts several texts in any order, so
  they are one.
  """
  from safetensors.numpy import save_file

  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(path.name + ".partial")
  whole = {name: np.asarray(array, np.float32, order="C") for name, array in sorted(arrays.items())}
  save_file(whole, partial, metadata={ABOUT: json.dumps(dict(texts), sort_keys=True)})
  os.replace(partial, path)


def about(path: Path) -> dict[str, str]:
  """What `write` was told about the parameters."""
  from safetensors import safe_open

  with safe_open(path, "np") as file:
    return json.loads((file.metadata() or {}).get(ABOUT, "{}"))


def read(path: str | Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
  """The parameters `shapes` names. Raises WeightsError where the file is of another VDIM."""
  weights = open_weights(path)
  there = {name: tuple(weights.shape(name)) for name in weights.names()}
  wrong = [
    f"{name} is {there.get(name, 'missing')} and must be {tuple(shape)}"
    for name, shape in shapes.items()
    if there.get(name) != tuple(shape)
  ]
  if wrong:
    raise WeightsError(
      f"{path} is the VDIM of another model: {'; '.join(wrong[:4])}. Set model.projector.levels and model.vision as "
      "they were when it was trained"
    )
  return {name: np.array(weights.read(name)) for name in shapes}
