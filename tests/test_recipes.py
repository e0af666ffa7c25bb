"""Every recipe at its real size, with shapes instead of arrays: its step traces, and its parameters are those of the
paper."""

import dataclasses
import importlib.util
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from mllm_jax import build, preflight, processors, recipes, sharding
from mllm_jax.compilation import abstract_step
from mllm_jax.config import (
  Config,
  ConfigError,
  DataConfig,
  ModelConfig,
  ProjectorConfig,
  StageConfig,
  VisionConfig,
  from_dict,
  to_dict,
)
from mllm_jax.data.processor import empty_patches
from mllm_jax.models import projectors

ALL_RECIPES = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))
RECIPES = [path for path in ALL_RECIPES if path.stem != "vdim"]  # it has no language model


def uhd_projector(width: int, vision: int = 1024) -> int:
  """Parameters of LLaVA-UHD v2's projector that are used with levels 0 and 2 (reference: its published shapes)."""
  return 2 * 6233 + vision**2 + vision + hiwin(width, vision)


def hiwin(width: int, vision: int = 1024) -> int:
  levels = 2 * (vision * width + 2 * width)
  return levels + 5 * 144 * width + 4 * 2 * width + 9 * width**2 + 5 * width


def uhd_v1_projector(width: int, vision: int = 1024) -> int:
  return 2 * 144 * width + vision * width + 3 * 2 * width + 5 * width**2 + 4 * width


def sp_projector(width: int, vision: int = 1024, conv: int = 512) -> int:
  """Parameters of LLaVA-SP's cropping with DFI."""
  kernels = sum(size**2 for size in range(4, 25, 4)) + 16**2
  dfi = 3 * (2 * conv + conv**2 + conv)
  return kernels * vision * conv + dfi + 2 * conv * width + width + vision * width + width + width**2 + width


def internvl_projector(
  spatial: bool, biased: bool = False, width: int = 896, vision: int = 1024, conv: int = 512
) -> int:
  """Parameters of InternVL's MLP, with LLaVA-SP's tokens of maps of 4 x 4, 8 x 8, ..., 32 x 32 patches in front."""
  mlp = 2 * 4 * vision + 4 * vision * width + width + width**2 + width
  kernels = sum(size**2 for size in range(4, 33, 4)) + 16**2
  head = 2 * conv * width + biased * width
  return mlp + spatial * (kernels * vision * conv + 3 * (2 * conv + conv**2 + conv) + head)


def convnext(widths: tuple[int, ...], depths: tuple[int, ...]) -> int:
  """Of ConvNeXt (Liu et al. 2022, figure 4) without what is behind its last stage."""
  blocks = sum(depth * (49 * c + c + 2 * c + 8 * c * c + 5 * c + c) for c, depth in zip(widths, depths))
  halved = sum(2 * a + 4 * a * b + b for a, b in zip(widths, widths[1:]))
  return 49 * widths[0] + 2 * widths[0] + blocks + halved


def lateral(width: int, vision: int = 1024) -> int:
  return 2 * width + (width + 1) * vision


