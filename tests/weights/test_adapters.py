"""Adapters: of any rank and scale, what does not fit, and their configuration."""

import json
import math
import re

import jax
import layouts
import numpy as np
import pytest
import tiny
from safetensors.numpy import save_file

from mllm_jax.config import LoraConfig
from mllm_jax.weights import mapping, peft
from mllm_jax.weights.io import WeightsError, open_weights

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
  assert "unexpected: base_model.model.model.mm_projector.0.lora_A.weight" in fault(
    query | {"model.mm_projector.0": RANK}
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
  arrays = layouts.arrays(layouts.model(lora=config), "lora")
  plain = peft.config_file(config, "lmsys/vicuna-7b-v1.5")
  assert plain["target_modules"] == ["q_proj", "down_proj"] and (plain["r"], plain["lora_alpha"]) == (2, 4)
  for prefix in ("base_model.model.model.language_model.", "base_model.model.language_model.model."):
    names = mapping.export(arrays, peft.table(config, prefix))
    pattern = peft.config_file(config, "llava-hf/llava-1.5-7b-hf", prefix)["target_modules"]
    modules = {re.sub(r"^base_model\.model\.|\.lora_[AB]\.weight$", "", name) for name in names}
    assert len(modules) == 2 * tiny.DECODER.layers and all(re.fullmatch(pattern, module) for module in modules)
    assert not re.fullmatch(pattern, "model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj")
