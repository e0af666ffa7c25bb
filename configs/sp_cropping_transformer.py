"""LLaVA-SP with cropping, and transformer blocks instead of convolutions (table 3), on CLIP-L/14-336 and Vicuna-7B.

  python -m mllm_jax.train --config=configs/sp_cropping_transformer.py --workdir=runs/sp_cropping_transformer

The small version on handwritten digits needs no download:

  python -m mllm_jax.train --config=configs/sp_cropping_transformer.py:demo --workdir=runs/sp_cropping_transformer_demo
"""

from mllm_jax import recipes
from mllm_jax.config import Config, ProjectorConfig


def get_config(variant: str = "") -> Config:
  full_size = ProjectorConfig(kind="spatial", sfe="transformer", maps="cropping", stride=2, dfi_kernel=0)
  demo = ProjectorConfig(kind="spatial", sfe="transformer", maps="cropping", stride=1, dfi_kernel=0)
  return recipes.llava("sp_cropping_transformer", full_size, variant, demo_projector=demo)
