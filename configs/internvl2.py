"""InternVL 2 (InternViT-300M-448, Qwen2-0.5B), the plain baseline of LLaVA-SP's table 7.

  python -m mllm_jax.train --config=configs/internvl2.py --workdir=runs/internvl2

The small version on handwritten digits needs no download:

  python -m mllm_jax.train --config=configs/internvl2.py:demo --workdir=runs/internvl2_demo
"""

from mllm_jax import recipes
from mllm_jax.config import Config, ProjectorConfig


def get_config(variant: str = "") -> Config:
  full_size = ProjectorConfig(kind="pixel_shuffle")
  demo = ProjectorConfig(kind="pixel_shuffle")
  return recipes.internvl("internvl2", full_size, variant, demo_projector=demo)
