"""LLaVA-UHD v2 with a CLIP-ConvNeXt-L in the ViT's place: its stages are the pyramid (paper, table 3). Vicuna-7B.

  python -m mllm_jax.train --config=configs/uhd_convnext.py --workdir=runs/uhd_convnext

The small version on handwritten digits in wide, tall and large pictures needs no download; its ConvNeXt is small and
starts from noise:

  python -m mllm_jax.train --config=configs/uhd_convnext.py:demo --workdir=runs/uhd_convnext_demo
"""

from mllm_jax import recipes
from mllm_jax.config import Config, ProjectorConfig


def get_config(variant: str = "") -> Config:
  return recipes.uhd("uhd_convnext", ProjectorConfig(kind="hiwin", pyramid="convnext", levels=(0, 2)), variant)
