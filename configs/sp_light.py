"""LLaVA-SP with cropping by factorised kernels, which have a fortieth of the parameters, and without DFI, whose kernel
would have seven times as many; on CLIP-L/14-336 and Vicuna-7B.

  python -m mllm_jax.train --config=configs/sp_light.py --workdir=runs/sp_light

The small version on handwritten digits needs no download:

  python -m mllm_jax.train --config=configs/sp_light.py:demo --workdir=runs/sp_light_demo
"""

from mllm_jax import recipes
from mllm_jax.config import Config, ProjectorConfig


def get_config(variant: str = "") -> Config:
  full_size = ProjectorConfig(kind="spatial", sfe="factorised", maps="cropping", stride=2, dfi_kernel=0, conv_width=512)
  demo = ProjectorConfig(kind="spatial", sfe="factorised", maps="cropping", stride=1, dfi_kernel=0, conv_width=64)
  return recipes.llava("sp_light", full_size, variant, demo_projector=demo)
