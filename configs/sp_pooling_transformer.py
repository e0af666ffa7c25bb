"""LLaVA-SP with pooling, and transformer blocks instead of convolutions (table 3), on CLIP-L/14-336 and Vicuna-7B.

A token is a cell of its map. The released code cuts pooled maps into tokens across cells and channels, which
--config.model.projector.token_order=released does too; released weights need it.

  python -m mllm_jax.train --config=configs/sp_pooling_transformer.py --workdir=runs/sp_pooling_transformer

The small version on handwritten digits needs no download:

  python -m mllm_jax.train --config=configs/sp_pooling_transformer.py:demo --workdir=runs/sp_pooling_transformer_demo
"""

from mllm_jax import recipes
from mllm_jax.config import Config, ProjectorConfig


def get_config(variant: str = "") -> Config:
  full_size = ProjectorConfig(kind="spatial", sfe="transformer", maps="pooling", stride=2, dfi_kernel=0)
  demo = ProjectorConfig(kind="spatial", sfe="transformer", maps="pooling", stride=1, dfi_kernel=0)
  return recipes.llava("sp_pooling_transformer", full_size, variant, demo_projector=demo)
