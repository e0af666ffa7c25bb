"""Sizes at full scale, with nothing allocated, and configurations that cannot work."""

import dataclasses
import math

import pytest

from mllm_jax import parameters, sharding
from mllm_jax.config import (
  ConfigError,
  DecoderConfig,
  LoraConfig,
  MeshConfig,
  ModelConfig,
  ProjectorConfig,
  VisionConfig,
)
from mllm_jax.models import mllm, projectors
from mllm_jax.models.projectors.maps import map_sizes
from mllm_jax.weights.known import lookup

SFE = ProjectorConfig(dfi_kernel=0)
TRANSFORMER = dataclasses.replace(SFE, sfe="transformer")
LIGHT = dataclasses.replace(SFE, sfe="factorised")
WINDOWS = dataclasses.replace(SFE, sfe="windows")


def count(config, part):
  _, flat = parameters.flatten(mllm.abstract(config))
  return sum(math.prod(array.shape) for path, array in flat.items() if part in path)


@pytest.mark.parametrize(
  "projector, expected",
  [
    (ProjectorConfig(), 923_550_208),
    (SFE, 786_440_192),
    (ProjectorConfig(maps="pooling"), 923_546_112),
    (ProjectorConfig(dfi_kernel=4), 797_721_088),
    (dataclasses.replace(SFE, sizes=(24,)), 325_066_752),
    (dataclasses.replace(SFE, stride=4), 492_838_912),
    (dataclasses.replace(SFE, stride=1), 1_386_225_664),
    (ProjectorConfig(kind="mlp2x_gelu"), 20_979_712),
    (TRANSFORMER, 427_968_512),
    (LIGHT, 4 * (1456 * 2**10 + 6 * 2**19) + 2**21 + 20_979_712),
    (WINDOWS, 144 * 2**19 + 2**21 + 20_979_712),
  ],
)
def test_parameters_of_the_released_projectors(projector, expected):
  """The counts that the released checkpoints' shapes add up to."""
  assert count(ModelConfig(projector=projector), "projector/") == expected


@pytest.mark.parametrize("projector, size", [(SFE, 1500.0), (ProjectorConfig(), 1761.5), (TRANSFORMER, 816.3)])
def test_mebibytes_of_the_papers_projectors_in_16_bits(projector, size):
  assert round(2 * count(ModelConfig(projector=projector), "projector/") / 2**20, 1) == size


def test_parameters_of_vicuna_and_its_adapters():
  config = ModelConfig(lora=LoraConfig(rank=128))
  assert count(config, "/lora/") == 319_815_680
  assert count(ModelConfig(), "decoder/") == 6_738_415_616


def test_parameters_of_qwen2_and_siglip():
  """Qwen2-0.5B is published as 0.49 billion parameters of which 0.36 are not embeddings; the layers of SigLIP-L/16-384
  that are used are CLIP-L's."""
  qwen2 = DecoderConfig(
    vocab_size=151936,
    width=896,
    layers=24,
    heads=14,
    kv_heads=2,
    head_width=64,
    mlp_width=4864,
    tied_embeddings=True,
    attention_bias=True,
  )
  assert count(ModelConfig(decoder=qwen2), "decoder/") == 494_032_768
  assert count(ModelConfig(decoder=qwen2), "decoder/embedding") == 151_936 * 896
  siglip = VisionConfig(image_size=384, patch_size=16, class_token=False, patch_bias=True, pre_norm=False)
  layers = 23 * (4 * (1024 * 1024 + 1024) + 2 * 1024 * 4096 + 4096 + 1024 + 4 * 1024)
  assert count(ModelConfig(vision=siglip), "vision/") == layers + 16 * 16 * 3 * 1024 + 1024 + 576 * 1024


def test_every_parameter_of_every_family_has_a_place():
  """Also the biases of Qwen2's projections, which are whole on every device."""
  mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
  vision = VisionConfig(class_token=False, patch_bias=True, pre_norm=False)
  config = ModelConfig(vision=vision, decoder=DecoderConfig(attention_bias=True), lora=LoraConfig(rank=8))
  places = sharding.parameter_shardings(parameters.flatten(mllm.abstract(config))[1], mesh)
  for path in ("decoder/layers/q_proj/bias", "decoder/layers/v_proj/bias", "vision/patch_embedding/bias"):
    assert not any(places[path].spec)
  assert "decoder/layers/o_proj/bias" not in places and "vision/class_embedding" not in places


