"""LLaVA-1.5 with LoRA, the baseline: a two-layer MLP over CLIP-L/14-336, and Vicuna-7B.

  python -m mllm_jax.train --config=configs/llava15.py --workdir=runs/llava15

The small version on handwritten digits needs no download:

  python -m mllm_jax.train --config=configs/llava15.py:demo --workdir=runs/llava15_demo
"""

from mllm_jax import recipes
from mllm_jax.config import Config, ProjectorConfig


def get_config(variant: str = "") -> Config:
  full_size = ProjectorConfig(kind="mlp2x_gelu")
  demo = ProjectorConfig(kind="mlp2x_gelu")
  return recipes.llava("llava15", full_size, variant, demo_projector=demo)
