"""The maps that LLaVA-SP's spatial tokens are made of: parts of the patch map, or the whole of it in fewer cells."""

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax.config import ConfigError, ProjectorConfig


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


def window_count(size: int, strides: tuple[int, int], grid: int) -> int:
  """How many windows there are in a grid of patches."""
  down, across = ((grid - size) // stride + 1 for stride in strides)
  return down * across
