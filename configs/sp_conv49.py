"""LLaVA-SP with 49 tokens of one 12 x 12 kernel, on CLIP-L/14-336 and Vicuna-7B: what the released code has of sliding
windows (`conv336_conv_49`).

  python -m mllm_jax.train --config=configs/sp_conv49.py --workdir=runs/sp_conv49

The small version on handwritten digits needs no download:

  python -m mllm_jax.train --config=configs/sp_conv49.py:demo --workdir=runs/sp_conv49_demo
"""

from mllm_jax import recipes
from mllm_jax.config import Config, ProjectorConfig


def get_config(variant: str = "") -> Config:
  full_size = ProjectorConfig(
    kind="spatial", sfe="windows", window=12, window_strides=(2, 2), dfi_kernel=0, conv_width=512
  )
  demo = ProjectorConfig(kind="spatial", sfe="windows", window=4, window_strides=(2, 2), dfi_kernel=0, conv_width=64)
  return recipes.llava("sp_conv49", full_size, variant, demo_projector=demo)