@pytest.mark.parametrize(
  "projector, sizes",
  [
    (SFE, (4, 8, 12, 16, 20, 24)),
    (dataclasses.replace(SFE, stride=1), tuple(range(2, 25, 2))),
    (dataclasses.replace(SFE, stride=4), (8, 16, 24)),
    (dataclasses.replace(SFE, sizes=(24,)), (24,)),
  ],
)
def test_map_sizes(projector, sizes):
  assert map_sizes(projector, 24) == sizes
  assert projectors.tokens_per_crop(ModelConfig(projector=projector)) == len(sizes) + 576


def test_factorised_kernels_are_a_tenth_of_the_paper_s_or_less():
  whole, light = (count(ModelConfig(projector=projector), "projector/sfe/") for projector in (SFE, LIGHT))
  assert whole == 763_363_328 and light == 18_546_688


@pytest.mark.parametrize(
  "name, fields, sizes",
  [
    ("siglip-large-patch16-384", {}, (4, 8, 12, 16, 20, 24)),
    ("siglip-large-patch16-256", {}, (4, 8, 12, 16)),
    ("siglip-base-patch16-512", {}, tuple(range(4, 33, 4))),
    ("siglip-so400m-patch14-384", dict(sizes=(9, 15, 21, 27)), (9, 15, 21, 27)),  # an odd grid, so odd sizes
  ],
)
def test_maps_follow_from_siglips_grid(name, fields, sizes):
  vision = lookup(name).config
  for kind in ("cropping", "pooling"):
    projector = ProjectorConfig(maps=kind, **fields)
    config = ModelConfig(vision=vision, projector=projector)
    assert map_sizes(projector, vision.grid) == sizes
    assert projectors.tokens_per_crop(config) == len(sizes) + vision.grid**2
    kernels = (sum(size**2 for size in sizes) + 16**2) * vision.width * 512
    assert count(config, "kernels/") + count(config, "dfi/kernel") == kernels


def test_a_spatial_projector_in_words():
  words = [
    dataclasses.replace(SFE, sfe=sfe, maps="pooling").variant for sfe in ("convolution", "windows", "factorised")
  ]
  assert words == ["pooling", "windows", "pooling, factorised"]


@pytest.mark.parametrize("strides, tokens", [((6, 12), 6), ((2, 2), 49), ((12, 12), 4), ((24, 1), 13)])
def test_windows(strides, tokens):
  config = ModelConfig(projector=dataclasses.replace(WINDOWS, window_strides=strides))
  assert projectors.tokens_per_crop(config) == tokens + 576


@pytest.mark.parametrize(
  "change, field",
  [
    (dict(kind="qformer"), "projector.kind"),
    (dict(maps="sliding"), "projector.maps"),
    (dict(stride=5), "projector.stride"),
    (dict(stride=0), "projector.stride"),
    (dict(sizes=(8, 4)), "projector.sizes"),
    (dict(sizes=(4, 25)), "projector.sizes"),
    (dict(sizes=(3, 24)), "projector.sizes"),
    (dict(sfe="attention"), "projector.sfe"),
    (dict(sfe="windows", window=25), "projector.window=25"),
    (dict(sfe="windows", window=0), "projector.window=0"),
    (dict(sfe="windows", window_strides=(2,)), "projector.window_strides"),
    (dict(sfe="windows", window_strides=(0, 2)), "projector.window_strides"),
    (dict(sfe="factorised", depth_multiplier=0), "projector.depth_multiplier"),
    (dict(sfe="transformer"), "projector.dfi_kernel=16"),
    (dict(sfe="transformer", dfi_kernel=0, token_order="columns"), "projector.token_order"),
    (dict(dfi_kernel=25), "projector.dfi_kernel"),
    (dict(dfi_kernel=-1), "projector.dfi_kernel"),
    (dict(head_bias="sometimes"), "projector.head_bias"),
    (dict(conv_init="ones"), "projector.conv_init"),
  ],
)
def test_impossible_projectors_are_refused(change, field):
  with pytest.raises(ConfigError, match=field):
    mllm.abstract(ModelConfig(projector=ProjectorConfig(**change)))


@pytest.mark.parametrize(
  "change, field",
  [
    (dict(vision=VisionConfig(image_size=12)), "vision.image_size"),
    (dict(vision=VisionConfig(activation="relu")), "vision.activation"),
    (dict(vision=VisionConfig(select_layer=-26)), "vision.select_layer"),
    (dict(decoder=DecoderConfig(kv_heads=5)), "decoder.kv_heads"),
    (dict(vision=VisionConfig(width=1020, heads=17), projector=TRANSFORMER), "8 heads.*1020"),
    (dict(remat="some"), "model.remat"),
    (dict(vision=VisionConfig(image_size=378)), "projector.stride"),  # an odd grid, 27 x 27
  ],
)
def test_impossible_models_are_refused(change, field):
  with pytest.raises(ConfigError, match=field):
    mllm.abstract(ModelConfig(**change))
