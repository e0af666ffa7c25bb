"""What LLaVA-SP's spatial tokens are made of: maps, which are parts of the patch map or the whole of it in fewer cells,
and kernels over them."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mllm_jax.config import ConfigError, ProjectorConfig
from mllm_jax.models.layers import uniform, zeros


def map_sizes(config: ProjectorConfig, grid: int) -> tuple[int, ...]:
  """Side lengths of the maps, smallest first; one spatial token each.

  They grow by `stride` patches on each side, from 2 * stride to the whole grid: 4, 8, ..., 24 for stride 2 on 24 x 24.
  Raises ConfigError where that does not end at the grid, or where given sizes do not fit it.
  """
  if config.maps not in ("cropping", "pooling"):
    raise ConfigError(f"projector.maps={config.maps!r} is unknown; known: cropping, pooling")
  if config.sizes:
    sizes = tuple(config.sizes)
    if list(sizes) != sorted(set(sizes)) or sizes[0] < 1 or sizes[-1] > grid:
      raise ConfigError(f"projector.sizes={sizes} must grow and lie in 1..{grid}, the tower's grid")
    off_centre = [size for size in sizes if (grid - size) % 2]
    if config.maps == "cropping" and off_centre:
      raise ConfigError(
        f"projector.sizes={sizes}: {off_centre} cannot be centred in a grid of {grid}; "
        f"use {'even' if grid % 2 == 0 else 'odd'} sizes"
      )
    return sizes
  if config.stride < 1 or grid % (2 * config.stride):
    fitting = [stride for stride in range(1, grid // 2 + 1) if grid % (2 * stride) == 0]
    raise ConfigError(
      f"projector.stride={config.stride} does not fit a grid of {grid}: maps growing by {config.stride} on "
      f"each side never end at {grid}; use one of {fitting}"
      if fitting
      else f"projector.stride={config.stride} does not fit a grid of {grid}: it is odd; name the map sizes in "
      "projector.sizes instead"
    )
  return tuple(range(2 * config.stride, grid + 1, 2 * config.stride))


def pooling_matrix(grid: int, size: int) -> np.ndarray:
  """Adaptive average pooling along one axis as a matrix, float32 [size, grid]: bin i is the mean of the places from
  floor(i grid / size) up to ceil((i + 1) grid / size)."""
  matrix = np.zeros((size, grid), np.float32)
  for i in range(size):
    start, stop = i * grid // size, -(-(i + 1) * grid // size)
    matrix[i, start:stop] = 1 / (stop - start)
  return matrix


def pool(patch_map: jax.Array, size: int) -> jax.Array:
  """The whole map [B, G, G, C] pooled to [B, size, size, C]."""
  matrix = jnp.asarray(pooling_matrix(patch_map.shape[1], size))
  rows = jnp.einsum("ij,bjkc->bikc", matrix, patch_map, preferred_element_type=jnp.float32)
  return jnp.einsum("lk,bikc->bilc", matrix, rows).astype(patch_map.dtype)


def make(config: ProjectorConfig, patch_map: jax.Array) -> list[jax.Array]:
  """Of a patch map [B, G, G, C] one map [B, k, k, C] for each size k: crops around the centre, or the whole pooled."""
  grid = patch_map.shape[1]
  sizes = map_sizes(config, grid)
  if config.maps == "pooling":
    return [patch_map if size == grid else pool(patch_map, size) for size in sizes]
  starts = [(grid - size) // 2 for size in sizes]
  return [patch_map[:, start : start + size, start : start + size] for start, size in zip(starts, sizes)]


def windows(patch_map: jax.Array, size: int, strides: tuple[int, int]) -> jax.Array:
  """All windows of size x size patches, `strides` patches apart down and across, row by row: [B, n, size, size, C]."""
  rows, columns = (range(0, patch_map.shape[1] - size + 1, stride) for stride in strides)
  return jnp.stack([patch_map[:, i : i + size, j : j + size] for i in rows for j in columns], axis=1)


def check_windows(config: ProjectorConfig, grid: int) -> None:
  """Raises ConfigError where `config` has no windows in a grid of patches."""
  if not 1 <= config.window <= grid:
    raise ConfigError(f"projector.window={config.window} does not fit a grid of {grid}; use 1..{grid}")
  if len(config.window_strides) != 2 or min(config.window_strides) < 1:
    raise ConfigError(
      f"projector.window_strides={config.window_strides} must be two numbers from 1 on: patches down, and across"
    )


def spatial_tokens(config: ProjectorConfig, grid: int) -> int:
  """How many spatial tokens there are: one a window, or one a map."""
  if config.sfe != "windows":
    return len(map_sizes(config, grid))
  check_windows(config, grid)
  return math.prod((grid - config.window) // stride + 1 for stride in config.window_strides)


def convolve(patch_map: jax.Array, kernel: nnx.Param, strides: tuple[int, int]) -> jax.Array:
  """A strided convolution of [B, G, G, C] with [k, k, C, E], row by row [B, M, E]: one product of all windows.

  Not `jax.lax.conv`: the windows are so few and so large that a product is the better form.
  """
  found = windows(patch_map, kernel.shape[0], strides)
  return jnp.einsum("bmhwc,hwce->bme", found, kernel[...].astype(found.dtype))


def conv_kernel(config: ProjectorConfig, size: int, width: int, rngs: nnx.Rngs) -> nnx.Param:
  """A kernel [size, size, C, E], initialised as `config.conv_init` says."""
  init = kernel_init(config, size * size * width)
  return nnx.Param(init(rngs.params(), (size, size, width, config.conv_width)))


def kernel_init(config: ProjectorConfig, fan_in: int) -> Callable:
  """The initialiser that `config.conv_init` names. Raises ConfigError where there is none."""
  inits = {"uniform": uniform(1 / math.sqrt(fan_in)), "zeros": zeros}
  if config.conv_init not in inits:
    raise ConfigError(f"projector.conv_init={config.conv_init!r} is unknown; known: {', '.join(inits)}")
  return inits[config.conv_init]
