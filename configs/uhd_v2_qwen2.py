"""LLaVA-UHD v2 on CLIP-L/14-336 and Qwen2-7B: slices of any shape, VDIM's pyramid, Hiwin attention.

  python -m mllm_jax.train --config=configs/uhd_v2_qwen2.py --workdir=runs/uhd_v2_qwen2

The small version on handwritten digits in wide, tall and large pictures needs no download:

  python -m mllm_jax.train --config=configs/uhd_v2_qwen2.py:demo --workdir=runs/uhd_v2_qwen2_demo
"""

from mllm_jax import recipes
from mllm_jax.config import Config, ProjectorConfig


def get_config(variant: str = "") -> Config:
  return recipes.uhd(
    "uhd_v2_qwen2",
    ProjectorConfig(kind="hiwin", pyramid="vdim", levels=(0, 2)),
    variant,
    llm="weights/qwen2-7b-instruct",
    pretrain_rate=2e-4,
    templates=("chatml", "chatml"),
    max_length=4096,
  )
