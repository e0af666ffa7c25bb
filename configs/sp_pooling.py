"""LLaVA-SP with pooling and DFI, the paper's abstraction-loving model, on CLIP-L/14-336 and Vicuna-7B.

  python -m mllm_jax.train --config=configs/sp_pooling.py --workdir=runs/sp_pooling

The small version on handwritten digits needs no download:

  python -m mllm_jax.train --config=configs/sp_pooling.py:demo --workdir=runs/sp_pooling_demo
"""

from mllm_jax import recipes
from mllm_jax.config import Config, ProjectorConfig


def get_config(variant: str = "") -> Config:
  full_size = ProjectorConfig(kind="spatial", maps="pooling", stride=2, dfi_kernel=16, conv_width=512)
  demo = ProjectorConfig(kind="spatial", maps="pooling", stride=1, dfi_kernel=5, conv_width=64)
  return recipes.llava("sp_pooling", full_size, variant, demo_projector=demo)
