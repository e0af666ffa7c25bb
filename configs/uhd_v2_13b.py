"""LLaVA-UHD v2 on CLIP-L/14-336 and Vicuna-13B: slices of any shape, VDIM's pyramid, Hiwin attention.

  python -m mllm_jax.train --config=configs/uhd_v2_13b.py --workdir=runs/uhd_v2_13b

The small version on handwritten digits in wide, tall and large pictures needs no download:

  python -m mllm_jax.train --config=configs/uhd_v2_13b.py:demo --workdir=runs/uhd_v2_13b_demo
"""

from mllm_jax import recipes
from mllm_jax.config import Config, ProjectorConfig


def get_config(variant: str = "") -> Config:
  projector = ProjectorConfig(kind="hiwin", pyramid="vdim", levels=(0, 2))
  return recipes.uhd("uhd_v2_13b", projector, variant, llm="weights/vicuna-13b-v1.5", pretrain_rate=2e-4)
