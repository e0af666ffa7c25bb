"""What the recipes in `configs/` share: the two stages of LLaVA-1.5, which LLaVA-SP keeps, those of LLaVA-UHD, and
their demos."""

import dataclasses
from pathlib import Path

from mllm_jax.config import (
  Config,
  ConfigError,
  DataConfig,
  EvaluationConfig,
  LoraConfig,
  MeshConfig,
  ModelRecipe,
  ProjectorConfig,
  StageConfig,
  VdimStage,
)

VISION = r"vision/.*"
PROJECTOR = r"projector/.*"
DECODER = r"decoder/(?!.*/lora/).*"
LORA = r"decoder/.*/lora/[ab]"
RESAMPLER = r"projector/resampler/.*"
PYRAMID = r"projector/pyramid/(?!fixup_proj).*"
PYRAMID_FIXUP = r"projector/pyramid/fixup_proj/.*"  # the last projection of VDIM
CLIP = "weights/clip-vit-large-patch14-336"
CONVNEXT = r"projector/pyramid/convnext/.*"
LATERALS = r"projector/pyramid/(norms|laterals)/.*"  # from ConvNeXt's stages to the tower's width
DEMO_ASSETS = Path(__file__).parent / "demo" / "assets"


def parameter_table(projector: float, lora: float = 0.0) -> tuple[tuple[str, float], ...]:
  """Learning rates by pattern: frozen towers, the projector, and adapters where there are any."""
  frozen = ((VISION, 0.0), (DECODER, 0.0), (PROJECTOR, projector))
  return frozen + ((LORA, lora),) if lora else frozen


def llava(
  name: str,
  projector: ProjectorConfig,
  variant: str,
  demo_projector: ProjectorConfig,
  *,
  vision: str = CLIP,
  llm: str = "weights/vicuna-7b-v1.5",
  template: str = "vicuna_v1",
) -> Config:
  """The full-size recipe, with variant "demo" the small one, with "demo_shapes" that on pictures of many shapes. Raises
  ConfigError for another variant.

  vision, llm, template: the towers at full size, and the template of the conversations.
  """
  if variant == "demo":
    return demo(name, demo_projector)
  if variant == "demo_shapes":
    config = demo(name, demo_projector)
    return dataclasses.replace(config, name=f"{name}-demo_shapes", demo_shapes=True)
  if variant:
    raise ConfigError(f"configs/{name}.py has no variant {variant!r}; there are :demo and :demo_shapes")
  return full_size(name, projector, llm, template, vision)


def full_size(name: str, projector: ProjectorConfig, llm: str, template: str, vision: str = CLIP) -> Config:
  """The paper's hyper-parameters (section 4.1): 256 at 1e-3, then 128 with LoRA at 2e-4, projector at 2e-5."""
  return Config(
    name=name,
    model=ModelRecipe(vision=vision, llm=llm, projector=projector),
    pretrain=StageConfig(
      # 582 visual tokens leave 186 places for a caption; a longer one is truncated.
      data=DataConfig(
        path="playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json",
        image_folder="playground/data/LLaVA-Pretrain/images",
        template="plain",
        max_length=768,
      ),
      parameters=parameter_table(projector=1e-3),
      batch_size=256,
    ),
    finetune=StageConfig(
      data=DataConfig(
        path="playground/data/llava_v1_5_mix665k.json",
        image_folder="playground/data",
        template=template,
        max_length=2048,
      ),
      lora=LoraConfig(rank=128, alpha=256.0, dropout=0.05),
      parameters=parameter_table(projector=2e-5, lora=2e-4),
      batch_size=128,
    ),
  )


