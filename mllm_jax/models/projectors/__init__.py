"""Projectors: from patch features [..., P, C] to visual tokens [..., T, D].

Each is called with the features, the normalised patches [..., P, 3 p p] that they were made from, and the grids
[..., 2]; a projector for square images needs the first only. ../README.md says how to add one.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
from flax import nnx

from mllm_jax.config import ANY_ASPECT, SHUFFLED, ConfigError, ModelConfig, ProjectorConfig, VisionConfig
from mllm_jax.models.projectors import mlp, pixel_shuffle, spatial, uhd


@dataclasses.dataclass(frozen=True)
class Kind:
  """A kind of projector.

  make: the module, from its configuration, the tower's, the decoder's width, and `rngs`.
  tokens: T, how many visual tokens it makes of one crop.
  """

  make: Callable[..., nnx.Module]
  tokens: Callable[[ProjectorConfig, VisionConfig], int]


KINDS = {
  "spatial": Kind(spatial.make, spatial.tokens_per_crop),
  "mlp2x_gelu": Kind(mlp.make, mlp.tokens_per_crop),
  **dict.fromkeys(SHUFFLED, Kind(pixel_shuffle.make, pixel_shuffle.tokens_per_crop)),
  **dict.fromkeys(ANY_ASPECT, Kind(uhd.UhdProjector, uhd.tokens_per_crop)),
}


def kind(config: ModelConfig) -> Kind:
  """What `config.projector.kind` names. Raises ConfigError for what there is not."""
  name = config.projector.kind
  if name not in KINDS:
    raise ConfigError(f"projector.kind={name!r} is unknown; known: {', '.join(KINDS)}")
  return KINDS[name]


def make(config: ModelConfig, rngs: nnx.Rngs) -> nnx.Module:
  """The projector that `config.projector.kind` names, between the widths of the two towers."""
  width = config.decoder.width
  module = kind(config).make(config.projector, config.vision, width, rngs=rngs)
  if config.projector.image_newline:  # no part of the projection: `Mllm.embed` puts it between the rows of tiles
    module.image_newline = nnx.Param(jax.random.normal(rngs.params(), (width,)) / math.sqrt(width))
  return module


def tokens_per_crop(config: ModelConfig) -> int:
  """T: how many visual tokens the projector makes of one crop."""
  return kind(config).tokens(config.projector, config.vision)
