"""Families of towers: the layouts their tensors come in, released projectors recognised, adapters of any rank."""

import dataclasses
import json
import math
import re

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from mllm_jax import parameters
from mllm_jax.config import DecoderConfig, LoraConfig, ModelConfig, ProjectorConfig, VisionConfig
from mllm_jax.models import mllm, projectors
from mllm_jax.models.projectors.maps import map_sizes
from mllm_jax.weights import clip, llama, mapping, mlp, peft, qwen2, siglip, spatial
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


def variants():
  """Projectors that `spatial.table` has names for, and the grids they are for."""
  for maps in ("cropping", "pooling"):
    for bias in ("released", "always", "never"):
      for dfi in (0, 4, 16):
        fields = dict(maps=maps, head_bias=bias, dfi_kernel=dfi, conv_width=8)
        for stride in (1, 2, 3, 4, 6, 12):
          yield ProjectorConfig(stride=stride, **fields), 24
        for sizes in ((24,), (8, 24), (4, 10), (2, 4, 6)):
          yield ProjectorConfig(sizes=sizes, **fields), 24
        for stride in (1, 2, 4):
          yield ProjectorConfig(stride=stride, **fields), 16
        yield ProjectorConfig(sizes=(9, 27), **fields), 27
  yield ProjectorConfig(maps="pooling", sizes=(1, 5, 24), dfi_kernel=0, conv_width=8), 24
  yield ProjectorConfig(sfe="windows", window=9, window_strides=(2, 2), dfi_kernel=0, conv_width=8), 24
  for maps in ("cropping", "pooling"):
    for fields in (dict(stride=2), dict(sizes=(4, 10))):
      yield ProjectorConfig(sfe="transformer", maps=maps, token_order="released", dfi_kernel=0, **fields), 24
  yield MLP, 24
  yield dataclasses.replace(MLP, image_newline=True), 24
  yield ProjectorConfig(conv_width=8, image_newline=True), 24


def shapes_by_name(config, grid):
  """What `spatial.recognise` is told of a file with the projector `config`: kernels have their real sizes."""
  if config.kind == "mlp2x_gelu":
    return {row.foreign: (4,) for row in projector_table(config, grid).rows}
  sides = {f"projector/sfe/kernels/{place}": side for place, side in enumerate(map_sizes(config, grid))}
  sides |= {"projector/dfi/kernel": config.dfi_kernel, "projector/sfe/kernel": config.window}
  side_of = lambda row: (8, 3, sides[row.ours], sides[row.ours]) if row.ours in sides else (4, 8)
  rows = spatial.table(config, grid).rows
  return {row.name(layer): side_of(row) for row in rows for layer in range(len(row.places) or 1)}


@pytest.mark.parametrize("prefix", ["", "model.", "base_model.model.model."])
def test_released_projectors_are_recognised(prefix):
  """From names and shapes alone: the configuration found has the table of the one the file was made with."""
  for config, grid in variants():
    shapes = {prefix + name: shape for name, shape in shapes_by_name(config, grid).items()}
    others = {"model.layers.0.mlp.up_proj.weight": (2, 2), "lm_head.weight": (4, 2)}
    told = config.maps if config.sfe == "transformer" else ""
    found = spatial.recognise(shapes | others, grid, maps=told)
    assert (found.kind, found.image_newline) == (config.kind, config.image_newline)
    if config.kind == "spatial":
      assert spatial.table(found, grid) == spatial.table(config, grid), (config, found)
      assert (found.sfe, found.dfi_kernel) == (config.sfe, config.dfi_kernel)
      assert found.conv_width == 8 or config.sfe == "transformer"
      assert map_sizes(found, grid) == map_sizes(config, grid)