def demo(name: str, projector: ProjectorConfig) -> Config:
  """The same two stages on handwritten digits with the towers that ship with the package: minutes on a laptop."""
  data = dict(image_folder="{workdir}/data")
  return Config(
    name=f"{name}-demo",
    demo=True,
    model=ModelRecipe(
      vision=str(DEMO_ASSETS / "clip"),
      llm=str(DEMO_ASSETS / "llama"),
      projector=projector,
      dtype="float32",
      frozen_dtype="float32",
      remat="none",
    ),
    pretrain=StageConfig(
      data=DataConfig(path="{workdir}/data/pretrain.json", template="plain", max_length=120, **data),
      parameters=parameter_table(projector=6e-3),
      batch_size=16,
      steps=220,
      beta2=0.95,  # with 0.999 some seeds stay on a plateau for half of so short a stage
    ),
    finetune=StageConfig(
      data=DataConfig(path="{workdir}/data/finetune.json", template="vicuna_v1", max_length=192, **data),
      lora=LoraConfig(rank=32, alpha=64.0, dropout=0.0),
      parameters=parameter_table(projector=1.5e-3, lora=1.5e-3),
      batch_size=16,
      steps=400,
    ),
    evaluation=EvaluationConfig(path="{workdir}/data/heldout.json", batch_size=64, max_new_tokens=8, **data),
    log_every=5,
    checkpoint_every=100,
    loader_threads=2,
  )


def internvl(name: str, projector: ProjectorConfig, variant: str, demo_projector: ProjectorConfig) -> Config:
  """LLaVA-SP's stages (section 4.1) on InternVL 2's towers and tiles, or with variant "demo" the small ones. Raises
  ConfigError for another variant."""
  if variant == "demo":
    return internvl_demo(name, demo_projector)
  if variant:
    raise ConfigError(f"configs/{name}.py has no variant {variant!r}; there is :demo")
  base = full_size(name, projector, "weights/qwen2-0.5b-instruct", "internvl2")
  tiles = lambda data, **changes: dataclasses.replace(data, image_aspect="tiles", **changes)
  return dataclasses.replace(
    base,
    model=dataclasses.replace(base.model, vision="weights/internvit-300m-448px"),
    pretrain=dataclasses.replace(base.pretrain, data=tiles(base.pretrain.data, max_slices=1)),
    finetune=dataclasses.replace(
      base.finetune,
      # 12 tiles and the whole image are 3432 tokens with eight spatial ones each.
      data=tiles(base.finetune.data, max_slices=12, max_images=13, max_length=5120),
    ),
  )


def internvl_demo(name: str, projector: ProjectorConfig) -> Config:
  """The demo's towers with InternVL's tiles and tokens, on pictures of many shapes; stage 1 has square ones."""
  base = demo(name, projector)
  data = dict(image_aspect="tiles", max_slices=4, max_images=8, max_length=256, batching="pack", row_length=256)
  return dataclasses.replace(
    base,
    demo_shapes=True,
    mesh=MeshConfig(cpu_devices=2),
    pretrain=dataclasses.replace(
      base.pretrain,
      data=dataclasses.replace(base.pretrain.data, image_aspect="tiles", max_slices=1, max_length=96),
      # A quarter of the demo's usual rate for twice as many steps, since a layer norm stands first.
      parameters=parameter_table(projector=1.5e-3),
      steps=440,
    ),
    finetune=dataclasses.replace(base.finetune, data=dataclasses.replace(base.finetune.data, **data), batch_size=8),
    # Stage 1 saw squares only.
    evaluation=dataclasses.replace(base.evaluation, stages="finetune"),
  )


def uhd_table(
  projector: ProjectorConfig,
  resampler: float,
  vision: float = 0.0,
  decoder: float = 0.0,
  convnext: float = 0.0,
) -> tuple[tuple[str, float], ...]:
  """Learning rates of LLaVA-UHD: of what makes the visual tokens, of both towers, and of a ConvNeXt, which takes the
  tower's place. VDIM is frozen; a pyramid that no stage of its own prepares learns with the resampler."""
  pyramid = {
    # The paper freezes all of it, the released code all but the last projection, which so has a row to be set.
    "vdim": ((PYRAMID, 0.0), (PYRAMID_FIXUP, 0.0)),
    "deconv": ((PYRAMID, resampler),),
    "convnext": ((CONVNEXT, convnext), (LATERALS, resampler)),
  }
  vision = 0.0 if projector.pyramid == "convnext" else vision
  return ((VISION, vision), (DECODER, decoder), (RESAMPLER, resampler), *pyramid.get(projector.pyramid, ()))


