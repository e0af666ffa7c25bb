"""InternVL's checkpoints: names, the joined matrix of queries, keys and values, what is read and what is refused."""

import dataclasses
import json

import layouts
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mllm_jax import convert
from mllm_jax.config import ConfigError, ModelConfig, ProjectorConfig, VisionConfig
from mllm_jax.data import chat
from mllm_jax.data.records import DataError
from mllm_jax.weights import assemble, export, internvit, internvit_hf, internvl, known, mapping, qwen2, side_files
from mllm_jax.weights.known import WeightsError
from mllm_jax.weights.recognise import recognise

VISION = VisionConfig(
  **vars(known.INTERNVIT) | dict(image_size=56, width=16, layers=3, heads=2, mlp_width=24, select_layer=-2)
)
MODEL = ModelConfig(vision=VISION, decoder=layouts.QWEN2, projector=ProjectorConfig(kind="pixel_shuffle"))
TEXT = layouts.QWEN2_CONFIG | {"architectures": ["Qwen2ForCausalLM"]}
TOWER = {
  "model_type": "intern_vit_6b",
  "hidden_size": 16,
  "num_hidden_layers": 3,
  "num_attention_heads": 2,
  "intermediate_size": 24,
  "image_size": 56,
  "patch_size": 14,
  "qkv_bias": True,
  "qk_normalization": False,
  "norm_type": "layer_norm",
}
RELEASED = {
  "model_type": "internvl_chat",
  "vision_config": TOWER,
  "llm_config": TEXT,
  "template": "Hermes-2",
  "downsample_ratio": 0.5,
  "ps_version": "v2",
  "select_layer": -2,
  "force_image_size": 56,
}
HF_TOWER = {name: value for name, value in TOWER.items() if not name.startswith("qk")} | {
  "model_type": "internvl_vision",
  "image_size": [56, 56],
  "patch_size": [14, 14],
  "attention_bias": True,
}
HF = {
  "model_type": "internvl",
  "vision_config": HF_TOWER,
  "text_config": TEXT,
  "vision_feature_layer": -2,
  "vision_feature_select_strategy": "default",
  "downsample_ratio": 0.5,
  "projector_hidden_act": "gelu",
}


def written(folder, released: bool, change=None):
  """A random model in one of the layouts: (folder, its arrays by our paths)."""
  tower, naming = (internvit, "official") if released else (internvit_hf, "hf")
  parts = {name: layouts.arrays(MODEL, name, layers=3) for name in ("vision", "decoder", "projector")}
  whole = VisionConfig(**vars(VISION) | {"select_layer": -1})
  prefix = "vision_model." if released else "vision_tower."
  tensors = mapping.export(parts["vision"], tower.table(whole, prefix))
  tensors |= mapping.export(parts["decoder"], qwen2.table(MODEL.decoder, "language_model."))
  tensors |= mapping.export(parts["projector"], internvl.table(naming))
  content = (RELEASED if released else HF) | (change or {})
  content = {name: value for name, value in content.items() if value is not None}
  arrays = parts["decoder"] | parts["projector"] | parts["vision"]
  return layouts.tokenizer(layouts.save(folder, tensors, content)), arrays, tensors


