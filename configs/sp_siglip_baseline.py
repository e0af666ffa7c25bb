"""LLaVA-1.5's MLP on SigLIP-L/16-384 and Vicuna-7B, LLaVA-SP's baseline with this tower (table 7).

  python -m mllm_jax.train --config=configs/sp_siglip_baseline.py --workdir=runs/sp_siglip_baseline

The small version on handwritten digits needs no download:

  python -m mllm_jax.train --config=configs/sp_siglip_baseline.py:demo --workdir=runs/sp_siglip_baseline_demo
"""

from mllm_jax import recipes
from mllm_jax.config import Config, ProjectorConfig


def get_config(variant: str = "") -> Config:
  full_size = ProjectorConfig(kind="mlp2x_gelu")
  demo = ProjectorConfig(kind="mlp2x_gelu")
  return recipes.llava(
    "sp_siglip_baseline", full_size, variant, demo_projector=demo, vision="weights/siglip-large-patch16-384"
  )
