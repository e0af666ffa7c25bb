"""LLaVA-SP with cropping and DFI, the paper's detail-loving model, on CLIP-L/14-336 and Vicuna-7B.

  python -m mllm_jax.train --config=configs/sp_cropping.py --workdir=runs/sp_cropping

The small version on handwritten digits needs no download:

  python -m mllm_jax.train --config=configs/sp_cropping.py:demo --workdir=runs/sp_cropping_demo
"""

from mllm_jax import recipes
from mllm_jax.config import Config, ProjectorConfig


def get_config(variant: str = "") -> Config:
  full_size = ProjectorConfig(kind="spatial", maps="cropping", stride=2, dfi_kernel=16, conv_width=512)
  demo = ProjectorConfig(kind="spatial", maps="cropping", stride=1, dfi_kernel=5, conv_width=64)
  return recipes.llava("sp_cropping", full_size, variant, demo_projector=demo)