def uhd(
  name: str,
  projector: ProjectorConfig,
  variant: str,
  *,
  llm: str = "weights/vicuna-7b-v1.5",
  pretrain_rate: float = 1e-3,
  templates: tuple[str, str] = ("plain", "vicuna_v1"),
  max_length: int = 3072,
) -> Config:
  """LLaVA-UHD v2's stages (section 4.1), or with variant "demo" the small ones. Raises ConfigError for another variant.

  pretrain_rate: of the attention in the first stage: 1e-3 with Vicuna-7B, 2e-4 with Vicuna-13B and Qwen2-7B.
  templates: of the two stages' conversations.
  """
  if variant == "demo":
    return uhd_demo(name, projector)
  if variant:
    raise ConfigError(f"configs/{name}.py has no variant {variant!r}; there is :demo")
  # 0.1 is the released loader's (llava/train/train.py), in both stages and for both versions.
  slices = DataConfig(image_aspect="slices", max_slices=6, max_images=7, max_length=max_length, enlarge=0.1)
  return Config(
    name=name,
    stages="vdim,pretrain,finetune" if projector.pyramid == "vdim" else "pretrain,finetune",
    model=ModelRecipe(
      vision=CLIP,
      llm=llm,
      projector=projector,
      convnext_weights="weights/clip-convnext-large" if projector.pyramid == "convnext" else "",
    ),
    vdim=VdimStage(data=DataConfig(path="playground/data/coco/train2017")),
    pretrain=StageConfig(
      data=dataclasses.replace(
        slices,
        path="playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json",
        image_folder="playground/data/LLaVA-Pretrain/images",
        template=templates[0],
        max_length=512,
        max_slices=1,
        max_images=1,
      ),
      parameters=uhd_table(projector, pretrain_rate),
      batch_size=256,
    ),
    finetune=StageConfig(
      data=dataclasses.replace(
        slices,
        path="playground/data/llava-uhdv2-sft.json",
        image_folder="playground/data",
        template=templates[1],
      ),
      parameters=uhd_table(projector, 2e-5, vision=2e-5, decoder=2e-5, convnext=2e-5),
      batch_size=128,
    ),
  )


def vdim_demo() -> VdimStage:
  """VDIM's own stage on pictures of digits."""
  # The demo's tower knows its own normalisation only.
  return VdimStage(
    data=DataConfig(path="{workdir}/data/pretrain.json", image_folder="{workdir}/data"),
    batch_size=4,
    steps=40,
    crf_samples=100,
    normalisation="clip",
  )


def uhd_demo(name: str, projector: ProjectorConfig) -> Config:
  """The stages of LLaVA-UHD on digits in pictures of many shapes: minutes on a laptop.

  A window is two patches wide, as at full size. Of the pyramid there are the first two levels, which the next makes
  five times as slow.
  """
  levels = (0,) if projector.pyramid == "none" else (0, 1)
  convnext = dict(convnext_widths=(8, 16, 32, 64), convnext_depths=(1, 1, 2, 1))
  projector = dataclasses.replace(projector, query_grid=4, head_width=32, levels=levels, **convnext)
  base = demo(name, projector)
  slices = dict(image_aspect="slices", max_slices=4)
  return dataclasses.replace(
    base,
    demo_shapes=True,
    stages="vdim,pretrain,finetune" if projector.pyramid == "vdim" else "pretrain,finetune",
    vdim=vdim_demo(),
    pretrain=dataclasses.replace(
      base.pretrain,
      data=dataclasses.replace(base.pretrain.data, **slices | dict(max_slices=1), max_length=96),
      # At 3e-3, as for the other projectors, all tokens become the same within some steps, and stay so.
      parameters=uhd_table(projector, 7e-4, convnext=7e-4),
      batch_size=8,
      steps=600,
    ),
    finetune=dataclasses.replace(
      base.finetune,
      data=dataclasses.replace(base.finetune.data, **slices, batching="pack", max_images=8, max_length=256),
      lora=LoraConfig(),
      parameters=uhd_table(projector, 5e-4, vision=1e-4, decoder=7e-4, convnext=5e-4),
      batch_size=4,  # rows of two or three conversations
      steps=170,
    ),
    # Two halves of a batch side by side, on a core each: twice as fast as both on two.
    mesh=MeshConfig(data=-1, fsdp=1, cpu_devices=2),
    # Stage 1 saw whole pictures only, in which small digits cannot be read.
    evaluation=dataclasses.replace(base.evaluation, stages="finetune"),
  )
