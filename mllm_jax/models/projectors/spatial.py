"""The spatial projector of LLaVA-SP: a few spatial tokens that summarise the patch map, put before the patch tokens.

Spatial feature extractor (SFE): maps of growing size, made from the H x H patch map by cropping around its centre or by
adaptive average pooling, and for each map one convolution whose kernel covers it, so that it gives one token. Detail
feature integrator (DFI): the tokens attend to a detail map, a strided convolution of the whole patch map, and what they
find is put beside them. Both follow the paper; where the released code differs from it `ProjectorConfig` says which is
meant.

The released code also replaces NaN and infinities by finite numbers in DFI. That is left out: it hides a broken run,
and changes nothing in a sound one.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mllm_jax.config import ConfigError, ProjectorConfig
from mllm_jax.models.layers import LayerNorm, Linear, uniform, zeros
from mllm_jax.models.projectors.mlp import MlpProjector
from mllm_jax.sharding import rows_only

DFI_STRIDE = 2  # paper, table 6: every kernel size is used with stride 2
DFI_NORM_EPS = 1e-5


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


def has_head_bias(config: ProjectorConfig) -> bool:
  """Whether the last linear layer of the spatial tokens has a bias. As released only cropping with DFI has one."""
  choices = {"released": config.maps == "cropping" and config.dfi_kernel > 0, "always": True, "never": False}
  if config.head_bias not in choices:
    raise ConfigError(f"projector.head_bias={config.head_bias!r} is unknown; known: {', '.join(choices)}")
  return choices[config.head_bias]


def pooling_matrix(grid: int, size: int) -> np.ndarray:
  """Adaptive average pooling along one axis as a matrix, float32 [size, grid]: bin i is the mean of the places from
  floor(i grid / size) up to ceil((i + 1) grid / size)."""
  matrix = np.zeros((size, grid), np.float32)
  for i in range(size):
    start, stop = i * grid // size, -(-(i + 1) * grid // size)
    matrix[i, start:stop] = 1 / (stop - start)
  return matrix


class SpatialFeatureExtractor(nnx.Module):
  """Patch map [B, G, G, C] -> spatial tokens [B, n, E], from the smallest map to the largest."""

  def __init__(self, config: ProjectorConfig, grid: int, width: int, *, rngs: nnx.Rngs):
    self.sizes = map_sizes(config, grid)
    self.pooled = config.maps == "pooling"
    self.kernels = nnx.List([conv_kernel(config, size, width, rngs) for size in self.sizes])

  def maps(self, patch_map: jax.Array) -> list[jax.Array]:
    """One map [B, k, k, C] for each size k: crops around the centre, or the whole map pooled to k x k."""
    grid = patch_map.shape[1]
    if self.pooled:

      def pool(size):
        matrix = jnp.asarray(pooling_matrix(grid, size))
        rows = jnp.einsum("ij,bjkc->bikc", matrix, patch_map, preferred_element_type=jnp.float32)
        return jnp.einsum("lk,bikc->bilc", matrix, rows).astype(patch_map.dtype)

      return [patch_map if size == grid else pool(size) for size in self.sizes]
    starts = [(grid - size) // 2 for size in self.sizes]
    return [patch_map[:, start : start + size, start : start + size] for start, size in zip(starts, self.sizes)]

  def __call__(self, patch_map: jax.Array) -> jax.Array:
    # A kernel that covers its whole map is a matrix: each convolution is one product over all k * k * C inputs.
    products = [
      jnp.einsum("bhwc,hwce->be", m, kernel[...].astype(m.dtype))
      for m, kernel in zip(self.maps(patch_map), self.kernels)
    ]
    return jnp.stack(products, axis=1)


class DetailFeatureIntegrator(nnx.Module):
  """Spatial tokens [B, n, E] beside what they find in the detail map of the patches: [B, n, 2 E] (paper, eq. 4)."""

  def __init__(self, config: ProjectorConfig, grid: int, width: int, *, rngs: nnx.Rngs):
    if not 1 <= config.dfi_kernel <= grid:
      raise ConfigError(
        f"projector.dfi_kernel={config.dfi_kernel} does not fit a grid of {grid}; use 1..{grid}, or 0 for none"
      )
    conv_width = config.conv_width
    self.kernel = conv_kernel(config, config.dfi_kernel, width, rngs)
    self.query_norm, self.key_norm, self.value_norm = (LayerNorm(conv_width, DFI_NORM_EPS, rngs=rngs) for _ in range(3))
    self.query, self.key, self.value = (Linear(conv_width, conv_width, bias=True, rngs=rngs) for _ in range(3))

  def details(self, patch_map: jax.Array) -> jax.Array:
    """The detail map [B, M, E], row-major: one product of all windows with the kernel.

    Not `jax.lax.conv`: the windows are so few and so large that a product is the better form.
    """
    size = self.kernel.shape[0]
    starts = range(0, patch_map.shape[1] - size + 1, DFI_STRIDE)
    windows = jnp.stack([patch_map[:, i : i + size, j : j + size] for i in starts for j in starts], axis=1)
    return jnp.einsum("bmhwc,hwce->bme", windows, self.kernel[...].astype(windows.dtype))

  def attention(self, tokens: jax.Array, details: jax.Array) -> jax.Array:
    """How much each token [B, n, E] takes of each place of the detail map [B, M, E]: float32 [B, n, M], sums of 1."""
    queries, keys = self.query(self.query_norm(tokens)), self.key(self.key_norm(details))
    scores = jnp.einsum("bne,bme->bnm", queries, keys, preferred_element_type=jnp.float32)
    return jax.nn.softmax(scores / math.sqrt(tokens.shape[-1]), axis=-1)

  def __call__(self, tokens: jax.Array, patch_map: jax.Array) -> jax.Array:
    details = rows_only(self.details(patch_map))
    values = self.value(self.value_norm(details))
    weights = self.attention(tokens, details).astype(values.dtype)
    found = rows_only(jnp.einsum("bnm,bme->bne", weights, values))
    return rows_only(jnp.concatenate([rows_only(tokens), found], axis=-1))


class SpatialProjector(nnx.Module):
  """LLaVA-SP's projector: patch features [..., P, C] -> visual tokens [..., n + P, D], the n spatial tokens
  first."""

  def __init__(self, config: ProjectorConfig, grid: int, in_width: int, out_width: int, *, rngs: nnx.Rngs):
    self.grid = grid
    self.sfe = SpatialFeatureExtractor(config, grid, in_width, rngs=rngs)
    self.dfi = DetailFeatureIntegrator(config, grid, in_width, rngs=rngs) if config.dfi_kernel else None
    head_width = config.conv_width * (2 if self.dfi is not None else 1)
    self.head = Linear(head_width, out_width, bias=has_head_bias(config), rngs=rngs)
    self.patch_mlp = MlpProjector(in_width, out_width, rngs=rngs)

  @jax.named_scope("projector")
  def __call__(
    self, patch_features: jax.Array, patches: jax.Array | None = None, grids: jax.Array | None = None
  ) -> jax.Array:
    axes = patch_features.shape[:-2]
    patch_map = patch_features.reshape(-1, self.grid, self.grid, patch_features.shape[-1])
    tokens = self.sfe(patch_map)
    if self.dfi is not None:
      tokens = self.dfi(tokens, patch_map)
    spatial_tokens = self.head(jax.nn.gelu(tokens, approximate=False))
    spatial_tokens = spatial_tokens.reshape(*axes, *spatial_tokens.shape[1:])
    return jnp.concatenate([spatial_tokens, self.patch_mlp(patch_features)], axis=-2)


def conv_kernel(config: ProjectorConfig, size: int, width: int, rngs: nnx.Rngs) -> nnx.Param:
  """A kernel [size, size, C, E], initialised as `config.conv_init` says."""
  bound = 1 / math.sqrt(size * size * width)
  inits = {"uniform": uniform(bound), "zeros": zeros}
  if config.conv_init not in inits:
    raise ConfigError(f"projector.conv_init={config.conv_init!r} is unknown; known: {', '.join(inits)}")
  return nnx.Param(inits[config.conv_init](rngs.params(), (size, size, width, config.conv_width)))
