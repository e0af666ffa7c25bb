"""InternVL-2.0-SP with pooling and DFI (LLaVA-SP, table 7), on InternViT-300M-448 and Qwen2-0.5B.

  python -m mllm_jax.train --config=configs/internvl2_sp_pooling.py --workdir=runs/internvl2_sp_pooling

The small version on handwritten digits needs no download:

  python -m mllm_jax.train --config=configs/internvl2_sp_pooling.py:demo --workdir=runs/internvl2_sp_pooling_demo

The spatial tokens of each tile, eight by the paper's stride on 32 x 32 patches, stand before the tile's own 256: see
mllm_jax/models/projectors/pixel_shuffle.py.
"""

from mllm_jax import recipes
from mllm_jax.config import Config, ProjectorConfig


def get_config(variant: str = "") -> Config:
  full_size = ProjectorConfig(kind="spatial_shuffle", maps="pooling", stride=2, dfi_kernel=16, conv_width=512)
  demo = ProjectorConfig(kind="spatial_shuffle", maps="pooling", stride=1, dfi_kernel=5, conv_width=64)
  return recipes.internvl("internvl2_sp_pooling", full_size, variant, demo_projector=demo)