def test_recognised_in_the_words_of_the_recipes():
  shapes = lambda names: {f"conv_{name}.weight": (512, 1024, size, size) for name, size in names}
  of_sizes = lambda *sizes: shapes((str(size), size) for size in sizes) | {"mm_projector.0.bias": (4096,)}
  assert spatial.recognise(of_sizes(4, 8, 12, 16, 20, 24), 24) == ProjectorConfig(dfi_kernel=0)
  assert spatial.recognise(of_sizes(8, 16, 24), 24) == ProjectorConfig(stride=4, dfi_kernel=0)
  assert spatial.recognise(of_sizes(24), 24) == ProjectorConfig(stride=12, dfi_kernel=0)
  assert spatial.recognise(of_sizes(8, 24), 24) == ProjectorConfig(sizes=(8, 24), dfi_kernel=0)
  counted = shapes((str(number), 2 * number) for number in range(1, 9))
  assert spatial.recognise(counted, 16) == ProjectorConfig(stride=1, dfi_kernel=0)
  pooled = shapes([("4.1", 4), ("8.1", 8), ("12.1", 12), ("16.1", 16), ("20.1", 20), ("24", 24), ("CM", 16)])
  assert spatial.recognise(pooled, 24) == ProjectorConfig(maps="pooling")
  with_bias = pooled | {"conv_linear.1.bias": (4096,)}
  assert spatial.recognise(with_bias, 24) == ProjectorConfig(maps="pooling", head_bias="always")
  windows = {"conv_CM.weight": (512, 1024, 12, 12), "conv_linear.1.weight": (4096, 512)}
  assert spatial.recognise(windows, 24) == ProjectorConfig(sfe="windows", window_strides=(2, 2), dfi_kernel=0)
  assert projectors.tokens_per_crop(ModelConfig(projector=spatial.recognise(windows, 24))) == 49 + 576


def test_the_maps_of_transformer_blocks_must_be_named():
  config = ProjectorConfig(sfe="transformer", token_order="released", dfi_kernel=0)
  shapes = shapes_by_name(config, 24)
  with pytest.raises(WeightsError, match="run/model.bin has transformer blocks.*--maps=cropping or --maps=pooling"):
    spatial.recognise(shapes, 24, "run/model.bin")
  assert spatial.recognise(shapes, 24, maps="cropping") == config
  assert spatial.recognise(shapes, 24, maps="pooling") == dataclasses.replace(config, maps="pooling")
  with pytest.raises(WeightsError, match="no variant with transformer blocks.*leave out 'pooling'"):
    spatial.recognise(shapes_by_name(ProjectorConfig(), 24), 24, maps="pooling")


@pytest.mark.parametrize(
  "fields, told",
  [
    (dict(sfe="factorised"), "projector.sfe=factorised is none of the released code's"),
    (dict(sfe="windows"), r"projector.window_strides=\(6, 12\).*2 patches apart both ways"),
    (dict(sfe="windows", window_strides=(2, 2), dfi_kernel=4), "projector.dfi_kernel=4.*without DFI"),
    (dict(sfe="transformer", maps="pooling"), "projector.token_order=map.*token_order=released is read and written"),
  ],
)
def test_what_has_no_released_names_is_refused(fields, told):
  with pytest.raises(WeightsError, match=told):
    spatial.table(ProjectorConfig(**dict(dfi_kernel=0) | fields), 24)


@pytest.mark.parametrize(
  "extra, told",
  [
    ({"tfm_4.encoder.norm.weight": (1024,), "query_4": (1, 1, 1024)}, "tfm_4.encoder.*query_4"),
    ({"conv_small.weight": (512, 1024, 12, 12)}, "conv_small.weight.*several detail maps"),
    ({"conv_4.3.weight": (512, 1024, 2, 2)}, r"conv_4.3.weight \(512, 1024, 2, 2\).*stacked small"),
    ({"conv_6.weight": (512, 1024, 5, 5)}, r"conv_6.weight \(512, 1024, 5, 5\)"),
    ({"conv_26.weight": (512, 1024, 26, 26)}, "conv_26.weight.*"),
    ({"conv_7.weight": (512, 1024, 7, 7)}, "conv_7.weight.*"),
    ({"query_projector.0.weight": (512,)}, "query_projector.0.weight"),
    ({"conv_12.1.weight": (512, 1024, 12, 12)}, "conv_4.weight.*conv_8.weight"),
    ({"vision_resampler.0.weight": (3,)}, "vision_resampler"),
  ],
)
def test_what_fits_no_variant_is_named(extra, told):
  shapes = {f"conv_{size}.weight": (512, 1024, size, size) for size in (4, 8, 24)}
  with pytest.raises(WeightsError, match=f"run/model.bin holds the projector of no variant.*{told}"):
    spatial.recognise(shapes | extra, 24, "run/model.bin")