PROJECTOR = {
  "llava15": 20_979_712,
  "sp_cropping": 923_550_208,
  "sp_qwen2_5": sp_projector(3584),
  "sp_mistral": 923_550_208,
  "sp_llama3": 923_550_208,
  "sp_pooling": 923_546_112,
  "internvl2": internvl_projector(spatial=False),
  "internvl2_sp_cropping": internvl_projector(spatial=True, biased=True),
  "internvl2_sp_pooling": internvl_projector(spatial=True),
  "sp_cropping_transformer": 427_968_512,
  "sp_pooling_transformer": 427_968_512,
  "sp_light": 4 * (1456 * 2**10 + 6 * 2**19) + 2**21 + 20_979_712,
  "sp_windows": 144 * 2**19 + 2**21 + 20_979_712,
  "sp_conv49": 144 * 2**19 + 2**21 + 20_979_712,
  "sp_siglip_cropping": 923_550_208,
  "sp_siglip_pooling": 923_546_112,
  "sp_siglip_baseline": 20_979_712,
  "uhd_v1": uhd_v1_projector(4096),
  "uhd_v2": uhd_projector(4096),
  "uhd_v2_qwen2": uhd_projector(3584),
  "uhd_v2_13b": uhd_projector(5120),
  "uhd_bilinear": hiwin(4096),
  "uhd_deconv": hiwin(4096) + 2 * (1024 + 1) * 4 * 1024,
  "uhd_convnext": hiwin(4096) + convnext((192, 384, 768, 1536), (3, 3, 27, 3)) + lateral(1536) + lateral(384),
}
QWEN2_7B = 7_615_616_512
DECODERS = {  # parameters, those of the paper's adapters, template, repository
  "vicuna": (6_738_415_616, 319_815_680, "vicuna_v1", "lmsys/vicuna-7b-v1.5"),
  "sp_qwen2_5": (QWEN2_7B, 322_961_408, "qwen2_5", "Qwen/Qwen2.5-7B-Instruct"),
  "sp_mistral": (7_241_732_096, 335_544_320, "mistral_instruct", "mistralai/Mistral-7B-Instruct-v0.1"),
  "sp_llama3": (8_030_261_248, 335_544_320, "llava_llama_3", "meta-llama/Llama-3.1-8B-Instruct"),
  **dict.fromkeys(
    ("internvl2", "internvl2_sp_cropping", "internvl2_sp_pooling"),
    (494_032_768, 70_385_664, "internvl2", "Qwen/Qwen2-0.5B-Instruct"),
  ),
  "uhd_v2_qwen2": (QWEN2_7B, 0, "chatml", "Qwen/Qwen2-7B-Instruct"),
  "uhd_v2_13b": (13_015_864_320, 0, "vicuna_v1", "lmsys/vicuna-13b-v1.5"),
}
INTERNVL = [path for path in RECIPES if path.stem.startswith("internvl")]
LLAVA = [path for path in RECIPES if not path.stem.startswith("uhd") and path not in INTERNVL]
UHD = [path for path in RECIPES if path.stem.startswith("uhd")]
CLIP_L = 290_909_184  # CLIP-L/14-336 without its last layer and post-norm: 23 layers
# SigLIP-L/16-384's patches are larger and have a bias, its table is one place shorter, and there is no first norm.
SIGLIP_L = CLIP_L + 1024 * (3 * (16**2 - 14**2) + 1 - 1 - 1 - 2)
INTERNVIT_300M = 304_012_288


def load(path: Path, variant: str = "") -> Config:
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  assert f"--config=configs/{path.name}" in module.__doc__
  return module.get_config(variant)


def count(flat, *starts: str, without: str = "nothing") -> int:
  return sum(math.prod(x.shape) for path, x in flat.items() if path.startswith(starts) and without not in path)


# The stages of ablations and of other towers or decoders are those of sp_cropping or uhd_v2, so that the last, which
# trains more, stands for both.
ONE_STAGE = ("transformer", "light", "windows", "conv49", "siglip", "bilinear", "deconv", "convnext", "uhd_v2_")


def twin(path: Path) -> Path:
  """The first recipe with the same demo but for its name: demos have towers and a decoder of their own, so that those
  of other towers or decoders at full size are the same run."""
  unnamed = lambda path: dataclasses.replace(load(path, "demo"), name="")
  return next(other for other in RECIPES if unnamed(other) == unnamed(path))


TRACED = [(path, variant) for path in RECIPES for variant in ("", "demo") if not variant or twin(path) == path]


@pytest.mark.parametrize("path, variant", TRACED, ids=lambda part: getattr(part, "stem", part))
def test_both_stages_trace_at_full_size(path, variant):
  config = load(path, variant)
  mesh = sharding.make_mesh(config.mesh, jax.devices()[: config.mesh.cpu_devices or None])
  names = preflight.stage_names(config)
  for name in names[-1:] if any(word in path.stem for word in ONE_STAGE) else names:
    if name == "vdim":
      trace_vdim(config, jax.devices()[: 1 if variant else 8])
      continue
    stage = getattr(config, name)
    step = abstract_step.make(config, name, mesh)
    model, flat = build.architecture(config.model, stage.lora), step.flat
    if not variant:
      assert count(flat, "projector/") == PROJECTOR[path.stem]
      tower = INTERNVIT_300M if path in INTERNVL else SIGLIP_L if "siglip" in path.stem else CLIP_L
      assert count(flat, "vision/") == tower
      decoder, adapters, *_ = DECODERS.get(path.stem, DECODERS["vicuna"])
      assert count(flat, "decoder/", without="/lora/") == decoder
      assert count(flat, "decoder/layers") - count(flat, "decoder/layers", without="/lora/") == (
        adapters if name == "finetune" and path in LLAVA + INTERNVL else 0
      )
    assert_traces(step)
    assert stage.data.max_length > projectors.tokens_per_crop(model)


