"""The whole projector of LLaVA-UHD v2 against the released code's numbers: VDIM, windows, attention, all gradients.

Two images, one of them in two slices and an overview, one unsliced: four crops of three shapes. The files keep what
torch drew from a seed as that draw, and images as sums of pixels, which is all that the released model takes of them.
"""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import released
from flax import nnx
from uhd_draws import FOLDER, Normals32, close

from mllm_jax.config import DecoderConfig, ModelConfig, ProjectorConfig, VisionConfig
from mllm_jax.models import projectors
from mllm_jax.models.projectors.hiwin import sincos_table
from mllm_jax.weights import hiwin, mlp

SIDE = 14  # pixels of a patch
FOURTHS = [slice(0, 4), slice(3, 7), slice(7, 11), slice(10, 14)]  # of a patch that the 4x pixels are the means of
HALVES = [slice(0, 7), slice(7, 14)]


def read(name: str) -> dict[str, np.ndarray]:
  """All arrays of a file, those that were drawn from seeds drawn again."""
  with np.load(FOLDER / f"{name}.npz") as file:
    arrays = dict(file)
  for plan in json.loads(str(arrays.pop("draws_json"))):
    normals = Normals32(plan["seed"])
    for array, shape, scale, offset, skip, _ in plan["draws"]:
      normals.uniform(skip)
      arrays[array] = (offset + scale * normals.draw(tuple(shape))).astype(np.float32)
  arrays["w/pos_embed"] = sincos_table(64, 12).astype(np.float32)  # which has numbers of its own to be checked against
  return arrays


def from_sums(sums: np.ndarray) -> np.ndarray:
  """Patches [P, 14 * 14 * 3], colours last, whose pixels have these sums [P, 3, 16 + 4]: of the 4 x 4 squares that the
  finest level takes the means of, and of the quarters, which level 1 does."""
  squares = [(a, b) for a in FOURTHS for b in FOURTHS] + [(a, b) for a in HALVES for b in HALVES]
  members = np.zeros((len(squares), SIDE, SIDE))
  for row, square in zip(members, squares):
    row[square] = 1
  pixels = sums.astype(np.float64) @ np.linalg.pinv(members.reshape(len(squares), -1)).T  # [P, 3, 14 * 14]
  return pixels.swapaxes(1, 2).reshape(len(sums), -1)


def crops(arrays: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """features [1, 4, P, C], normalised patches [1, 4, P, 588] and grids [1, 4, 2] of all crops."""
  grids = arrays["grids_hw"].astype(np.int32)
  count = int(grids.prod(1).max())
  fill = lambda x: np.pad(x, ((0, count - len(x)), (0, 0))).astype(np.float32)
  features = [fill(arrays[f"features{i}"]) for i in range(len(grids))]
  patches = [fill(from_sums(arrays[f"pixel_sums{i}"]) / 127.5 - 1) for i in range(len(grids))]
  return np.stack(features)[None], np.stack(patches)[None], grids[None]


def projector(levels: tuple[int, ...], arrays: dict[str, np.ndarray]) -> tuple[nnx.Module, hiwin.Table]:
  """The projector with the released weights, read by their own names, and the table that was read by."""
  config = ModelConfig(
    vision=VisionConfig(width=16),
    decoder=DecoderConfig(width=64),
    projector=ProjectorConfig(kind="hiwin", levels=levels, head_width=64 // int(arrays["heads"])),
  )
  table = hiwin.table(config.projector)
  weights = {hiwin.STEM + name: array for name, array in released.group(arrays, "w/").items()}
  make = lambda: projectors.make(config, nnx.Rngs(0))
  return released.fill(make(), "projector/", table, weights), table


@pytest.mark.long
def test_values():
  arrays = read("e2e_projector_mask7")
  module, _ = projector((0, 1, 2), arrays)
  out = released.jit(lambda module, *crops: module(*crops))(module, *crops(arrays))
  assert out.shape == (1, 4, 144, 64) and arrays["mask"] == 7
  close("out", out, arrays, 1e-5)


def test_values_and_gradients():
  arrays = read("e2e_projector_mask5")
  module, table = projector((0, 2), arrays)
  features, patches, grids = crops(arrays)
  cotangent = jnp.asarray(arrays["cotangent"])[None]

  def loss(module, features):
    out = module(features, patches, grids)
    return (out * cotangent).sum(), out

  differentiate = released.jit(nnx.value_and_grad(loss, argnums=(0, 1), has_aux=True))
  (_, out), (by_weight, by_feature) = differentiate(module, jnp.asarray(features))
  close("out", out, arrays, 1e-5)
  close("grad_features", by_feature[0], arrays, 1e-4)
  found = released.group(released.to_foreign(by_weight, "projector/", table), mlp.PREFIX + hiwin.STEM)
  wanted = released.group(arrays, "g/")
  assert wanted.keys() == found.keys()
  for name in wanted:
    # The gradient by the width of the spatial kernel is a small difference of large sums over all pixels.
    close(f"g/{name}", found[name], arrays, 5e-4 if name.endswith("sigma_spatial") else 1e-4)
