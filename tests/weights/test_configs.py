"""What is read out of config.json and its like, and what is refused."""

import json

import pytest

from mllm_jax.config import CLIP_MEAN, DecoderConfig, LoraConfig, VisionConfig
from mllm_jax.weights import clip, known, llama, peft
from mllm_jax.weights.io import WeightsError

CLIP = {
  "hidden_size": 1024,
  "intermediate_size": 4096,
  "num_hidden_layers": 24,
  "num_attention_heads": 16,
  "image_size": 336,
  "patch_size": 14,
  "layer_norm_eps": 1e-5,
  "hidden_act": "quick_gelu",
}
VICUNA = {
  "model_type": "llama",
  "hidden_size": 4096,
  "intermediate_size": 11008,
  "num_hidden_layers": 32,
  "num_attention_heads": 32,
  "rms_norm_eps": 1e-5,
  "vocab_size": 32000,
  "rope_scaling": None,
}
ADAPTER = {
  "peft_type": "LORA",
  "r": 128,
  "lora_alpha": 256,
  "lora_dropout": 0.05,
  "bias": "none",
  "use_rslora": False,
  "target_modules": ["v_proj", "q_proj"],
  "rank_pattern": {},
  "modules_to_save": None,
}


def write(folder, content, name="config.json"):
  (folder / name).write_text(json.dumps(content))
  return folder


def test_clip(tmp_path):
  whole = {"model_type": "clip", "vision_config": CLIP, "text_config": {"hidden_size": 768}}
  assert clip.read_config(write(tmp_path, whole)) == VisionConfig()
  tower = clip.read_config(write(tmp_path, {"model_type": "clip_vision_model"}))  # all as transformers' defaults
  assert (tower.width, tower.layers, tower.image_size, tower.patch_size) == (768, 12, 224, 32)
  write(tmp_path, {"image_processor": {"image_mean": [0.1] * 3, "image_std": [0.2] * 3}}, "processor_config.json")
  assert clip.read_config(tmp_path).mean == (0.1, 0.1, 0.1)
  write(tmp_path, {"image_mean": [0.5] * 3, "image_std": [0.4] * 3}, "preprocessor_config.json")
  assert (clip.read_config(tmp_path).mean, clip.read_config(tmp_path).std) == ((0.5,) * 3, (0.4,) * 3)
  assert tower.mean == CLIP_MEAN


@pytest.mark.parametrize(
  "content, named",
  [
    ({"model_type": "siglip_vision_model"}, "'siglip_vision_model'"),
    ({}, "model_type is None"),
    ({"model_type": "clip"}, "no vision_config"),
    ({"model_type": "clip_vision_model", "hidden_act": "relu"}, "hidden_act is 'relu'"),
  ],
)
def test_clip_refuses(tmp_path, content, named):
  with pytest.raises(WeightsError, match=f"config.json.*{named}"):
    clip.read_config(write(tmp_path, content))


def test_llama(tmp_path):
  assert llama.read_config(write(tmp_path, VICUNA)) == DecoderConfig()
  five = VICUNA | {
    "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"},
    "num_key_value_heads": 8,
    "head_dim": 64,
  }
  config = llama.read_config(write(tmp_path, five | {"tie_word_embeddings": True}))
  assert (config.rope_theta, config.kv_heads, config.head_width, config.tied_embeddings) == (5e5, 8, 64, True)
  assert llama.read_config(write(tmp_path, VICUNA | {"rope_theta": 1e6})).rope_theta == 1e6
  assert llama.read_config(write(tmp_path, {"model_type": "llama"})).norm_eps == 1e-6  # transformers' default


@pytest.mark.parametrize(
  "change, named",
  [
    ({"model_type": "qwen2"}, "'qwen2'"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
    ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "llama3"),
    ({"attention_bias": True}, "attention_bias=True"),
    ({"hidden_act": "gelu", "mlp_bias": True}, "mlp_bias=True, hidden_act='gelu'"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
  ],
)
def test_llama_refuses(tmp_path, change, named):
  with pytest.raises(WeightsError, match=f"config.json.*{named}"):
    llama.read_config(write(tmp_path, VICUNA | change))


def test_peft(tmp_path):
  config = peft.read_config(write(tmp_path, ADAPTER, "adapter_config.json"))
  assert config == LoraConfig(rank=128, alpha=256.0, dropout=0.05, targets=("q_proj", "v_proj"))


@pytest.mark.parametrize(
  "change, named",
  [
    ({"peft_type": "IA3"}, "'IA3'"),
    ({"use_rslora": True}, "use_rslora=True"),
    ({"use_dora": True, "bias": "all"}, "use_dora=True, bias='all'"),
    ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
    ({"target_modules": "all-linear"}, "target_modules is 'all-linear'"),
    ({"target_modules": ["lm_head"]}, "lm_head"),
    ({"r": None}, "lacks r or lora_alpha"),
  ],
)
def test_peft_refuses(tmp_path, change, named):
  with pytest.raises(WeightsError, match=f"adapter_config.json.*{named}"):
    peft.read_config(write(tmp_path, ADAPTER | change, "adapter_config.json"))


@pytest.mark.parametrize(
  "read, name", [(clip.read_config, "clip-vit-large-patch14-336"), (llama.read_config, "vicuna-7b-v1.5")]
)
def test_missing_folders_and_files(tmp_path, read, name):
  repo = known.lookup(name).repo
  with pytest.raises(
    WeightsError, match=f"{name} does not exist: looked for a folder.*hf download {repo} --local-dir .*{name}"
  ):
    read(tmp_path / name)
  (tmp_path / name).mkdir()
  with pytest.raises(WeightsError, match=f"config.json does not exist.*hf download {repo}"):
    read(tmp_path / name)
  (tmp_path / name / "config.json").write_text("[]")
  with pytest.raises(WeightsError, match="holds a list"):
    read(tmp_path / name)


def test_published_checkpoints():
  assert known.lookup("weights/clip-vit-large-patch14-336/").config == VisionConfig()
  assert known.lookup("weights/vicuna-7b-v1.5").config == DecoderConfig()
  thirteen = known.lookup("vicuna-13b-v1.5")
  assert (thirteen.config.width, thirteen.config.layers, thirteen.config.head_width) == (5120, 40, 128)
  assert thirteen.command("a/b") == "hf download lmsys/vicuna-13b-v1.5 --local-dir a/b"
  assert known.lookup("somewhere/else") is None
