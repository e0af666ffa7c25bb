"""The pixel shuffle by the loops it stands for, the spatial tokens in front of it, and towers with layer scale."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from flax import nnx

from mllm_jax import parameters
from mllm_jax.config import ConfigError, LoraConfig, ModelConfig, ProjectorConfig, VisionConfig
from mllm_jax.models import mllm
from mllm_jax.models.projectors import make, tokens_per_crop
from mllm_jax.models.projectors.pixel_shuffle import PixelShuffleProjector, shuffle
from mllm_jax.models.projectors.spatial import SpatialProjector
from mllm_jax.models.vision import VisionTower
from mllm_jax.weights.known import PUBLISHED

GRID, WIDTH, OUT = 4, 6, 10


def randomised(module, seed=0):
  """Every parameter drawn anew, so that no bias is zero and no scale one."""
  draw = np.random.default_rng(seed)
  graphdef, flat = parameters.flatten(module)
  return parameters.unflatten(
    graphdef, {path: draw.normal(0, 0.5, x.shape).astype(np.float32) for path, x in flat.items()}
  )


def features(seed=0):
  return np.random.default_rng(seed).normal(size=(2, 3, GRID * GRID, WIDTH)).astype(np.float32)


def test_four_patches_become_one_token_row_by_row():
  x = features()
  square = x.reshape(2, 3, GRID, GRID, WIDTH)
  expected = [
    np.concatenate([square[..., 2 * i + k, 2 * j + l, :] for k in (0, 1) for l in (0, 1)], axis=-1)
    for i in range(GRID // 2)
    for j in range(GRID // 2)
  ]
  np.testing.assert_array_equal(shuffle(x, GRID), np.stack(expected, axis=-2))


def test_the_projector_in_float64():
  module = randomised(PixelShuffleProjector(GRID, WIDTH, OUT, rngs=nnx.Rngs(0)))
  p = {path: np.asarray(x, np.float64) for path, x in parameters.flatten(module)[1].items()}
  x = np.asarray(shuffle(features(), GRID), np.float64)
  x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * p["norm/scale"] + p["norm/bias"]
  x = x @ p["in_proj/kernel"] + p["in_proj/bias"]
  x = x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2
  expected = x @ p["out_proj/kernel"] + p["out_proj/bias"]
  np.testing.assert_allclose(module(features()), expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("maps", ["cropping", "pooling"])
def test_spatial_tokens_are_those_of_the_patches_before_the_shuffle(maps):
  config = ProjectorConfig(kind="spatial_shuffle", maps=maps, stride=1, dfi_kernel=2, conv_width=8)
  vision = VisionConfig(image_size=GRID * 14, width=WIDTH)
  model = ModelConfig(vision=vision, projector=config)
  model.decoder.width = OUT
  module = randomised(make(model, nnx.Rngs(0)))
  tokens = module(features())
  assert tokens.shape == (2, 3, 2 + 4, OUT) == (2, 3, tokens_per_crop(model), OUT)
  plain = SpatialProjector(config, GRID, WIDTH, OUT, rngs=nnx.Rngs(0))
  plain.sfe, plain.dfi, plain.head = module.sfe, module.dfi, module.head
  np.testing.assert_allclose(tokens[..., :2, :], plain(features())[..., :2, :], atol=1e-5)
  np.testing.assert_allclose(tokens[..., 2:, :], module.patch_mlp(features()), atol=1e-5)


def test_layer_scale_is_a_factor_on_the_last_product_of_each_half():
  config = VisionConfig(image_size=28, width=8, layers=2, heads=2, mlp_width=12, select_layer=-1, layer_scale=True)
  fresh = VisionTower(config, dtype="float32", rngs=nnx.Rngs(0))
  assert (fresh.layers.attention_scale[...] == np.float32(0.1)).all()
  scaled = parameters.flatten(randomised(fresh))[1]
  folded = {path: np.asarray(x) for path, x in scaled.items()}
  for scale, product in (("attention_scale", "out_proj"), ("mlp_scale", "fc2")):
    factor = folded.pop(f"layers/{scale}")
    folded[f"layers/{product}/kernel"] = folded[f"layers/{product}/kernel"] * factor[:, None]
    folded[f"layers/{product}/bias"] = folded[f"layers/{product}/bias"] * factor
  without = VisionTower(dataclasses.replace(config, layer_scale=False), dtype="float32", rngs=nnx.Rngs(0))
  patches = np.random.default_rng(0).normal(size=(2, 4, 588)).astype(np.float32)
  run = jax.jit(lambda tower: tower(patches))
  expected = run(parameters.unflatten(parameters.flatten(without)[0], folded))
  found = run(parameters.unflatten(parameters.flatten(fresh)[0], scaled))
  np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("kind", ["pixel_shuffle", "spatial_shuffle"])
def test_an_odd_grid_is_refused(kind):
  projector = ProjectorConfig(kind=kind, sizes=(1, 27))
  with pytest.raises(ConfigError, match="even grid of patches, and the tower's is 27"):
    mllm.abstract(ModelConfig(vision=VisionConfig(image_size=378), projector=projector))


def test_internvl2_1b_has_its_size():
  """304 million parameters of InternViT-300M, 494 of Qwen2-0.5B, 4.5 of the MLP between them."""
  vision, decoder = (PUBLISHED[name].config for name in ("internvit-300m-448px", "qwen2-0.5b-instruct"))
  model = ModelConfig(
    vision=vision, decoder=decoder, projector=ProjectorConfig(kind="pixel_shuffle"), lora=LoraConfig()
  )
  flat = parameters.flatten(mllm.abstract(model))[1]
  size = lambda part: sum(math.prod(x.shape) for path, x in flat.items() if path.startswith(part))
  width, layers, mlp = 1024, 24, 4096
  layer = 4 * width**2 + 4 * width + 2 * width * mlp + width + mlp + 4 * width + 2 * width
  assert size("vision/") == layers * layer + width * 588 + width + width + 1025 * width == 304_012_288
  assert size("decoder/") == 494_032_768
  assert size("projector/") == 2 * 4096 + 4096 * 896 + 896 + 896**2 + 896
  assert tokens_per_crop(model) == 256
