"""LLaVA-SP with cropping and DFI on CLIP-L/14-336 and Qwen2.5-7B: a decoder that the paper leaves to future work.

  python -m mllm_jax.train --config=configs/sp_qwen2_5.py --workdir=runs/sp_qwen2_5

The small version on handwritten digits, with the demo's own language model, needs no download:

  python -m mllm_jax.train --config=configs/sp_qwen2_5.py:demo --workdir=runs/sp_qwen2_5_demo
"""

from mllm_jax import recipes
from mllm_jax.config import Config, ProjectorConfig


def get_config(variant: str = "") -> Config:
  full_size = ProjectorConfig(kind="spatial", maps="cropping", stride=2, dfi_kernel=16, conv_width=512)
  demo = ProjectorConfig(kind="spatial", maps="cropping", stride=1, dfi_kernel=5, conv_width=64)
  llm = "weights/qwen2.5-7b-instruct"
  return recipes.llava("sp_qwen2_5", full_size, variant, demo_projector=demo, llm=llm, template="qwen2_5")
