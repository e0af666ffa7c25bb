"""LLaVA-SP with pooling and DFI on SigLIP-L/16-384 and Vicuna-7B (table 7).

  python -m mllm_jax.train --config=configs/sp_siglip_pooling.py --workdir=runs/sp_siglip_pooling

The small version on handwritten digits needs no download:

  python -m mllm_jax.train --config=configs/sp_siglip_pooling.py:demo --workdir=runs/sp_siglip_pooling_demo
"""

from mllm_jax import recipes
from mllm_jax.config import Config, ProjectorConfig


def get_config(variant: str = "") -> Config:
  full_size = ProjectorConfig(kind="spatial", maps="pooling", stride=2, dfi_kernel=16, conv_width=512)
  demo = ProjectorConfig(kind="spatial", maps="pooling", stride=1, dfi_kernel=5, conv_width=64)
  return recipes.llava(
    "sp_siglip_pooling", full_size, variant, demo_projector=demo, vision="weights/siglip-large-patch16-384"
  )
