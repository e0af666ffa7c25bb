"""LLaVA-UHD v2 on CLIP-L/14-336 and Vicuna-7B: slices of any shape, VDIM's pyramid, Hiwin attention.

  python -m mllm_jax.train --config=configs/uhd_v2.py --workdir=runs/uhd_v2

What the paper compares its parts with, each with these fields of the command line:

  figure 5, other projectors       --config.model.projector.kind=perceiver, or mlp144
  table 4, other levels            --config.model.projector.levels='(0,1,2)'
  table 4, the last level's loss   --config.vdim.supervision=last
  table 6, other poolings          --config.model.projector.pooling=fixed, or pyramid

The small version on handwritten digits in wide, tall and large pictures needs no download:

  python -m mllm_jax.train --config=configs/uhd_v2.py:demo --workdir=runs/uhd_v2_demo
"""

from mllm_jax import recipes
from mllm_jax.config import Config, ProjectorConfig


def get_config(variant: str = "") -> Config:
  return recipes.uhd("uhd_v2", ProjectorConfig(kind="hiwin", pyramid="vdim", levels=(0, 2)), variant)
