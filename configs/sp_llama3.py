"""LLaVA-SP with cropping and DFI on CLIP-L/14-336 and Llama-3.1-8B: a decoder that the paper leaves to future work.

  python -m mllm_jax.train --config=configs/sp_llama3.py --workdir=runs/sp_llama3

The small version on handwritten digits, with the demo's own language model, needs no download:

  python -m mllm_jax.train --config=configs/sp_llama3.py:demo --workdir=runs/sp_llama3_demo
"""

from mllm_jax import recipes
from mllm_jax.config import Config, ProjectorConfig


def get_config(variant: str = "") -> Config:
  full_size = ProjectorConfig(kind="spatial", maps="cropping", stride=2, dfi_kernel=16, conv_width=512)
  demo = ProjectorConfig(kind="spatial", maps="cropping", stride=1, dfi_kernel=5, conv_width=64)
  llm = "weights/llama-3.1-8b-instruct"
  return recipes.llava("sp_llama3", full_size, variant, demo_projector=demo, llm=llm, template="llava_llama_3")
