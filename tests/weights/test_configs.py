"""What is read out of config.json and its like, and what is refused."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from mllm_jax.config import CLIP_MEAN, ConfigError, DecoderConfig, LoraConfig, VisionConfig
from mllm_jax.weights import assemble, clip, known, llama, mistral, peft, qwen2, siglip
from mllm_jax.weights.io import WeightsError
from mllm_jax.weights.side_files.files import text_config

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
  "max_position_embeddings": 4096,
  "model_type": "llama",
  "hidden_size": 4096,
  "intermediate_size": 11008,
  "num_hidden_layers": 32,
  "num_attention_heads": 32,
  "rms_norm_eps": 1e-5,
  "vocab_size": 32000,
  "rope_scaling": None,
}
SIGLIP = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
SIGLIP |= {"image_size": 384, "patch_size": 16}  # the rest of SigLIP-L/16-384's is transformers' defaults
QWEN2 = {
  "model_type": "qwen2",
  "hidden_size": 896,
  "intermediate_size": 4864,
  "num_hidden_layers": 24,
  "num_attention_heads": 14,
  "num_key_value_heads": 2,
  "rope_theta": 1000000.0,
  "rms_norm_eps": 1e-6,
  "sliding_window": 32768,
  "max_window_layers": 24,
  "use_sliding_window": False,
  "tie_word_embeddings": True,
  "vocab_size": 151936,
}
LLAMA3 = {
  "rope_type": "llama3",
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 8192,
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
    ({"model_type": "clip_vision_model", "hidden_act": ["gelu"]}, r"hidden_act is \['gelu'\]"),
    ({"model_type": "clip_vision_model", "hidden_size": 1e3}, "width must be of type int, and is 1000.0"),
    ({"model_type": "clip_vision_model", "patch_size": 0}, "{'patch_size': 0} must be positive"),
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
    ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "llama3 has .*'factor': None"),
    ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "low_freq_factor lie below"),
    ({"rope_scaling": LLAMA3 | {"factor": 0.5}}, "the factor must be 1 or more"),
    ({"rope_scaling": LLAMA3 | {"factor": "8"}}, "'factor': '8'"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'.*or with llama3's"),
    ({"attention_bias": True}, "attention_bias=True"),
    ({"hidden_act": "gelu", "mlp_bias": True}, "mlp_bias=True, hidden_act='gelu'"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor.: 0.5"),
    ({"rope_theta": "10000"}, "rope_theta is '10000'"),
    ({"rope_parameters": [1e4]}, r"rotary positions by \[10000.0\]"),
    ({"num_attention_heads": 0}, "num_attention_heads is 0"),
    ({"num_hidden_layers": 0}, "{'layers': 0} must be positive"),
    ({"vocab_size": "many"}, "vocab_size must be of type int, and is 'many'"),
    ({"tie_word_embeddings": 1}, "tied_embeddings must be of type bool"),
  ],
)
def test_llama_refuses(tmp_path, change, named):
  with pytest.raises(WeightsError, match=f"config.json.*{named}"):
    llama.read_config(write(tmp_path, VICUNA | change))


def test_llama_3(tmp_path):
  """The published configurations of 3, 3.1 and 3.2, and the second as transformers 5 writes it."""
  three = VICUNA | {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 5e5}
  three |= {"max_position_embeddings": 8192}
  assert llama.read_config(write(tmp_path, three)) == known.PUBLISHED["llama-3-8b-instruct"].config
  later = three | {"max_position_embeddings": 131072}
  old = later | {"rope_scaling": LLAMA3}
  new = {key: value for key, value in later.items() if key != "rope_theta"}
  new["rope_parameters"] = LLAMA3 | {"rope_theta": 5e5}
  for content in (old, new):
    assert llama.read_config(write(tmp_path, content)) == known.PUBLISHED["llama-3.1-8b-instruct"].config
  small = later | {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24}
  small |= {"rope_scaling": LLAMA3 | {"factor": 32.0}, "tie_word_embeddings": True}
  assert llama.read_config(write(tmp_path, small)) == known.PUBLISHED["llama-3.2-3b-instruct"].config


def test_mistral(tmp_path):
  first = {"model_type": "mistral", "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "sliding_window": 4096}
  first |= {"max_position_embeddings": 32768}  # the rest is transformers' defaults
  assert mistral.read_config(write(tmp_path, first)) == known.PUBLISHED["mistral-7b-instruct-v0.1"].config
  second = first | {"rope_theta": 1e6, "sliding_window": None}
  assert mistral.read_config(write(tmp_path, second)) == known.PUBLISHED["mistral-7b-instruct-v0.2"].config
  assert mistral.read_config(write(tmp_path, {"model_type": "mistral"})).sliding_window == 4096
  for change, named in (
    ({"sliding_window": 0}, "sliding_window is 0"),
    ({"sliding_window": "4096"}, "sliding_window is '4096'"),
    ({"model_type": "ministral"}, "'ministral'"),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "yarn"),
  ):
    with pytest.raises(WeightsError, match=f"config.json.*{named}"):
      mistral.read_config(write(tmp_path, first | change))


@pytest.mark.parametrize("name", [name for name, it in known.PUBLISHED.items() if isinstance(it.config, DecoderConfig)])
def test_what_is_written_of_a_decoder_is_read_again(name):
  config = known.PUBLISHED[name].config
  content = text_config(config) | {"vocab_size": config.vocab_size}
  parse = {"llama": llama.parse, "mistral": mistral.parse, "qwen2": qwen2.parse}[content["model_type"]]
  assert parse(content, "config.json") == config
  with pytest.raises(ConfigError, match="attention_bias and decoder.sliding_window=9"):
    text_config(DecoderConfig(attention_bias=True, sliding_window=9))


def test_qwen2_5_is_qwen2(tmp_path):
  sizes = {"vocab_size": 152064, "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28}
  sizes |= {"num_key_value_heads": 4, "intermediate_size": 18944, "tie_word_embeddings": False}
  found = qwen2.read_config(write(tmp_path, QWEN2 | sizes))
  assert found == known.PUBLISHED["qwen2.5-7b-instruct"].config == known.PUBLISHED["qwen2-7b-instruct"].config


def test_siglip(tmp_path):
  expected = VisionConfig(
    image_size=384,
    patch_size=16,
    activation="gelu_pytorch_tanh",
    norm_eps=1e-6,
    class_token=False,
    patch_bias=True,
    pre_norm=False,
    mean=(0.5,) * 3,
    std=(0.5,) * 3,
  )
  whole = {"model_type": "siglip", "vision_config": SIGLIP, "text_config": {"hidden_size": 768}}
  assert siglip.read_config(write(tmp_path, whole)) == expected
  assert siglip.read_config(write(tmp_path, SIGLIP | {"model_type": "siglip_vision_model"})) == expected
  tower = siglip.read_config(write(tmp_path, {"model_type": "siglip_vision_model"}))  # all as transformers' defaults
  assert (tower.width, tower.layers, tower.heads, tower.mlp_width) == (768, 12, 12, 3072)
  assert (tower.image_size, tower.patch_size, tower.grid) == (224, 16, 14)
  write(tmp_path, {"image_mean": [0.1] * 3}, "preprocessor_config.json")
  assert (siglip.read_config(tmp_path).mean, siglip.read_config(tmp_path).std) == ((0.1,) * 3, (0.5,) * 3)
  with pytest.raises(WeightsError, match="config.json: model_type is 'clip'.*google/siglip-large-patch16-384"):
    siglip.read_config(write(tmp_path, whole | {"model_type": "clip"}))
  with pytest.raises(WeightsError, match="config.json, vision_config: hidden_act is 'relu'"):
    siglip.read_config(write(tmp_path, whole | {"vision_config": SIGLIP | {"hidden_act": "relu"}}))


def test_qwen2(tmp_path):
  expected = DecoderConfig(
    vocab_size=151936,
    width=896,
    layers=24,
    heads=14,
    kv_heads=2,
    head_width=64,
    mlp_width=4864,
    rope_theta=1e6,
    norm_eps=1e-6,
    tied_embeddings=True,
    attention_bias=True,
    max_positions=32768,
  )
  assert qwen2.read_config(write(tmp_path, QWEN2)) == expected
  five = {key: value for key, value in QWEN2.items() if key != "rope_theta"} | {
    "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
    "layer_types": ["full_attention"] * 24,
    "sliding_window": None,
  }
  assert qwen2.read_config(write(tmp_path, five)) == expected
  bare = qwen2.read_config(write(tmp_path, {"model_type": "qwen2"}))  # all as transformers' defaults
  assert (bare.vocab_size, bare.mlp_width, bare.kv_heads, bare.rope_theta) == (151936, 22016, 32, 10000.0)
  assert (bare.norm_eps, bare.tied_embeddings) == (1e-6, False)


@pytest.mark.parametrize(
  "change, named",
  [
    ({"model_type": "llama"}, "'llama'"),
    ({"use_sliding_window": True}, "use_sliding_window=True"),
    ({"layer_types": ["full_attention"] * 12 + ["sliding_attention"] * 12}, "layer_types has sliding_attention"),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "yarn"),
  ],
)
def test_qwen2_refuses(tmp_path, change, named):
  with pytest.raises(WeightsError, match=f"config.json.*{named}"):
    qwen2.read_config(write(tmp_path, QWEN2 | change))


def test_parts_of_a_llava_configuration():
  """The inner dictionaries, whose place is named in errors; an absent model_type is that of the family asked for."""
  where = "llava/config.json, text_config"
  assert llama.parse(VICUNA, where) == llama.parse(VICUNA | {"model_type": "llama"}, where) == DecoderConfig()
  assert qwen2.parse(QWEN2, where).attention_bias
  assert clip.parse(CLIP | {"model_type": "clip_vision_model"}, where) == clip.parse(CLIP, where) == VisionConfig()
  assert siglip.parse(SIGLIP, where).grid == 24
  for parse, content in ((llama.parse, QWEN2), (qwen2.parse, VICUNA), (clip.parse, {"model_type": "siglip"})):
    with pytest.raises(WeightsError, match="^llava/config.json, text_config: model_type is '"):
      parse(content, where)
  with pytest.raises(WeightsError, match=r"image_size.*\[384, 512\].*square"):
    siglip.parse(SIGLIP | {"image_size": [384, 512]}, where)


def write_adapter(folder, content):
  """An adapter of q_proj and v_proj in one layer, of rank 128, with that configuration."""
  tensors = {}
  for name in ("q_proj", "v_proj"):
    stem = f"base_model.model.model.layers.0.self_attn.{name}.lora_"
    tensors |= {stem + "A.weight": np.ones((128, 4), np.float16), stem + "B.weight": np.ones((4, 128), np.float16)}
  save_file(tensors, folder / "adapter_model.safetensors")
  return write(folder, content, "adapter_config.json")


@pytest.mark.parametrize(
  "change",
  [
    {},
    {"target_modules": "all-linear"},
    {"target_modules": r".*\.(q|v)_proj"},
    {"target_modules": ["q_proj", "v_proj", "gate_proj"], "exclude_modules": "gate_proj"},
    {"layers_to_transform": [0], "peft_version": "0.21.2", "runtime_config": {"ephemeral_gpu_offload": False}},
    {"init_lora_weights": "gaussian", "alpha_pattern": {}, "use_dora": False, "layer_replication": None},
  ],
)
def test_peft(tmp_path, change):
  config = peft.read_config(write_adapter(tmp_path, ADAPTER | change))
  assert config == LoraConfig(rank=128, alpha=256.0, dropout=0.05, targets=("q_proj", "v_proj"))


def test_peft_reads_what_it_writes(tmp_path):
  config = LoraConfig(rank=128, alpha=256.0, dropout=0.05, targets=("q_proj", "v_proj"))
  content = peft.config_file(config, "lmsys/vicuna-7b-v1.5")
  assert content["base_model_name_or_path"] == "lmsys/vicuna-7b-v1.5"
  assert peft.read_config(write_adapter(tmp_path, content)) == config


@pytest.mark.parametrize(
  "change, named",
  [
    ({"peft_type": "IA3"}, "'IA3'"),
    ({"use_dora": True, "bias": "all"}, "bias='all', use_dora=True"),
    ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\]"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out=True"),
    ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4'"),
    ({"layer_replication": [[0, 4]]}, "layer_replication"),
    ({"a_new_kind_of_adapter": {"on": True}}, "a_new_kind_of_adapter"),
    ({"r": None}, "lacks r or lora_alpha"),
    ({"lora_alpha": 0}, "lacks r or lora_alpha"),
    ({"lora_dropout": "0.1"}, "lora_dropout must be a number"),
    ({"rank_pattern": [4]}, "rank_pattern and alpha_pattern objects"),
    ({"rank_pattern": {"q_proj": 0}}, "layers.0.self_attn.q_proj the rank 0"),
  ],
)
def test_peft_refuses(tmp_path, change, named):
  with pytest.raises(WeightsError, match=f"adapter_config.json.*{named}"):
    peft.read_config(write_adapter(tmp_path, ADAPTER | change))


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


def test_what_is_published_has_the_published_size():
  """Parameters as the model cards and safetensors indices count them."""
  sizes = {
    "llama-3-8b-instruct": 8_030_261_248,
    "llama-3.1-8b-instruct": 8_030_261_248,
    "llama-3.2-3b-instruct": 3_212_749_824,
    "mistral-7b-instruct-v0.1": 7_241_732_096,
    "qwen2.5-7b-instruct": 7_615_616_512,
  }
  for name, size in sizes.items():
    shapes = assemble.part_shapes("decoder", {"decoder": known.PUBLISHED[name].config})
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == size, name
