"""The engine itself, on a random model that is tiny."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from serving import VISION

from mllm_jax import parameters
from mllm_jax.config import DecoderConfig, ModelConfig, ProjectorConfig
from mllm_jax.data.aspects import Square
from mllm_jax.data.processor import Processor
from mllm_jax.inference.engine import Engine
from mllm_jax.models.mllm import abstract
from mllm_jax.models.projectors import tokens_per_crop

CONFIG = ModelConfig(
  vision=VISION,
  decoder=DecoderConfig(vocab_size=320, width=32, layers=2, heads=2, kv_heads=1, head_width=16, mlp_width=64),
  projector=ProjectorConfig(stride=1, dfi_kernel=2, conv_width=8),
  dtype="float32",
  remat="none",
)


def make(tokenizer, rows: int, max_length: int) -> tuple[Engine, Processor]:
  """An engine whose greedy answers vary, and what makes its prompts. The arrays are NumPy's, which compiles nothing."""
  rng = np.random.default_rng(3)
  graphdef, shapes = parameters.flatten(abstract(dataclasses.replace(CONFIG)))
  fill = lambda path, shape: np.ones(shape) if path.endswith("scale") else rng.normal(0, 0.3, shape)
  flat = {path: jnp.asarray(fill(path, leaf.shape), jnp.float32) for path, leaf in shapes.items()}
  processor = Processor(tokenizer, Square(VISION, tokens_per_crop(CONFIG)), "vicuna_v1", max_length, 1)
  return Engine(parameters.unflatten(graphdef, flat), processor, rows=rows, max_length=max_length), processor
