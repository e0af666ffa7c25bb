"""LLaVA-SP with six tokens of a sliding window instead of maps (table 5), on CLIP-L/14-336 and Vicuna-7B.

  python -m mllm_jax.train --config=configs/sp_windows.py --workdir=runs/sp_windows

The small version on handwritten digits needs no download:

  python -m mllm_jax.train --config=configs/sp_windows.py:demo --workdir=runs/sp_windows_demo
"""

from mllm_jax import recipes
from mllm_jax.config import Config, ProjectorConfig


def get_config(variant: str = "") -> Config:
  # The paper gives neither: three windows down and two across, which cover the map, are as many as its maps.
  full_size = ProjectorConfig(
    kind="spatial", sfe="windows", window=12, window_strides=(6, 12), dfi_kernel=0, conv_width=512
  )
  demo = ProjectorConfig(kind="spatial", sfe="windows", window=4, window_strides=(2, 4), dfi_kernel=0, conv_width=64)
  return recipes.llava("sp_windows", full_size, variant, demo_projector=demo)