@pytest.mark.parametrize("row_length, places", [(0, 256), (384, 384)])
def test_packed_rows_are_compiled_as_long_as_they_are_trained(row_length, places):
  stage = StageConfig(data=DataConfig(batching="pack", max_length=128, row_length=row_length), batch_size=6)
  assert abstract_step.batch(ModelConfig(), stage).tokens.shape == (1, 6, places)


@pytest.mark.parametrize("side, aspect, patches", [(336, "slices", 576), (384, "slices", 752), (384, "pad", 27 * 27)])
def test_crops_are_compiled_as_large_as_they_are_made(side, aspect, patches):
  """SigLIP-so400m's 384 pixels are 27 patches of 14 and 6 pixels, which slices may use."""
  model = ModelConfig(vision=VisionConfig(image_size=side), projector=ProjectorConfig(kind="hiwin"))
  stage = StageConfig(data=DataConfig(image_aspect=aspect, max_images=7), batch_size=6)
  assert abstract_step.batch(model, stage).patches.shape == (1, 6, 7, patches, 588)
  made, _ = empty_patches(7, processors.shapes_aspect(model, stage.data))
  assert made.shape == (7, patches, 588)


def assert_traces(step: abstract_step.AbstractStep) -> None:
  with jax.set_mesh(step.mesh):
    after, metrics = jax.eval_shape(step.step, *step.arguments)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), step.state)
  assert metrics["loss"].shape == () and metrics["loss"].dtype == jnp.float32


def trace_vdim(config: Config, devices: list) -> dict:
  """Traces the step of the stage vdim and returns its parameters by path, as shapes."""
  step = abstract_step.make(config, "vdim", sharding.make_mesh(config.mesh, devices))
  assert_traces(step)
  return step.flat


def test_vdim_alone_traces_at_full_size():
  path = next(path for path in ALL_RECIPES if path.stem == "vdim")
  config = load(path)
  flat = trace_vdim(config, jax.devices())
  # The paper's: two stages and the last correction; beside them the heads, which are left behind.
  assert count(flat, "projector/pyramid/") == 2 * 6233 + 1024 * 1024 + 1024
  assert count(flat, "heads/") == 2 * (1025 + 2 * 196 + 1025)
  assert count(flat, "vision/") == CLIP_L
  stage = config.vdim
  assert (stage.batch_size, stage.steps, stage.jitters, stage.optimizer, stage.learning_rate) == (
    16,
    2000,
    2,
    "nadam",
    1e-3,
  )
  assert (config.checkpoint_every, stage.clip_norm, stage.clip_steps, stage.normalisation) == (
    500,
    1e-4,
    10,
    "imagenet",
  )
  demo = load(path, "demo")
  assert count(trace_vdim(demo, jax.devices()[:1]), "projector/pyramid/") == 2 * 6233 + 128 * 128 + 128


