"""LLaVA-UHD v2 with transposed convolutions in VDIM's place (paper, table 3), on CLIP-L/14-336 and Vicuna-7B.

  python -m mllm_jax.train --config=configs/uhd_deconv.py --workdir=runs/uhd_deconv

The small version on handwritten digits in wide, tall and large pictures needs no download:

  python -m mllm_jax.train --config=configs/uhd_deconv.py:demo --workdir=runs/uhd_deconv_demo
"""

from mllm_jax import recipes
from mllm_jax.config import Config, ProjectorConfig


def get_config(variant: str = "") -> Config:
  return recipes.uhd("uhd_deconv", ProjectorConfig(kind="hiwin", pyramid="deconv", levels=(0, 2)), variant)
