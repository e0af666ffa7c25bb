"""LLaVA-UHD's projectors: a pyramid of feature maps of any shape, condensed to a fixed number of tokens a crop."""

import jax
from flax import nnx

from mllm_jax.config import ConfigError, ProjectorConfig, VisionConfig
from mllm_jax.models.projectors import pyramid
from mllm_jax.models.projectors.hiwin import HiwinAttention
from mllm_jax.models.projectors.resampler import Mlp144, Perceiver, UhdV1Resampler
from mllm_jax.sharding import rows_only


class UhdProjector(nnx.Module):
  """LLaVA-UHD v2's projector (VDIM or another pyramid, then Hiwin attention), its predecessor's, an MLP or a perceiver.

  Raises ConfigError for a pyramid, levels, pooling or widths that there are not.
  """

  def __init__(self, config: ProjectorConfig, vision: VisionConfig, width: int, *, rngs: nnx.Rngs):
    if config.kind == "uhd_v1":
      self.pyramid = pyramid.make("none", (0,), vision.width, rngs)
      self.resampler = UhdV1Resampler(
        vision.width, width, query_grid=config.query_grid, head_width=config.head_width, rngs=rngs
      )
      return
    self.pyramid = pyramid.make(
      config.pyramid, config.levels, vision.width, rngs, config.convnext_widths, config.convnext_depths
    )
    if config.kind == "mlp144":
      self.resampler = Mlp144(config.levels, vision.width, width, query_grid=config.query_grid, rngs=rngs)
      return
    if config.kind == "perceiver":
      sizes = dict(query_grid=config.query_grid, head_width=config.head_width)
      self.resampler = Perceiver(config.levels, vision.grid, vision.width, width, **sizes, rngs=rngs)
      return
    self.resampler = HiwinAttention(
      config.levels,
      vision.width,
      width,
      query_grid=config.query_grid,
      pooling=config.pooling,
      head_width=config.head_width,
      rngs=rngs,
    )

  @jax.named_scope("projector")
  def __call__(self, patch_features: jax.Array, patches: jax.Array, grids: jax.Array) -> jax.Array:
    """patch_features [B, K, P, C], normalised patches [B, K, P, 3 p p], grids [B, K, 2] -> [B, K, T, D].

    The K crops of all rows are gone through one after another, and each is made again on the way back: the maps of the
    finest level are 4^l times as large as the features. The rows stay side by side, so a batch split over devices does.
    """
    folded = self.resampler.fold(patch_features.dtype)

    @jax.checkpoint
    def crop(folded, features, patches, grids):
      maps = {level: rows_only(x) for level, x in self.pyramid(features, patches, grids).items()}
      return rows_only(self.resampler(maps, grids, folded))

    if patches.shape[:-1] != patch_features.shape[:-1] or grids.shape != (*patch_features.shape[:-2], 2):
      raise ConfigError(
        f"an image of {patches.shape[-2]} patches in {grids.shape[:-1]} crops does not match features of "
        f"{patch_features.shape[-2]} patches in {patch_features.shape[:-2]} crops: both must be of the same crops"
      )
    patch_features = rows_only(patch_features)
    by_crop = jax.tree.map(lambda x: x.swapaxes(0, 1), (patch_features, patches, grids))
    _, tokens = jax.lax.scan(lambda _, crops: (None, crop(folded, *crops)), None, by_crop)
    return tokens.swapaxes(0, 1)


def tokens_per_crop(config: ProjectorConfig, vision: VisionConfig) -> int:
  """As many as there are windows, whatever the crop's shape."""
  return config.query_grid**2