def test_vdim_without_files_says_how_to_get_them(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  path = next(path for path in ALL_RECIPES if path.stem == "vdim")
  missing = preflight.missing_files(preflight.in_workdir(load(path), "runs/x"))
  assert [item.field for item in missing] == ["model.vision", "vdim.data.path"]
  text = preflight.explain_missing(missing, "configs/vdim.py")
  for words in (
    f"looked in  {tmp_path}/playground/data/coco/train2017",
    "curl -LO http://images.cocodataset.org/zips/train2017.zip && unzip -q train2017.zip -d playground/data/coco",
    "--config=configs/vdim.py:demo",
  ):
    assert words in text
  assert preflight.missing_files(preflight.in_workdir(load(path, "demo"), "runs/x")) == []
  with pytest.raises(ConfigError, match="no variant 'demos'; there is :demo"):
    load(path, "demos")


@pytest.mark.parametrize("path", UHD, ids=lambda path: path.stem)
def test_the_hyper_parameters_of_llava_uhd(path):
  config = load(path)
  rates = [dict(stage.parameters) for stage in (config.pretrain, config.finetune)]
  assert [rate[recipes.RESAMPLER] for rate in rates] == [2e-4 if "_v2_" in path.stem else 1e-3, 2e-5]
  encoder = recipes.CONVNEXT if path.stem == "uhd_convnext" else recipes.VISION
  assert [rate[encoder] for rate in rates] == [rate[recipes.DECODER] for rate in rates] == [0.0, 2e-5]
  if "v2" in path.stem:  # VDIM is trained by itself alone
    assert config.stages == "vdim,pretrain,finetune"
    assert all(rate[recipes.PYRAMID] == rate[recipes.PYRAMID_FIXUP] == 0 for rate in rates)
  assert (config.pretrain.batch_size, config.finetune.batch_size) == (256, 128)
  assert (config.pretrain.data.max_slices, config.finetune.data.max_slices) == (1, 6)
  assert config.finetune.lora.rank == 0 and config.finetune.data.image_aspect == "slices"
  enlarged = lambda config: (config.pretrain.data.enlarge, config.finetune.data.enlarge)
  assert enlarged(config) == (0.1, 0.1) and enlarged(load(path, "demo")) == enlarged(load(LLAVA[0])) == (0.0, 0.0)
  with pytest.raises(ConfigError, match="no variant 'demos'; there is :demo"):
    load(path, "demos")


@pytest.mark.parametrize("path", INTERNVL, ids=lambda path: path.stem)
def test_internvl_has_the_papers_rates_and_its_own_tiles(path):
  config = load(path)
  assert dict(config.pretrain.parameters)["projector/.*"] == 1e-3
  assert sorted(rate for _, rate in config.finetune.parameters if rate) == [2e-5, 2e-4]
  data = config.finetune.data
  assert (data.image_aspect, data.max_slices, data.max_images, data.template) == ("tiles", 12, 13, "internvl2")
  tokens = projectors.tokens_per_crop(build.architecture(config.model, config.finetune.lora))
  assert tokens == 256 + (8 if "sp" in path.stem else 0) and 13 * tokens < data.max_length
  with pytest.raises(ConfigError, match="no variant 'demos'; there is :demo"):
    load(path, "demos")


@pytest.mark.parametrize("path", LLAVA, ids=lambda path: path.stem)
def test_the_papers_hyper_parameters(path):
  config = load(path)
  pretrain, finetune = config.pretrain, config.finetune
  assert (pretrain.batch_size, finetune.batch_size) == (256, 128)
  assert dict(pretrain.parameters)["projector/.*"] == 1e-3
  assert sorted(rate for _, rate in finetune.parameters if rate) == [2e-5, 2e-4]
  assert (finetune.lora.rank, finetune.lora.alpha, finetune.lora.dropout) == (128, 256.0, 0.05)
  for stage in (pretrain, finetune):
    assert (stage.warmup_ratio, stage.weight_decay, stage.epochs, stage.clip_norm) == (0.03, 0.0, 1.0, 0.0)
  template = DECODERS.get(path.stem, DECODERS["vicuna"])[2]
  assert (pretrain.data.template, finetune.data.template, finetune.data.max_length) == ("plain", template, 2048)


def test_an_unknown_variant_is_an_error():
  with pytest.raises(ConfigError, match="no variant 'demos'; there are :demo and :demo_shapes"):
    load(LLAVA[0], "demos")
  assert load(LLAVA[0], "demo_shapes").demo_shapes and not load(LLAVA[0], "demo").demo_shapes


def test_a_configuration_survives_json_and_an_unknown_field_does_not():
  config = load(LLAVA[0])
  import json

  content = json.loads(json.dumps(to_dict(config)))
  assert from_dict(Config, content) == config
  content["pretrain"]["batchsize"] = 3
  with pytest.raises(ConfigError, match="config.pretrain has no field batchsize"):
    from_dict(Config, content)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_without_files_a_run_says_how_to_get_them(path, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  config = preflight.in_workdir(load(path), "runs/x")
  text = preflight.explain_missing(preflight.missing_files(config), f"configs/{path.name}")
  for words in (
    "hf download OpenGVLab/InternViT-300M-448px --local-dir weights/internvit-300m-448px"
    if path in INTERNVL
    else "hf download google/siglip-large-patch16-384 --local-dir weights/siglip-large-patch16-384"
    if "siglip" in path.stem
    else "hf download openai/clip-vit-large-patch14-336 --local-dir weights/clip-vit-large-patch14-336",
    f"hf download {DECODERS.get(path.stem, DECODERS['vicuna'])[3]} --local-dir {load(path).model.llm}",
    "convnext_large_mlp.clip_laion2b_ft_soup_320 --local-dir weights/clip-convnext-large"
    if path.stem == "uhd_convnext"
    else "",
    f"looked in  {tmp_path}/playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json",
    "hf download liuhaotian/LLaVA-Instruct-150K llava_v1_5_mix665k.json",
    f"--config=configs/{path.name}:demo",
  ):
    assert words in text
  assert preflight.missing_files(preflight.in_workdir(load(path, "demo"), "runs/x")) == []