def test_files_without_a_projector_or_without_its_maps():
  with pytest.raises(WeightsError, match="no tensor of a projector"):
    spatial.recognise({"model.layers.0.mlp.up_proj.weight": (2, 2)}, 24)
  with pytest.raises(WeightsError, match="conv_CM.weight.*conv_linear.1.weight"):
    spatial.recognise({"conv_CM.weight": (512, 1024, 12, 12), "conv_linear.1.weight": (4096, 1024)}, 24)
  with pytest.raises(WeightsError, match="tfm_5.norm.*; and 14 more$"):
    spatial.recognise({f"tfm_{number}.norm.weight": (4,) for number in range(20)}, 24)


LAYERS, RANK, ALPHA = 4, 4, 8.0


def write_adapter(folder, modules, **settings):
  """An adapter with A and B of 6 columns and 5 rows: {module name: rank}. Returns {module: A B's product}."""
  generator, products = np.random.default_rng(1), {}
  tensors = {}
  for module, rank in modules.items():
    a, b = generator.normal(size=(rank, 6)).astype(np.float32), generator.normal(size=(5, rank)).astype(np.float32)
    tensors[f"base_model.model.{module}.lora_A.weight"], tensors[f"base_model.model.{module}.lora_B.weight"] = a, b
    products[module] = b @ a
  save_file(tensors, folder / "adapter_model.safetensors")
  content = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": "all-linear"} | settings
  (folder / "adapter_config.json").write_text(json.dumps(content))
  return products


def loaded_updates(folder, layers=LAYERS):
  """(configuration, {target: [L, in, out] of A B alpha / rank}) as an adapter is loaded."""
  config, adapter = peft.open_adapter(folder, layers)
  targets = {}
  for target in config.targets:
    targets[f"decoder/layers/{target}/lora/a"] = jax.ShapeDtypeStruct((layers, 6, config.rank), np.float32)
    targets[f"decoder/layers/{target}/lora/b"] = jax.ShapeDtypeStruct((layers, config.rank, 5), np.float32)
  loaded = mapping.load(adapter, peft.table(config), targets)
  stem = "decoder/layers/{}/lora/"
  return config, {
    target: np.asarray(loaded[stem.format(target) + "a"] @ loaded[stem.format(target) + "b"])
    * (config.alpha / config.rank)
    for target in config.targets
  }


@pytest.mark.parametrize("inside", ["model.", "model.language_model.", "language_model.model."])
@pytest.mark.parametrize("stabilised", [False, True])
def test_ranks_and_scales_that_differ_by_module(tmp_path, inside, stabilised):
  modules = {f"{inside}layers.{layer}.self_attn.q_proj": RANK for layer in (0, 2)}
  modules |= {f"{inside}layers.{layer}.mlp.down_proj": 7 if layer == 1 else 2 for layer in range(3)}
  ranks, alphas = {r"layers\.1\.mlp\.down_proj": 7, "down_proj": 2}, {"layers.2.self_attn.q_proj": 3}
  products = write_adapter(
    tmp_path, modules, use_rslora=stabilised, rank_pattern=ranks, alpha_pattern=alphas, lora_dropout=0.1
  )
  config, updates = loaded_updates(tmp_path)
  assert (config.rank, config.targets, config.dropout) == (7, ("q_proj", "down_proj"), 0.1)
  assert peft.read_config(tmp_path) == config
  for target, block in (("q_proj", "self_attn"), ("down_proj", "mlp")):
    for layer in range(LAYERS):
      module = f"{inside}layers.{layer}.{block}.{target}"
      expected = np.zeros((6, 5))
      if module in products:
        alpha = 3 if module.endswith("2.self_attn.q_proj") else ALPHA
        rank = modules[module]
        expected = products[module].T * alpha / (math.sqrt(rank) if stabilised else rank)
      np.testing.assert_allclose(updates[target][layer], expected, atol=1e-5)