@pytest.mark.parametrize("released", [True, False])
def test_a_whole_model(tmp_path, released):
  folder, arrays, tensors = written(tmp_path / "model", released)
  if released:
    joined = tensors["vision_model.encoder.layers.1.attn.qkv.weight"]
    each = [arrays[f"vision/layers/{name}_proj/kernel"][1].T for name in "qkv"]
    np.testing.assert_array_equal(joined, np.concatenate(each))
    assert tensors["vision_model.encoder.layers.2.attn.qkv.bias"].shape == (48,)
    assert tensors["vision_model.embeddings.class_embedding"].shape == (1, 1, 16)
    assert tensors["vision_model.embeddings.position_embedding"].shape == (1, 17, 16)
    np.testing.assert_array_equal(tensors["vision_model.encoder.layers.0.ls2"], arrays["vision/layers/mlp_scale"][0])
    assert {name for name in tensors if name.startswith("mlp1")} == {
      f"mlp1.{layer}.{kind}" for layer in (0, 1, 3) for kind in ("weight", "bias")
    }
  found = recognise(folder)
  assert (found.family, found.template) == ("InternVL 2", "internvl2") and found.notes == ()
  stored = assemble.open_model(str(folder))
  config = stored.config("float32")
  assert (config.vision, config.decoder, config.projector) == (VISION, MODEL.decoder, MODEL.projector)
  for name in stored.tensors.names():
    expected = arrays[name][:2] if name.startswith("vision/layers/") else arrays[name]
    np.testing.assert_array_equal(stored.tensors.read(name), expected)
  with pytest.raises(WeightsError, match="written as official only"):
    export.export(stored, "hf", tmp_path / "out", merge=True)
  with pytest.raises(DataError, match="no special token '<.im_start.>'"):
    export.export(stored, "official", tmp_path / "out", merge=True)
  assert not (tmp_path / "out").exists()


MARKS = ["<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>"]


def with_marks(folder, marks):
  """Adds special tokens to a folder's tokenizer."""
  tokenizer = chat.hf_tokenizer(folder)
  tokenizer.add_special_tokens({"additional_special_tokens": marks})
  tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("layer", [-1, -2])
def test_the_released_layout_comes_back_as_it_was(tmp_path, layer):
  changes = {"select_layer": layer, "max_dynamic_patch": 6}
  folder, _, tensors = written(tmp_path / "released", True, changes)
  with_marks(folder, MARKS)
  assert convert.main(["import", f"--model={folder}", f"--out={tmp_path / 'ours'}"]) == 0
  command = ["export", f"--checkpoint={tmp_path / 'ours'}", "--format=official", f"--out={tmp_path / 'back'}"]
  assert convert.main(command) == 0
  back = load_file(tmp_path / "back" / "model.safetensors")
  used = {name: x for name, x in tensors.items() if layer == -1 or "encoder.layers.2." not in name}
  assert back.keys() == used.keys()
  for name, x in used.items():
    np.testing.assert_array_equal(back[name], x, strict=True)
  content = json.loads((tmp_path / "back" / "config.json").read_text())
  expected = RELEASED | {"select_layer": -1, "max_dynamic_patch": 6, "architectures": ["InternVLChatModel"]}
  expected["vision_config"] = TOWER | {"num_hidden_layers": 3 if layer == -1 else 2}
  for part in ("vision_config", "llm_config"):
    assert content[part].items() >= expected.pop(part).items()
  assert content.items() >= expected.items()
  ours, again = (assemble.open_model(str(tmp_path / name)) for name in ("ours", "back"))
  vision = dataclasses.replace(ours.config().vision, layers=content["vision_config"]["num_hidden_layers"])
  assert again.config() == dataclasses.replace(ours.config(), vision=dataclasses.replace(vision, select_layer=-1))
  assert ours.manifest.images == again.manifest.images == {"image_aspect": "tiles", "max_slices": 6}
  assert again.manifest.template == "internvl2"
  ids = [chat.load_tokenizer(model.tokenizer).specials for model in (ours, again)]
  assert ids[0] == ids[1] and set(MARKS) <= set(ids[0])


