"""The released tiny LLaVA-SP, a tinier model, and prompts made by hand."""

import pathlib

import jax.numpy as jnp
import numpy as np

from mllm_jax import parameters
from mllm_jax.config import DecoderConfig, ModelConfig, ProjectorConfig, VisionConfig
from mllm_jax.data import chat, layout
from mllm_jax.data.patches import patchify
from mllm_jax.data.processor import Row
from mllm_jax.models.mllm import Mllm, abstract
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


def random_model(config: ModelConfig) -> Mllm:
  """Filled by NumPy: compiling the initialisers would take longest of all."""
  rng = np.random.default_rng(3)
  graphdef, shapes = parameters.flatten(abstract(config))

  def fill(path, leaf):
    if leaf.dtype == np.int8:
      return rng.integers(-127, 128, leaf.shape)
    if path.endswith("scale"):  # of a kernel in whole numbers, or a norm's
      return np.full(leaf.shape, 1 / 300 if "_proj/" in path else 1)
    return rng.normal(0, 0.3, leaf.shape)

  flat = {path: jnp.asarray(fill(path, leaf), leaf.dtype) for path, leaf in shapes.items()}
  return parameters.unflatten(graphdef, flat)


def prompt(ids, pixels=None, config=TINY) -> Row:
  """A prompt as long as it is; -200 in `ids` stands for the picture `pixels` (H, W, 3)."""
  encoded = chat.Encoded(np.asarray(ids, np.int32), np.zeros(len(ids), bool))
  pictures = int((encoded.ids == chat.IMAGE_TOKEN_INDEX).sum())
  places = layout.expand(encoded, [tokens_per_crop(config)] * pictures)
  vision = config.vision
  patches = np.zeros((1, vision.grid**2, vision.patch_values), np.uint8)
  patches = patches if pixels is None else patchify(pixels[None], vision.patch_size)
  return Row(*places, patches, np.full((1, 2), vision.grid if pictures else 0, np.int32))


def answered(question, answer, pixels=None) -> Row:
  """A row of these ids, in which the answer's are weighted."""
  row, first = prompt([*question, *answer], pixels), len(prompt(question, pixels).tokens)
  targets, weights = row.targets.copy(), row.loss_weights.copy()
  targets[first - 1 : -1], weights[first - 1 : -1] = answer, 1
  return row._replace(targets=targets, loss_weights=weights)


class Plain:
  """In place of a processor: a token is written as its number in brackets, and nothing ends an answer but `end_id`."""

  max_length = 256

  def __init__(self, end_id=10_000):
    self.end_id, self.tokenizer = end_id, self
    self.end_ids = ()

  def decode(self, ids):
    return "".join(f"[{number}]" for number in ids)
