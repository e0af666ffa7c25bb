"""The frozen half of a probe: a vision tower's features, as they are, or upsampled by interpolation or by VDIM."""

import jax
import jax.numpy as jnp
from flax import nnx

from mllm_jax import build, parameters, sharding
from mllm_jax.config import ConfigError, MeshConfig, ModelRecipe, ProjectorConfig, VisionConfig
from mllm_jax.models.projectors.pyramid import Bilinear, Features
from mllm_jax.models.projectors.vdim import Vdim
from mllm_jax.models.vision import VisionTower
from mllm_jax.weights import hiwin, vdim
from mllm_jax.weights.mapping import place

KINDS = ("none", "bilinear", "vdim")
NORM_EPS = 1e-5


class Frozen(nnx.Module):
  """A tower for pictures of any shape, and one level of a pyramid over it. stages: that the whole VDIM has."""

  def __init__(self, vision: VisionConfig, kind: str, level: int, stages: int, *, dtype: str, rngs: nnx.Rngs):
    self.vision = VisionTower(vision, any_aspect=True, dtype=dtype, rngs=rngs)
    self.level = 0 if kind == "none" else level
    if kind == "vdim":
      self.pyramid = Vdim(stages, vision.width, rngs=rngs, keep=(level,))
    else:
      self.pyramid = Bilinear((level,)) if kind == "bilinear" else Features()

  def __call__(self, patches: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """uint8 [B, h w, 3 p p] of (h, w) = grid -> float32 [B, 2^l h, 2^l w, C], each place normalised over C.

    The norm has no parameters: one learning rate suits towers whose features are of any size.
    """
    grids = jnp.broadcast_to(jnp.asarray(grid, jnp.int32), (len(patches), 2))
    patches = self.vision.normalise(patches)
    maps = self.pyramid(self.vision(patches, grids), patches, grids)[self.level].astype(jnp.float32)
    centred = maps - maps.mean(-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + NORM_EPS)
    return normed.reshape(len(patches), grid[0] << self.level, grid[1] << self.level, -1)


def count_stages(path: str) -> int:
  """How many stages the VDIM at a path has. Raises WeightsError where there is none."""
  names = vdim.find(path).names()
  prefix = f"{hiwin.PYRAMID}/stages/"
  ours = {name.removeprefix(prefix).split("/")[0] for name in names if name.startswith(prefix)}
  return len(ours) or hiwin.vdim_levels(names)


def load(path: str, vision: VisionConfig, kind: str, level: int, vdim_path: str, dtype: str):
  """(structure, parameters by path) of `Frozen`, with the tower at `path` and the VDIM at `vdim_path`.

  Raises WeightsError where one is missing or the two do not fit, ConfigError where VDIM does not reach the level.
  """
  mesh = sharding.make_mesh(MeshConfig(), jax.local_devices()[:1])
  stages = count_stages(vdim_path) if kind == "vdim" else 0
  if kind == "vdim" and stages < level:
    raise ConfigError(f"{vdim_path}: its VDIM has {stages} levels above the tower's; set --level to {stages} or less")
  make = lambda: Frozen(vision, kind, level, stages, dtype=dtype, rngs=nnx.Rngs(0))
  graphdef, shapes = parameters.flatten(nnx.eval_shape(make))
  flat = build.load_vision(ModelRecipe(vision=path, frozen_dtype=dtype), vision, mesh)
  wanted = {f"projector/{name}": (x.shape, jnp.dtype(dtype)) for name, x in shapes.items() if name not in flat}
  if wanted:
    projector = ProjectorConfig(kind="hiwin", pyramid="vdim", levels=tuple(range(stages + 1)))
    found = place(vdim.open_vdim(vdim_path, projector, vision.width), build.placed(wanted, mesh))
    flat |= {name.removeprefix("projector/"): value for name, value in found.items()}
  return graphdef, flat
