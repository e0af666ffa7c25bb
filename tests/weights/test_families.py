"""Families of towers: the layouts their tensors come in."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from mllm_jax import parameters
from mllm_jax.config import DecoderConfig, ModelConfig, ProjectorConfig, VisionConfig
from mllm_jax.models import mllm
from mllm_jax.weights import clip, llama, mapping, mlp, qwen2, siglip, spatial
from mllm_jax.weights.io import WeightsError, open_weights
from mllm_jax.weights.recognise import projector_table

CLIP = VisionConfig(image_size=56, patch_size=14, width=16, layers=3, heads=2, mlp_width=24)
SIGLIP = dataclasses.replace(CLIP, class_token=False, patch_bias=True, pre_norm=False)
LLAMA = DecoderConfig(vocab_size=40, width=16, layers=3, heads=4, kv_heads=2, head_width=4, mlp_width=24)
QWEN2 = dataclasses.replace(LLAMA, attention_bias=True, tied_embeddings=True)
MLP, SPATIAL = ProjectorConfig(kind="mlp2x_gelu"), ProjectorConfig(stride=1, dfi_kernel=3, conv_width=8)
MODELS = {
  "clip-llama-mlp": (clip, CLIP, llama, LLAMA, MLP),
  "siglip-qwen2-mlp": (siglip, SIGLIP, qwen2, QWEN2, MLP),
  "clip-qwen2-spatial": (clip, CLIP, qwen2, dataclasses.replace(QWEN2, tied_embeddings=False), SPATIAL),
}
# By layout: how a vision tower's, a language model's and a projector's own names are written.
OFFICIAL = (r"model.vision_tower.vision_tower.vision_model.\1", [], ("mm_projector.0", "mm_projector.2"), "model.")
HF_MLP = ("multi_modal_projector.linear_1", "multi_modal_projector.linear_2")
NEWER = [(r"^model\.", "model.language_model.")]
LAYOUTS = {
  "official": OFFICIAL,
  "official, tower not wrapped": (r"model.vision_tower.vision_model.\1", *OFFICIAL[1:]),
  "official, behind PEFT": (
    r"base_model.model.model.vision_tower.vision_tower.\1",
    [],
    OFFICIAL[2],
    "base_model.model.model.",
  ),
  "llava-hf": (r"vision_tower.vision_model.\1", [(r"^", "language_model.")], HF_MLP, ""),
  "llava-hf, saved by transformers 5": (r"vision_tower.\1", [(r"^", "language_model.")], HF_MLP, ""),
  "transformers 4.52": (r"model.vision_tower.vision_model.\1", NEWER, HF_MLP, "model."),
  "transformers 5": (r"model.vision_tower.\1", NEWER, HF_MLP, "model."),
}


def arrays_of(config, pattern=".*"):
  """Distinct numbers for every parameter of a model whose path matches."""
  flat = parameters.flatten(mllm.abstract(config))[1]
  generator = np.random.default_rng(0)
  return {
    path: generator.normal(size=shape.shape).astype(np.float32)
    for path, shape in flat.items()
    if re.fullmatch(pattern, path)
  }


def targets_of(arrays):
  return {path: jax.ShapeDtypeStruct(array.shape, np.float32) for path, array in arrays.items()}


def part(arrays, prefix):
  return {path: array for path, array in arrays.items() if path.startswith(prefix)}


def whole_checkpoint(name, layout):
  """(arrays by our paths, tensors as a whole LLaVA checkpoint of that layout names them, table of each part)."""
  tower, vision, language, decoder, projector = MODELS[name]
  arrays = arrays_of(ModelConfig(vision=vision, decoder=decoder, projector=projector))
  tables = {
    "vision/": tower.table(vision),
    "decoder/": language.table(decoder),
    "projector/": mlp.table() if projector is MLP else spatial.table(projector, vision.grid),
  }
  own = {prefix: mapping.export(part(arrays, prefix), table) for prefix, table in tables.items()}
  vision_to, language_renames, mlp_names, projector_prefix = LAYOUTS[layout]
  tensors = {re.sub(r"^vision_model\.(.*)", vision_to, key): value for key, value in own["vision/"].items()}
  for key, value in own["decoder/"].items():
    for pattern, replacement in language_renames:
      key = re.sub(pattern, replacement, key)
    tensors[key] = value
  for key, value in own["projector/"].items():
    key = key.removeprefix("model.").replace("mm_projector.0", mlp_names[0]).replace("mm_projector.2", mlp_names[1])
    tensors[projector_prefix + key] = value
  return arrays, tensors, tables


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_each_part_finds_its_own_in_every_layout_of_a_whole_checkpoint(tmp_path, name, layout):
  arrays, tensors, tables = whole_checkpoint(name, layout)
  save_file(tensors, tmp_path / "model.safetensors")
  weights, claims = open_weights(tmp_path), {key: [] for key in tensors}
  for prefix, table in tables.items():
    wanted = part(arrays, prefix)
    loaded = mapping.load(weights, table, targets_of(wanted))  # raises for what is unexpected, missing or there twice
    for path, array in wanted.items():
      np.testing.assert_array_equal(loaded[path], array)
    for key in tensors:
      if any(row.match(table.rename(key)) is not None for row in table.rows):
        claims[key].append(prefix)
  assert all(len(prefixes) == 1 for prefixes in claims.values()), claims

  newline = {"model.image_newline": np.arange(16, dtype=np.float32)}
  save_file(tensors | newline, tmp_path / "model.safetensors")
  for prefix in ("vision/", "decoder/"):
    assert mapping.load(open_weights(tmp_path), tables[prefix], targets_of(part(arrays, prefix)))
  wanted = part(arrays, "projector/")
  with pytest.raises(WeightsError, match=r"1 problems\n.*unexpected: model.image_newline.*tiled images"):
    mapping.load(open_weights(tmp_path), tables["projector/"], targets_of(wanted))
  _, vision, _, _, projector = MODELS[name]
  table = projector_table(dataclasses.replace(projector, image_newline=True), vision.grid)
  wanted |= {"projector/image_newline": newline["model.image_newline"]}
  loaded = mapping.load(open_weights(tmp_path), table, targets_of(wanted))
  np.testing.assert_array_equal(loaded["projector/image_newline"], newline["model.image_newline"])
  assert "model.image_newline" in mapping.export(wanted, table)


def test_names_as_the_layouts_have_them():
  """Spelt out, so that the test above does not rest on the tables alone."""
  vision = clip.table(CLIP)
  bare = "encoder.layers.1.self_attn.q_proj.weight"
  for prefix in (
    *("", "vision_model.", "vision_tower.vision_model.", "vision_tower.", "model.vision_tower."),
    *("model.vision_tower.vision_model.", "model.vision_tower.vision_tower.vision_model."),
  ):
    assert vision.rename(prefix + bare) == bare
    assert vision.rename(prefix + "embeddings.class_embedding") == "embeddings.class_embedding"
  for name in ("text_model." + bare, "model." + bare, "language_model." + bare, "model.layers.1.mlp.up_proj.weight"):
    assert vision.rename(name) == name
  language = llama.table(LLAMA)
  for prefix in ("model.", "language_model.model.", "model.language_model."):
    assert language.rename(prefix + "layers.1.mlp.up_proj.weight") == "model.layers.1.mlp.up_proj.weight"
    assert language.rename(prefix + "embed_tokens.weight") == "model.embed_tokens.weight"
  assert language.rename("language_model.lm_head.weight") == "lm_head.weight"
  official, hf = mlp.table(), mlp.table("llava-hf")
  for name in ("model.mm_projector.2.bias", "mm_projector.2.bias", "multi_modal_projector.linear_2.bias"):
    assert official.rename(name) == "mm_projector.2.bias"
    assert hf.rename("model." + name) == "multi_modal_projector.linear_2.bias"


def test_exports_under_other_prefixes():
  arrays = arrays_of(ModelConfig(vision=SIGLIP, decoder=LLAMA, projector=MLP))
  names = lambda prefix, table: list(mapping.export(part(arrays, prefix), table))
  vision = names("vision/", siglip.table(SIGLIP, "vision_tower.vision_model."))
  assert "vision_tower.vision_model.embeddings.patch_embedding.bias" in vision
  assert all(name.startswith("vision_tower.vision_model.e") for name in vision)
  language = names("decoder/", llama.table(LLAMA, "language_model."))
  assert {"language_model.lm_head.weight", "language_model.model.layers.2.mlp.up_proj.weight"} < set(language)
  assert names("projector/", mlp.table("llava-hf")) == [
    f"multi_modal_projector.linear_{layer}.{kind}" for layer in (1, 2) for kind in ("weight", "bias")
  ]
  assert names("projector/", mlp.table())[0] == "model.mm_projector.0.weight"


@pytest.mark.parametrize("prefix", ["vision_model.", ""])
def test_the_rest_of_a_siglip_model_is_ignored(tmp_path, prefix):
  arrays = arrays_of(ModelConfig(vision=SIGLIP, decoder=LLAMA, projector=MLP), "vision/.*")
  assert "vision/patch_embedding/bias" in arrays and arrays["vision/position_embedding"].shape == (16, 16)
  assert not any("class" in path or "pre_norm" in path for path in arrays)
  tensors = mapping.export(arrays, siglip.table(SIGLIP, prefix))
  rest = ["head.probe", "head.attention.in_proj_weight", "head.mlp.fc1.bias", "post_layernorm.weight"]
  rest = [prefix + name for name in rest + ["encoder.layers.2.mlp.fc1.weight"]]
  rest += ["text_model.embeddings.token_embedding.weight", "text_model.head.weight", "logit_scale", "logit_bias"]
  save_file(tensors | {name: np.zeros(3, np.float32) for name in rest}, tmp_path / "model.safetensors")
  loaded = mapping.load(open_weights(tmp_path), siglip.table(SIGLIP), targets_of(arrays))
  np.testing.assert_array_equal(loaded["vision/layers/fc1/kernel"], arrays["vision/layers/fc1/kernel"])
  with pytest.raises(WeightsError, match=r"missing: .*class_embedding(.|\n)*unexpected: .*patch_embedding.bias"):
    clip_arrays = arrays_of(ModelConfig(vision=CLIP, decoder=LLAMA, projector=MLP), "vision/.*")
    mapping.load(open_weights(tmp_path), clip.table(CLIP), targets_of(clip_arrays))
