"""Projectors: from patch features [..., P, C] to visual tokens [..., T, D].

Each is called with the features, the normalised patches [..., P, 3 p p] that they were made from, and the grids
[..., 2]; a projector for square images needs the first only.
"""

import math

import jax
from flax import nnx

from mllm_jax.config import ANY_ASPECT, SHUFFLED, ConfigError, ModelConfig
from mllm_jax.models.projectors import pixel_shuffle
from mllm_jax.models.projectors.mlp import MlpProjector
from mllm_jax.models.projectors.spatial import SpatialProjector, map_sizes
from mllm_jax.models.projectors.uhd import UhdProjector


def make(config: ModelConfig, rngs: nnx.Rngs) -> nnx.Module:
  """The projector that `config.projector.kind` names, between the widths of the two towers."""
  vision, projector, width = config.vision, config.projector, config.decoder.width
  if projector.kind == "mlp2x_gelu":
    module = MlpProjector(vision.width, width, rngs=rngs)
  elif projector.kind == "spatial":
    module = SpatialProjector(projector, vision.grid, vision.width, width, rngs=rngs)
  elif projector.kind in SHUFFLED:
    module = pixel_shuffle.make(projector, vision, width, rngs=rngs)
  elif projector.any_aspect:
    module = UhdProjector(projector, vision, width, rngs=rngs)
  else:
    known = ", ".join(("spatial", "mlp2x_gelu", *SHUFFLED, *ANY_ASPECT))
    raise ConfigError(f"projector.kind={projector.kind!r} is unknown; known: {known}")
  if projector.image_newline:  # no part of the projection: `Mllm.embed` puts it between the rows of tiles
    module.image_newline = nnx.Param(jax.random.normal(rngs.params(), (width,)) / math.sqrt(width))
  return module


def tokens_per_crop(config: ModelConfig) -> int:
  """T: how many visual tokens the projector makes of one crop."""
  if config.projector.any_aspect:
    return config.projector.query_grid**2
  if config.projector.kind in SHUFFLED:
    return pixel_shuffle.tokens_per_crop(config.projector, config.vision)
  patches = config.vision.grid**2
  return patches + (len(map_sizes(config.projector, config.vision.grid)) if config.projector.kind == "spatial" else 0)