def test_what_the_released_code_would_not_ask_alike_is_refused(tmp_path):
  tokenizer = layouts.tokenizer(tmp_path / "tokenizer")
  with_marks(tokenizer, MARKS[:2])
  write = lambda model=MODEL, template="internvl2", images={}: side_files.write_internvl(
    tmp_path / "out", model, tokenizer, template, images, "float32"
  )
  with pytest.raises(ConfigError, match="no <img>, </img>, <IMG_CONTEXT>"):
    write()
  with_marks(tokenizer, MARKS)
  for kind in ("spatial_shuffle", "mlp2x_gelu"):
    with pytest.raises(ConfigError, match=f"projector.kind='{kind}'"):
      write(dataclasses.replace(MODEL, projector=ProjectorConfig(kind=kind)))
  with pytest.raises(ConfigError, match="mistral language model"):
    decoder = dataclasses.replace(MODEL.decoder, attention_bias=False, sliding_window=8)
    write(dataclasses.replace(MODEL, decoder=decoder))
  with pytest.raises(ConfigError, match="template 'vicuna_v1'"):
    write(template="vicuna_v1")
  with pytest.raises(ConfigError, match="image_aspect='pad'"):
    write(images={"image_aspect": "pad"})
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("released", [True, False])
def test_a_tower_alone(tmp_path, released):
  _, arrays, tensors = written(tmp_path / "model", released)
  prefix = "vision_model." if released else "vision_tower."
  alone = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
  if not released:
    alone["embeddings.mask_token"] = np.zeros((1, 1, 16), np.float32)
  folder = layouts.save(tmp_path / "tower", alone, TOWER if released else HF_TOWER)
  (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.4] * 3}))
  found = recognise(folder)
  part = found.parts["vision"]
  assert (found.family, part.config.select_layer, part.config.mean) == ("InternViT vision tower", -1, (0.4,) * 3)
  tensors = assemble.part_tensors("vision", part, {"vision": part.config})
  np.testing.assert_array_equal(tensors.read("vision/layers/v_proj/bias"), arrays["vision/layers/v_proj/bias"])


def test_a_tied_decoder_and_another_conversation(tmp_path):
  folder, _, tensors = written(tmp_path / "model", True, {"template": "internvl2_5"})
  del tensors["language_model.lm_head.weight"]
  save_file(tensors, folder / "model.safetensors")
  found = recognise(folder)
  assert found.parts["decoder"].config.tied_embeddings and found.template == "chatml"
  assert "internvl2_5, which is not built in" in found.notes[0]


@pytest.mark.parametrize(
  "released, change, named",
  [
    (True, {"ps_version": None}, "ps_version='v1'"),
    (True, {"downsample_ratio": 0.25}, "downsample_ratio=0.25"),
    (True, {"llm_config": {"model_type": "internlm2"}}, "type intern_vit_6b with .* type internlm2 is not"),
    (True, {"force_image_size": 448}, "crops of 448 pixels for a tower of 56"),
    (True, {"vision_config": TOWER | {"qk_normalization": True}}, "vision_config sets qk_normalization=True"),
    (True, {"vision_config": TOWER | {"norm_type": "rms_norm"}}, "norm_type='rms_norm'"),
    (True, {"vision_config": TOWER | {"hidden_act": "relu"}}, "hidden_act is 'relu'"),
    (True, {"vision_config": None}, "a whole InternVL has a vision_config"),
    (False, {"vision_feature_layer": [-1, -2]}, r"one selected layer \(here \[-1, -2\]\)"),
    (False, {"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy='full'"),
    (False, {"vision_config": HF_TOWER | {"attention_bias": False}}, "attention_bias=False"),
    (False, {"vision_config": HF_TOWER | {"use_mean_pooling": False}}, "use_mean_pooling=False"),
    (False, {"vision_config": HF_TOWER | {"image_size": [56, 28]}}, r"image_size.*\[56, 28\]"),
  ],
)
def test_what_is_refused(tmp_path, released, change, named):
  folder, *_ = written(tmp_path / "model", released, change)
  with pytest.raises(WeightsError, match=f"config.json.*{named}"):
    recognise(folder)


def test_what_is_published():
  sizes = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
  assert internvit.parse(TOWER | sizes | {"image_size": 448}, "config.json") == known.INTERNVIT
  default = {"model_type": "internvl_vision", "attention_bias": True}  # all else as transformers' defaults
  assert internvit_hf.parse(default, "config.json") == known.INTERNVIT
  with pytest.raises(WeightsError, match="qkv_bias=False, qk_normalization=True, norm_type='rms_norm'"):
    internvit.parse({}, "config.json")  # the tower of 6 billion parameters
