"""Processors for a model: how images become crops of its tower, and which tokens stand between them."""

import types

from mllm_jax.config import ANY_ASPECT, ConfigError, DataConfig, ModelConfig, ProjectorConfig
from mllm_jax.data import dynamic_tiles, slices
from mllm_jax.data.aspects import Anyres, Aspect, Slices, Square, Tiles
from mllm_jax.data.chat import ChatTokenizer, load_tokenizer
from mllm_jax.data.enlarging import Enlarging
from mllm_jax.data.processor import Processor
from mllm_jax.models import projectors

IMAGE_ASPECTS = ("pad", "square", "anyres", "tiles", "slices")


def make_processor(model: ModelConfig, tokenizer: str, data: DataConfig) -> Processor:
  """What turns this model's conversations and images into rows. Raises ConfigError as `make_aspect`, and for a
  data.enlarge that is no share or not for slices."""
  if not 0 <= data.enlarge <= 1 or (data.enlarge and data.image_aspect != "slices"):
    raise ConfigError(
      f"data.enlarge={data.enlarge} must be a share between 0 and 1, and 0 unless data.image_aspect is slices (it is "
      f"{data.image_aspect!r}); 0.1 is LLaVA-UHD's"
    )
  loaded = load_tokenizer(tokenizer)
  aspect = make_aspect(model, loaded, data)
  enlarging = Enlarging(model.vision, data.max_slices, data.enlarge) if data.enlarge else None
  return Processor(loaded, aspect, data.template, data.max_length, data.max_images, enlarging)


def shapes_aspect(model: ModelConfig, data: DataConfig) -> Aspect:
  """`make_aspect` for those who ask for shapes and sizes only, and have no tokenizer: its token ids mean nothing."""
  return make_aspect(model, types.SimpleNamespace(inside_id=lambda text: 0, specials={}), data)


def make_aspect(model: ModelConfig, tokenizer: ChatTokenizer, data: DataConfig) -> Aspect:
  """How images become crops of this model's vision tower.

  Raises ConfigError for an unknown data.image_aspect, or one that the projector cannot read.
  """
  projector, tokens = model.projector, projectors.tokens_per_crop(model)
  if data.image_aspect not in IMAGE_ASPECTS:
    known = ", ".join(IMAGE_ASPECTS)
    raise ConfigError(f"data.image_aspect={data.image_aspect!r} is unknown; known: {known}")
  if data.image_aspect == "anyres":
    if not projector.image_newline:
      raise ConfigError("data.image_aspect=anyres needs model.projector.image_newline=True")
    return Anyres(model.vision, tokens)
  if data.image_aspect in ("tiles", "slices") and data.max_slices < 1:
    raise ConfigError(
      f"data.max_slices={data.max_slices}: 1 takes the whole image only, 6 is LLaVA-UHD's, 12 InternVL's"
    )
  if data.image_aspect == "tiles":
    if projector.any_aspect:
      raise ConfigError(
        f"data.image_aspect=tiles is for square crops; model.projector.kind={projector.kind} has slices"
      )
    marks = [tokenizer.specials.get(mark) for mark in (dynamic_tiles.START, dynamic_tiles.END)]
    return Tiles(model.vision, tokens, data.max_slices, () if None in marks else tuple(marks))
  if data.image_aspect == "slices":
    if not projector.any_aspect:
      raise ConfigError(
        f"data.image_aspect=slices needs a projector that takes images of any shape ({', '.join(ANY_ASPECT)}), and "
        f"model.projector.kind is {projector.kind!r}"
      )
    separators = _separators(projector, tokenizer)
    return Slices(model.vision, tokens, data.max_slices, projector.organisation, separators)
  return Square(model.vision, tokens, cut=data.image_aspect == "square")


def _separators(projector: ProjectorConfig, tokenizer: ChatTokenizer) -> tuple[int, int]:
  """The tokens that end a slice and a row of slices."""
  if projector.separators == "released":
    return slices.SEPARATORS
  if projector.separators != "text":
    raise ConfigError(f"projector.separators={projector.separators!r} is unknown; known: text, released")
  return tokenizer.inside_id(","), tokenizer.inside_id("\n")
