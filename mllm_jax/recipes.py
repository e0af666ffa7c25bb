"""What the recipes in `configs/` share: the two stages of LLaVA-1.5, which LLaVA-SP keeps, and their demo."""

from pathlib import Path

from mllm_jax.config import (
  Config,
  ConfigError,
  DataConfig,
  EvaluationConfig,
  LoraConfig,
  ModelRecipe,
  ProjectorConfig,
  StageConfig,
)

VISION = r"vision/.*"
PROJECTOR = r"projector/.*"
DECODER = r"decoder/(?!.*/lora/).*"
LORA = r"decoder/.*/lora/[ab]"
DEMO_ASSETS = Path(__file__).parent / "demo" / "assets"


def parameter_table(projector: float, lora: float = 0.0) -> tuple[tuple[str, float], ...]:
  """Learning rates by pattern: frozen towers, the projector, and adapters where there are any."""
  frozen = ((VISION, 0.0), (DECODER, 0.0), (PROJECTOR, projector))
  return frozen + ((LORA, lora),) if lora else frozen


def llava(name: str, projector: ProjectorConfig, variant: str, demo_projector: ProjectorConfig) -> Config:
  """The full-size recipe, or with variant "demo" the small one. Raises ConfigError for another variant."""
  if variant == "demo":
    return demo(name, demo_projector)
  if variant:
    raise ConfigError(f"configs/{name}.py has no variant {variant!r}; there is :demo")
  return full_size(name, projector)


def full_size(name: str, projector: ProjectorConfig) -> Config:
  """The paper's hyper-parameters (section 4.1): 256 at 1e-3, then 128 with LoRA at 2e-4, projector at 2e-5."""
  return Config(
    name=name,
    model=ModelRecipe(vision="weights/clip-vit-large-patch14-336", llm="weights/vicuna-7b-v1.5", projector=projector),
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
        template="vicuna_v1",
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
