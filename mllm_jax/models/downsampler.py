"""Attention down-sampler and scale net: the heads that LLaVA-UHD v2's VDIM is pre-trained through, and left without.

They come from FeatUp (Fu et al. 2024). A high-resolution map is a good one where, brought to the picture's pixels and
pooled patch by patch with learned attention, it gives the vision tower's own features again (paper, eq. 9).

Bringing a map to pixels is linear along each axis, so it is given as two matrices and done one row of patches at a
time: at 336 pixels and 1024 channels the whole would be 462 MB for each map, and a row of patches is 19 MB.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mllm_jax.models import layers

BLUR_TAPS = np.exp(-0.5 * np.arange(-2.0, 3.0) ** 2)  # sigma 1
DROPOUT = 0.2  # of the channels that the saliency is computed from
KEEP = 0.8  # probability that the saliency of a patch counts
HIGHEST = jax.lax.Precision.HIGHEST  # rounded to bfloat16, the weights of an interpolation would shift the picture


def bilinear_matrix(target: int, source: int) -> np.ndarray:
  """Bilinear interpolation along one axis, as PyTorch computes it (align_corners False), as a matrix.

  float32 [target, source]: what each cell of the source weighs.
  """
  position = np.maximum((np.arange(target) + 0.5) * (source / target) - 0.5, 0)
  first = np.floor(position).astype(int)
  share = position - first
  matrix = np.zeros((target, source))
  matrix[np.arange(target), first] += 1 - share
  matrix[np.arange(target), np.minimum(first + 1, source - 1)] += share
  return matrix.astype(np.float32)


def blur(x: jax.Array) -> jax.Array:
  """Gaussian blur (5 taps, sigma 1, reflecting at the ends) along the first axis of [L, ...], L at least 3."""
  padded = jnp.pad(x, ((2, 2), *((0, 0),) * (x.ndim - 1)), mode="reflect")
  weights = (BLUR_TAPS / BLUR_TAPS.sum()).astype(np.float32)
  return sum(weight * padded[tap : tap + len(x)] for tap, weight in enumerate(weights))


def to_pixels(maps: jax.Array, to_rows: jax.Array, to_columns: jax.Array) -> jax.Array:
  """A map [h, w, C] brought to pixels by a matrix along each axis, [H, h] and [W, w]: float32 [H, W, C]."""
  lines = jnp.einsum("yh,hwc->ywc", to_rows, maps.astype(jnp.float32), precision=HIGHEST)
  return jnp.einsum("xw,ywc->yxc", to_columns, lines, precision=HIGHEST)


def draw_keep(key: jax.Array, shape: Sequence[int]) -> jax.Array:
  """Which patches' saliency counts: float32 0 or 1, drawn anew at each use, in evaluation too."""
  return jax.random.bernoulli(key, KEEP, tuple(shape)).astype(jnp.float32)


class AttentionDownsampler(nnx.Module):
  """Pools each patch of kernel x kernel pixels with a softmax over the pixels' saliencies (paper, eq. 9, app. A.2).

  saliency: the linear layer from a pixel's channels to its logit. tap_scale, tap_bias [kernel, kernel]: what the logits
  at each place of a patch are multiplied by and shifted by.
  """

  def __init__(self, width: int, kernel: int = 14, *, rngs: nnx.Rngs):
    self.kernel = kernel
    bound = layers.uniform(1 / math.sqrt(width))
    self.saliency = layers.Linear(width, 1, bias=True, rngs=rngs, kernel_init=bound, bias_init=bound)
    noise = layers.normal(0.01)
    self.tap_scale = nnx.Param(1 + noise(rngs.params(), (kernel, kernel)))
    self.tap_bias = nnx.Param(noise(rngs.params(), (kernel, kernel)))

  def __call__(
    self,
    maps: jax.Array,
    to_rows: jax.Array,
    to_columns: jax.Array,
    keep: jax.Array,
    dropout_key: jax.Array | None = None,
  ) -> jax.Array:
    """One map [h, w, C] -> float32 [H / kernel, W / kernel, C].

    to_rows [H, h], to_columns [W, w]: what brings the map to pixels (before it is blurred). keep [H / kernel,
    W / kernel]: from `draw_keep`. With a key, the channels that the saliency sees are dropped out.

    Raises ValueError where H or W is no multiple of the kernel.
    """
    kernel, width = self.kernel, maps.shape[-1]
    if len(to_rows) % kernel or len(to_columns) % kernel:
      raise ValueError(f"{len(to_rows)} x {len(to_columns)} pixels are no whole patches of {kernel}")
    across = len(to_columns) // kernel
    row_blocks = blur(to_rows).reshape(-1, kernel, to_rows.shape[1])
    blurred_columns = blur(to_columns)
    maps = maps.astype(jnp.float32)

    @jax.checkpoint
    def patch_row(block, keep, key):
      pixels = to_pixels(maps, block, blurred_columns).reshape(kernel, across, kernel, width)
      seen = pixels
      if key is not None:
        seen = jnp.where(jax.random.bernoulli(key, 1 - DROPOUT, pixels.shape), pixels / (1 - DROPOUT), 0)
      logits = self.saliency(seen)[..., 0] * keep[:, None]
      logits = logits * self.tap_scale[...][:, None] + self.tap_bias[...][:, None]
      weights = jax.nn.softmax(logits, axis=(0, 2))
      return jnp.einsum("ynx,ynxc->nc", weights, pixels, precision=HIGHEST)

    with jax.named_scope("downsample"):
      keys = None if dropout_key is None else jax.random.split(dropout_key, len(row_blocks))
      return jax.lax.map(lambda row: patch_row(*row), (row_blocks, keep, keys))


class ScaleNet(nnx.Module):
  """How far off the reconstruction of each patch may be: the s of the uncertainty-weighted loss."""

  def __init__(self, width: int, *, rngs: nnx.Rngs):
    small = layers.uniform(0.1 / math.sqrt(width))
    self.linear = layers.Linear(width, 1, bias=True, rngs=rngs, kernel_init=small, bias_init=small)

  def __call__(self, features: jax.Array) -> jax.Array:
    """Features [..., C] -> float32 [..., 1], at least 1e-4."""
    return jnp.maximum(jnp.exp(self.linear(features.astype(jnp.float32)) + 0.1), 1e-4)


class PretrainingHeads(nnx.Module):
  """What stands between VDIM's levels and their loss, one of each kind a level."""

  def __init__(self, width: int, levels: int = 2, kernel: int = 14, *, rngs: nnx.Rngs):
    self.downsamplers = nnx.List([AttentionDownsampler(width, kernel, rngs=rngs) for _ in range(levels)])
    self.scales = nnx.List([ScaleNet(width, rngs=rngs) for _ in range(levels)])
