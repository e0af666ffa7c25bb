"""The spatial projector of LLaVA-SP: a few spatial tokens that summarise the patch map, put before the patch tokens.

Spatial feature extractor (SFE): maps of growing size, made from the H x H patch map by cropping around its centre or by
adaptive average pooling, and for each map one convolution whose kernel covers it, so that it gives one token; in the
ablations something else (see `EXTRACTORS`). Detail feature integrator (DFI): the tokens attend to a detail map, a
strided convolution of the whole patch map, and what they find is put beside them. Both follow the paper; where the
released code differs from it `ProjectorConfig` says which is meant.

The released code also replaces NaN and infinities by finite numbers in DFI. That is left out: it hides a broken run,
and changes nothing in a sound one.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from mllm_jax.config import ConfigError, ProjectorConfig, VisionConfig
from mllm_jax.models.layers import LayerNorm, Linear
from mllm_jax.models.projectors import maps
from mllm_jax.models.projectors.mlp import MlpProjector
from mllm_jax.models.projectors.sfe_factorised import FactorisedExtractor
from mllm_jax.models.projectors.sfe_transformer import TransformerExtractor
from mllm_jax.sharding import rows_only

DFI_STRIDE = 2  # paper, table 6: every kernel size is used with stride 2
DFI_NORM_EPS = 1e-5


def has_head_bias(config: ProjectorConfig) -> bool:
  """Whether the last linear layer of the spatial tokens has a bias. As released only cropping with DFI has one."""
  choices = {"released": config.maps == "cropping" and config.dfi_kernel > 0, "always": True, "never": False}
  if config.head_bias not in choices:
    raise ConfigError(f"projector.head_bias={config.head_bias!r} is unknown; known: {', '.join(choices)}")
  return choices[config.head_bias]


class ConvolutionExtractor(nnx.Module):
  """Patch map [B, G, G, C] -> spatial tokens [B, n, E], from the smallest map to the largest, as the paper has it."""

  def __init__(self, config: ProjectorConfig, grid: int, width: int, *, rngs: nnx.Rngs):
    self.config, self.width = config, config.conv_width
    self.kernels = nnx.List([maps.conv_kernel(config, size, width, rngs) for size in maps.map_sizes(config, grid)])

  def __call__(self, patch_map: jax.Array) -> jax.Array:
    # A kernel that covers its whole map is a matrix: each convolution is one product over all k * k * C inputs.
    products = [
      jnp.einsum("bhwc,hwce->be", m, kernel[...].astype(m.dtype))
      for m, kernel in zip(maps.make(self.config, patch_map), self.kernels)
    ]
    return jnp.stack(products, axis=1)


class WindowExtractor(nnx.Module):
  """Patch map [B, G, G, C] -> spatial tokens [B, n, E] of equal windows under one kernel, top to bottom and left to
  right (paper, table 5).

  Neither the paper nor the released code gives the windows' size. The defaults of `ProjectorConfig`, 12 x 12 patches
  6 apart downwards and 12 apart across, cover a map of 24 x 24 and make six tokens, as many as cropping and pooling.
  With 2 and 2 apart they are the 49 tokens of the released code's `conv336_conv_49`.
  """

  def __init__(self, config: ProjectorConfig, grid: int, width: int, *, rngs: nnx.Rngs):
    maps.check_windows(config, grid)
    self.strides, self.width = config.window_strides, config.conv_width
    self.kernel = maps.conv_kernel(config, config.window, width, rngs)

  def __call__(self, patch_map: jax.Array) -> jax.Array:
    return maps.convolve(patch_map, self.kernel, self.strides)


class DetailFeatureIntegrator(nnx.Module):
  """Spatial tokens [B, n, E] beside what they find in the detail map of the patches: [B, n, 2 E] (paper, eq. 4)."""

  def __init__(self, config: ProjectorConfig, grid: int, width: int, *, rngs: nnx.Rngs):
    if not 1 <= config.dfi_kernel <= grid:
      raise ConfigError(
        f"projector.dfi_kernel={config.dfi_kernel} does not fit a grid of {grid}; use 1..{grid}, or 0 for none"
      )
    conv_width = config.conv_width
    self.kernel = maps.conv_kernel(config, config.dfi_kernel, width, rngs)
    self.query_norm, self.key_norm, self.value_norm = (LayerNorm(conv_width, DFI_NORM_EPS, rngs=rngs) for _ in range(3))
    self.query, self.key, self.value = (Linear(conv_width, conv_width, bias=True, rngs=rngs) for _ in range(3))

  def details(self, patch_map: jax.Array) -> jax.Array:
    """The detail map [B, M, E], row-major."""
    return maps.convolve(patch_map, self.kernel, (DFI_STRIDE, DFI_STRIDE))

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


# By `ProjectorConfig.sfe`. Each has `width`, that of its tokens.
EXTRACTORS = {
  "convolution": ConvolutionExtractor,
  "windows": WindowExtractor,
  "transformer": TransformerExtractor,
  "factorised": FactorisedExtractor,
}


class SpatialProjector(nnx.Module):
  """LLaVA-SP's projector: patch features [..., P, C] -> visual tokens [..., n + P, D], the n spatial tokens
  first."""

  def __init__(self, config: ProjectorConfig, grid: int, in_width: int, out_width: int, *, rngs: nnx.Rngs):
    if config.sfe not in EXTRACTORS:
      raise ConfigError(f"projector.sfe={config.sfe!r} is unknown; known: {', '.join(EXTRACTORS)}")
    if config.sfe == "transformer" and config.dfi_kernel:
      raise ConfigError(
        f"projector.dfi_kernel={config.dfi_kernel}: DFI is for the tokens of convolutions; set it to 0 with "
        "projector.sfe=transformer"
      )
    self.grid = grid
    self.sfe = EXTRACTORS[config.sfe](config, grid, in_width, rngs=rngs)
    self.dfi = DetailFeatureIntegrator(config, grid, in_width, rngs=rngs) if config.dfi_kernel else None
    head_width = self.sfe.width + (config.conv_width if self.dfi is not None else 0)
    self.head = Linear(head_width, out_width, bias=has_head_bias(config), rngs=rngs)
    self.patch_mlp = MlpProjector(in_width, out_width, rngs=rngs)

  @jax.named_scope("projector")
  def __call__(
    self, patch_features: jax.Array, patches: jax.Array | None = None, grids: jax.Array | None = None
  ) -> jax.Array:
    axes = patch_features.shape[:-2]
    patch_map = patch_features.reshape(-1, self.grid, self.grid, patch_features.shape[-1])
    tokens = rows_only(self.sfe(patch_map))
    if self.dfi is not None:
      tokens = self.dfi(tokens, patch_map)
    spatial_tokens = self.head(jax.nn.gelu(tokens, approximate=False))
    spatial_tokens = spatial_tokens.reshape(*axes, *spatial_tokens.shape[1:])
    return jnp.concatenate([spatial_tokens, self.patch_mlp(patch_features)], axis=-2)


def make(config: ProjectorConfig, vision: VisionConfig, width: int, *, rngs: nnx.Rngs) -> SpatialProjector:
  """Of `projector.kind` "spatial"."""
  return SpatialProjector(config, vision.grid, vision.width, width, rngs=rngs)


def tokens_per_crop(config: ProjectorConfig, vision: VisionConfig) -> int:
  """The spatial tokens, and one a patch."""
  return maps.spatial_tokens(config, vision.grid) + vision.grid**2
