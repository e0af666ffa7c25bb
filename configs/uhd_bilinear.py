"""LLaVA-UHD v2 with bilinear upsampling in VDIM's place (paper, table 3), on CLIP-L/14-336 and Vicuna-7B.

  python -m mllm_jax.train --config=configs/uhd_bilinear.py --workdir=runs/uhd_bilinear

The small version on handwritten digits in wide, tall and large pictures needs no download:

  python -m mllm_jax.train --config=configs/uhd_bilinear.py:demo --workdir=runs/uhd_bilinear_demo
"""

from mllm_jax import recipes
from mllm_jax.config import Config, ProjectorConfig


def get_config(variant: str = "") -> Config:
  return recipes.uhd("uhd_bilinear", ProjectorConfig(kind="hiwin", pyramid="bilinear", levels=(0, 2)), variant)
