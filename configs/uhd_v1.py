"""LLaVA-UHD v1's resampler, the baseline of LLaVA-UHD v2, on CLIP-L/14-336 and Vicuna-7B.

  python -m mllm_jax.train --config=configs/uhd_v1.py --workdir=runs/uhd_v1

The small version on handwritten digits in wide, tall and large pictures needs no download:

  python -m mllm_jax.train --config=configs/uhd_v1.py:demo --workdir=runs/uhd_v1_demo
"""

from mllm_jax import recipes
from mllm_jax.config import Config, ProjectorConfig


def get_config(variant: str = "") -> Config:
  # Its tokens stay slice by slice; there is no pyramid.
  projector = ProjectorConfig(kind="uhd_v1", pyramid="none", levels=(0,), organisation="slices")
  return recipes.uhd("uhd_v1", projector, variant)
