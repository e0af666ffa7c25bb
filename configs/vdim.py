"""LLaVA-UHD v2's VDIM alone: CLIP-L/14-336's features at 2 and 4 times the resolution, learnt on COCO's images.

  python -m mllm_jax.train --config=configs/vdim.py --workdir=runs/vdim

Other runs take what it leaves with --config.model.vdim_weights=runs/vdim/vdim/vdim.safetensors. The small version on
handwritten digits needs no download:

  python -m mllm_jax.train --config=configs/vdim.py:demo --workdir=runs/vdim_demo
"""

from mllm_jax import recipes
from mllm_jax.config import Config, ConfigError, DataConfig, ModelRecipe, ProjectorConfig, VdimStage


def get_config(variant: str = "") -> Config:
  if variant not in ("", "demo"):
    raise ConfigError(f"configs/vdim.py has no variant {variant!r}; there is :demo")
  projector = ProjectorConfig(kind="hiwin", pyramid="vdim", levels=(0, 2))
  if variant == "demo":
    return Config(
      name="vdim-demo",
      demo=True,
      stages="vdim",
      model=ModelRecipe(
        vision=str(recipes.DEMO_ASSETS / "clip"),
        llm=str(recipes.DEMO_ASSETS / "llama"),
        projector=projector,
        dtype="float32",
        frozen_dtype="float32",
      ),
      # The demo's tower knows its own normalisation only.
      vdim=VdimStage(
        data=DataConfig(path="{workdir}/data/pretrain.json", image_folder="{workdir}/data"),
        batch_size=4,
        steps=60,
        crf_samples=100,
        normalisation="clip",
      ),
      log_every=1,
      checkpoint_every=20,
      loader_threads=2,
    )
  return Config(
    name="vdim",
    stages="vdim",
    model=ModelRecipe(projector=projector),
    vdim=VdimStage(data=DataConfig(path="playground/data/coco/train2017")),
    log_every=10,
    checkpoint_every=500,
  )