def test_an_even_adapter_is_taken_as_it_stands(tmp_path):
  write_adapter(tmp_path, {f"model.layers.{layer}.self_attn.v_proj": RANK for layer in range(2)})
  config, adapter = peft.open_adapter(tmp_path)
  assert config == LoraConfig(rank=RANK, alpha=ALPHA, dropout=0.0, targets=("v_proj",))
  file = open_weights(tmp_path)
  assert sorted(adapter.names()) == file.names() and adapter.path == file.path
  for name in file.names():
    assert (adapter.shape(name), adapter.dtype(name)) == (file.shape(name), file.dtype(name))
    np.testing.assert_array_equal(adapter.read(name), file.read(name))


def test_any_part_of_a_padded_tensor_can_be_read(tmp_path):
  modules = {"model.layers.0.self_attn.q_proj": 2, "model.layers.1.self_attn.q_proj": 7}
  write_adapter(tmp_path, modules, rank_pattern={"layers.0.self_attn.q_proj": 2, "q_proj": 7})
  adapter = peft.open_adapter(tmp_path, 3)[1]
  assert len(adapter.names()) == 6  # the third layer's are zeros
  for name in adapter.names():
    whole = adapter.read(name)
    assert whole.shape == adapter.shape(name) and adapter.file(name) == tmp_path / "adapter_model.safetensors"
    for rows in (slice(0, 1), slice(1, 4), slice(3, 5), slice(2, 2)):
      for columns in (slice(0, 6), slice(1, 3), slice(4, 5)):
        np.testing.assert_array_equal(adapter.read(name, (rows, columns)), whole[rows, columns])
  assert np.count_nonzero(adapter.read("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight")) == 2 * 6
  assert np.count_nonzero(adapter.read("base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight")) == 0


def test_adapters_that_do_not_fit(tmp_path):
  def fault(modules, **settings):
    write_adapter(tmp_path, modules, **settings)
    with pytest.raises(WeightsError) as raised:
      loaded_updates(tmp_path)
    return str(raised.value)

  query = {f"model.layers.{layer}.self_attn.q_proj": RANK for layer in range(LAYERS)}
  tower = "model.vision_tower.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj"
  assert f"2 problems\n  unexpected: base_model.model.{tower}.lora_A" in fault(query | {tower: RANK})
  assert "unexpected: base_model.model.model.tfm_4.decoder.layers.0.linear2.lora_A.weight" in fault(
    query | {"model.tfm_4.decoder.layers.0.linear2": RANK}
  )
  assert "unexpected: base_model.model.lm_head.lora_A.weight" in fault(query | {"lm_head": RANK})
  assert "q_proj.lora_A.weight has rank 4, and adapter_config.json gives it 8" in fault(query, r=8)
  assert "no adapter of a decoder's q_proj" in fault({"lm_head": RANK})
  assert "rank_pattern has the key '*q'" in fault(query, rank_pattern={"*q": 2})
  save_file(
    {"base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector": np.zeros(5, np.float32)},
    tmp_path / "adapter_model.safetensors",
  )
  with pytest.raises(WeightsError, match="adapter_model.safetensors holds DoRA.*merge_and_unload"):
    peft.open_adapter(tmp_path)


def test_adapters_are_exported_with_their_configuration():
  config = LoraConfig(rank=2, alpha=4.0, targets=("q_proj", "down_proj"))
  arrays = arrays_of(ModelConfig(vision=CLIP, decoder=LLAMA, projector=MLP, lora=config), ".*/lora/.*")
  plain = peft.config_file(config, "lmsys/vicuna-7b-v1.5")
  assert plain["target_modules"] == ["q_proj", "down_proj"] and (plain["r"], plain["lora_alpha"]) == (2, 4)
  for prefix in ("base_model.model.model.language_model.", "base_model.model.language_model.model."):
    names = mapping.export(arrays, peft.table(config, prefix))
    pattern = peft.config_file(config, "llava-hf/llava-1.5-7b-hf", prefix)["target_modules"]
    modules = {re.sub(r"^base_model\.model\.|\.lora_[AB]\.weight$", "", name) for name in names}
    assert len(modules) == 2 * LLAMA.layers and all(re.fullmatch(pattern, module) for module in modules)
    assert not re.fullmatch(pattern, "model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj")
