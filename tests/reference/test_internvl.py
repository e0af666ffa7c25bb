"""InternVL against transformers' own classes: features, the pixel shuffle, logits, both layouts of a checkpoint; the
grids and pixels of tiles against its image processor."""

import json

import layouts
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import load_file, save_file
from test_saved_models import close, our_tower, shaken

import mllm_jax
from mllm_jax.config import VisionConfig
from mllm_jax.data import dynamic_tiles, images
from mllm_jax.data.patches import patchify, unpatchify
from mllm_jax.models.projectors.pixel_shuffle import shuffle
from mllm_jax.weights import internvit_hf
from mllm_jax.weights.io import open_weights

pytestmark = pytest.mark.torch
IMAGE_TOKEN = 519
VISION = dict(
  hidden_size=16,
  num_hidden_layers=3,
  num_attention_heads=2,
  intermediate_size=24,
  image_size=[56, 56],
  patch_size=[14, 14],
  attention_bias=True,
)
TEXT = {name: value for name, value in layouts.QWEN2_CONFIG.items() if name not in ("rope_theta", "head_dim")}


def whole(folder, layer=-1):
  """A random InternVL that transformers saved, with a tokenizer."""
  import torch
  from transformers import InternVLConfig, InternVLForConditionalGeneration

  torch.manual_seed(0)
  config = InternVLConfig(
    vision_config=VISION, text_config=TEXT, image_token_id=IMAGE_TOKEN, image_seq_length=4, vision_feature_layer=layer
  )
  model = shaken(InternVLForConditionalGeneration(config).float())
  model.save_pretrained(folder)
  layouts.tokenizer(folder)
  return model


def released(folder, hf):
  """The same weights under the names of InternVL's own code, with its config.json."""
  tensors, names = load_file(hf / "model.safetensors"), {}
  fixed = {
    "vision_tower.embeddings.cls_token": "vision_model.embeddings.class_embedding",
    "vision_tower.embeddings.position_embeddings": "vision_model.embeddings.position_embedding",
    "multi_modal_projector.layer_norm": "mlp1.0",
    "multi_modal_projector.linear_1": "mlp1.1",
    "multi_modal_projector.linear_2": "mlp1.3",
    "vision_tower.embeddings.patch_embeddings.projection": "vision_model.embeddings.patch_embedding",
    "vision_tower.encoder.layer.": "vision_model.encoder.layers.",
    ".attention.projection_layer": ".attn.proj",
    ".layernorm_before": ".norm1",
    ".layernorm_after": ".norm2",
    ".lambda_": ".ls",
  }
  for name, tensor in tensors.items():
    if ".attention." in name and "projection_layer" not in name:
      continue
    for old, new in fixed.items():
      name = name.replace(old, new)
    names[name] = tensor
  for layer in range(VISION["num_hidden_layers"]):
    for kind in ("weight", "bias"):
      stem = f"vision_tower.encoder.layer.{layer}.attention."
      together = np.concatenate([tensors[f"{stem}{letter}_proj.{kind}"] for letter in "qkv"])
      names[f"vision_model.encoder.layers.{layer}.attn.qkv.{kind}"] = together
  folder.mkdir()
  save_file(names, folder / "model.safetensors")
  vision = {name: value for name, value in VISION.items() if name != "attention_bias"}
  vision |= {"image_size": 56, "patch_size": 14, "qkv_bias": True, "qk_normalization": False}
  vision |= {"norm_type": "layer_norm", "model_type": "intern_vit_6b", "num_channels": 3, "hidden_act": "gelu"}
  content = {
    "model_type": "internvl_chat",
    "vision_config": vision | {"layer_norm_eps": 1e-6},
    "llm_config": TEXT | {"architectures": ["Qwen2ForCausalLM"]},
    "template": "Hermes-2",
    "downsample_ratio": 0.5,
    "ps_version": "v2",
    "select_layer": -1,
    "force_image_size": 56,
    "dynamic_image_size": True,
    "use_thumbnail": True,
    "pad2square": False,
    "max_dynamic_patch": 12,
  }
  (folder / "config.json").write_text(json.dumps(content))
  layouts.tokenizer(folder)


