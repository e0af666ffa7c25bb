"""AdamW with a learning rate for each parameter, and the schedule of the released recipe."""

import re
from typing import Any

import optax

from mllm_jax.config import StageConfig

# What has no weight decay in the released recipe: biases and the scales of norms.
UNDECAYED = re.compile(r".*/(bias|scale)")


def schedule(steps: int, warmup_ratio: float) -> optax.Schedule:
  """Factor on every learning rate: linear from 0 over ceil(warmup_ratio * steps) steps, then half a cosine down to 0.

  As in Hugging Face's cosine schedule the very first step has factor 0.
  """
  warmup = min(steps, -int(-warmup_ratio * steps // 1))
  if warmup >= steps:
    return optax.linear_schedule(0.0, 1.0, max(1, warmup))
  return optax.warmup_cosine_decay_schedule(0.0 if warmup else 1.0, 1.0, warmup, steps, 0.0)


def make(stage: StageConfig, trainable: dict[str, Any]) -> optax.GradientTransformation:
  """Gradients -> AdamW updates before the learning rate, which the step multiplies in by parameter: -rate * factor *
  update.

  `trainable` is {path: array or shape}; only its paths are looked at. Moments are float32, as the parameters are.
  """
  decayed = {path: not UNDECAYED.fullmatch(path) for path in trainable}
  return optax.chain(
    optax.scale_by_adam(b1=stage.beta1, b2=stage.beta2, eps=stage.eps),
    optax.add_decayed_weights(stage.weight_decay, mask=decayed),
  )
