"""The released tiny LLaVA-SP, a tinier model, and batches of prompts made by hand."""

import pathlib

import numpy as np

from mllm_jax.batch import Batch
from mllm_jax.config import DecoderConfig, ModelConfig, ProjectorConfig, VisionConfig
from mllm_jax.data import chat, layout
from mllm_jax.data.patches import patchify
from mllm_jax.models.projectors import tokens_per_crop

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens" / "sp"

RELEASED = ModelConfig(
  vision=VisionConfig(width=16, layers=3, heads=2, mlp_width=32),
  decoder=DecoderConfig(vocab_size=320, width=64, layers=4, heads=4, kv_heads=4, head_width=16, mlp_width=160),
  projector=ProjectorConfig(conv_width=8),
  dtype="float32",
  remat="none",
)

TINY = ModelConfig(
  vision=VisionConfig(image_size=56, width=16, layers=2, heads=2, mlp_width=32),
  decoder=DecoderConfig(vocab_size=320, width=32, layers=2, heads=2, kv_heads=1, head_width=16, mlp_width=64),
  projector=ProjectorConfig(stride=1, dfi_kernel=2, conv_width=8),
  dtype="float32",
  remat="none",
)


def prompt(ids, pixels=None, places=None, config=TINY) -> Batch:
  """A batch of one row; -200 in `ids` stands for the picture `pixels` (H, W, 3)."""
  size = config.vision.image_size
  encoded = chat.Encoded(np.asarray(ids, np.int32), np.zeros(len(ids), bool))
  row = layout.expand(encoded, [tokens_per_crop(config)] * int((encoded.ids == chat.IMAGE_TOKEN_INDEX).sum()))
  row = layout.pad(row, places or len(row.tokens))
  pixels = np.zeros((size, size, 3), np.uint8) if pixels is None else pixels
  grids = np.full((1, 1, 2), config.vision.grid, np.int32)
  return Batch(
    *(field[None] for field in row), patches=patchify(pixels[None, None], config.vision.patch_size), grids=grids
  )


def stack(batches, places) -> Batch:
  """Batches of any length as one, padded to `places`."""

  def join(name):
    fill = -1 if name == "visual_index" else 0
    arrays = [getattr(batch, name) for batch in batches]
    if arrays[0].ndim == 2:
      arrays = [np.pad(array, ((0, 0), (0, places - array.shape[1])), constant_values=fill) for array in arrays]
    return np.concatenate(arrays)

  return Batch(**{name: join(name) for name in Batch.__dataclass_fields__})
