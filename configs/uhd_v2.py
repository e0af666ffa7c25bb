"""LLaVA-UHD v2 on CLIP-L/14-336 and Vicuna-7B: slices of any shape, VDIM's pyramid, Hiwin attention.

  python -m mllm_jax.train --config=configs/uhd_v2.py --workdir=runs/uhd_v2

With Vicuna-13B the paper's first stage has another learning rate:

  --config.model.llm=weights/vicuna-13b-v1.5 and, for projector/resampler/.* in pretrain.parameters, 2e-4

The small version on handwritten digits in wide, tall and large pictures needs no download:

  python -m mllm_jax.train --config=configs/uhd_v2.py:demo --workdir=runs/uhd_v2_demo
"""

from mllm_jax import recipes
from mllm_jax.config import Config, ProjectorConfig


def get_config(variant: str = "") -> Config:
  return recipes.uhd("uhd_v2", ProjectorConfig(kind="hiwin", pyramid="vdim", levels=(0, 2)), variant)