@pytest.mark.parametrize("layer", [-1, -2])
def test_the_tower_gives_transformers_features(layer, tmp_path):
  import torch
  from transformers import InternVLVisionConfig, InternVLVisionModel

  torch.manual_seed(0)
  model = shaken(InternVLVisionModel(InternVLVisionConfig(**VISION)))
  model.save_pretrained(tmp_path)
  config = internvit_hf.read_config(tmp_path)
  assert config == VisionConfig(
    image_size=56,
    patch_size=14,
    width=16,
    layers=3,
    heads=2,
    mlp_width=24,
    activation="gelu",
    norm_eps=1e-6,
    select_layer=-1,
    patch_bias=True,
    pre_norm=False,
    layer_scale=True,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
  )
  config.select_layer = layer
  tower = our_tower(config, open_weights(tmp_path), internvit_hf.table(config))
  pixels = np.random.default_rng(0).normal(size=(2, 3, 56, 56)).astype(np.float32)
  with torch.no_grad():
    expected = model(torch.from_numpy(pixels), output_hidden_states=True).hidden_states[layer][:, 1:].numpy()
  close(tower(patchify(np.moveaxis(pixels, 1, -1).copy(), 14)), expected)


def test_the_pixel_shuffle_has_transformers_order():
  import torch
  from transformers.models.internvl.modeling_internvl import InternVLModel

  features = np.random.default_rng(0).normal(size=(2, 36, 5)).astype(np.float32)
  square = torch.from_numpy(features.reshape(2, 6, 6, 5))
  expected = InternVLModel.pixel_shuffle(None, square, scale_factor=0.5).reshape(2, 9, 20).numpy()
  np.testing.assert_array_equal(shuffle(features, 6), expected)


@pytest.mark.parametrize("layer", [-1, -2])
def test_logits_of_both_layouts_are_transformers(layer, tmp_path):
  """A wide picture of two tiles and the whole one, and text around it."""
  import torch

  llava = whole(tmp_path / "hf", layer)
  released(tmp_path / "released", tmp_path / "hf")
  picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (50, 110, 3), np.uint8))
  logits = {}
  for name in ("hf", "released") if layer == -1 else ("hf",):
    model, processor = mllm_jax.load(str(tmp_path / name), dtype="float32", template="vicuna_v1")
    batch = processor(["What is it?"], [[picture]])
    assert batch.patches.shape[1] == 13 and (batch.grids[0].any(axis=1)).sum() == 3
    assert (batch.visual_index >= 0).sum() == 12
    logits[name] = np.asarray(model.logits(batch))
  assert model.config.vision.select_layer == layer
  tiles = [unpatchify(patches, grid, 14) for patches, grid in zip(batch.patches[0, :3], batch.grids[0, :3])]
  vision = model.config.vision
  pixels = np.moveaxis(images.normalise(np.stack(tiles), vision.mean, vision.std), -1, 1).copy()
  ids = np.where(batch.visual_index >= 0, IMAGE_TOKEN, batch.tokens).astype(np.int64)
  with torch.no_grad():
    expected = llava(input_ids=torch.from_numpy(ids), pixel_values=torch.from_numpy(pixels)).logits.numpy()
  for found in logits.values():
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_a_tower_alone_in_the_released_layout(tmp_path):
  whole(tmp_path / "hf")
  released(tmp_path / "released", tmp_path / "hf")
  tensors = load_file(tmp_path / "released" / "model.safetensors")
  alone = tmp_path / "internvit"
  alone.mkdir()
  tower = {n.removeprefix("vision_model."): t for n, t in tensors.items() if n.startswith("vision_model.")}
  save_file(tower, alone / "model.safetensors")
  content = json.loads((tmp_path / "released" / "config.json").read_text())
  (alone / "config.json").write_text(json.dumps(content["vision_config"]))
  found = mllm_jax.load(str(tmp_path / "released"), vision=str(alone), dtype="float32", template="vicuna_v1")[0]
  other = mllm_jax.load(str(tmp_path / "hf"), dtype="float32", template="vicuna_v1")[0]
  pixels = np.random.default_rng(0).normal(size=(1, 16, 588)).astype(np.float32)
  np.testing.assert_array_equal(found.vision(pixels), other.vision(pixels))


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 12))
def test_grids_are_those_of_transformers(width, height, most):
  from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

  expected = get_optimal_tiled_canvas((height, width), (448, 448), 1, most)
  assert dynamic_tiles.best_grid(width, height, 448, most) == expected


@pytest.mark.parametrize("size", [(500, 300), (448, 448), (130, 900)])
def test_tiles_are_those_of_transformers(size):
  from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

  picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8))
  processor = GotOcr2ImageProcessorPil(
    size={"height": 112, "width": 112},
    crop_to_patches=True,
    min_patches=1,
    max_patches=12,
    do_normalize=False,
    do_rescale=False,
  )
  expected = processor(picture, return_tensors="np")["pixel_values"]
  found = np.stack(dynamic_tiles.crop(picture, VisionConfig(image_size=112), 12))
  np.testing.assert_array_equal(np.moveaxis(found, -1, 1), expected)
