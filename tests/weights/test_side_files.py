"""Side files of exports: what they say, and that their tokenizer and template make our ids."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from export_cases import CONVERSATIONS, MODELS, QWEN, VICUNA, write_tokenizers
from tokenizers import Tokenizer, processors

from mllm_jax.config import ConfigError, DecoderConfig, ModelConfig, ProjectorConfig, VisionConfig
from mllm_jax.data import chat
from mllm_jax.data.records import DataError
from mllm_jax.weights import clip, llama, qwen2, side_files, siglip
from mllm_jax.weights.side_files import chat_template
from mllm_jax.weights.side_files.official import literals

KINDS = pytest.mark.parametrize("kind", list(MODELS))
RELEASED = ModelConfig()  # LLaVA-SP on CLIP-L at 336 pixels


@pytest.fixture(scope="module")
def tokenizer_folders(tmp_path_factory):
  return write_tokenizers(tmp_path_factory.mktemp("tokenizers"))


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tokenizer_folders):
  """{kind: (folder, vocabulary)}."""
  made = {}
  for kind, model in MODELS.items():
    folder = tmp_path_factory.mktemp(f"exported_{kind}")
    vocabulary = side_files.hf_vocabulary(tokenizer_folders[kind], model.decoder)
    side_files.write_hf(folder, model, tokenizer_folders[kind], "plain", vocabulary, "bfloat16")
    made[kind] = folder, vocabulary
  return made


def read(path):
  return json.loads(path.read_text(encoding="utf-8"))


def official(folder, tokenizer_folder, model=RELEASED, vision="openai/clip-vit-large-patch14-336", lora=False, **rest):
  arguments = {"vision_source": vision, "base_model": "lmsys/vicuna-7b-v1.5", "dtype": "float16", "lora": lora} | rest
  side_files.write_official(folder, model, tokenizer_folder, **arguments)
  return (folder / "README.md").read_text(encoding="utf-8")


def with_projector(vision=RELEASED.vision, **fields):
  return ModelConfig(vision=vision, projector=ProjectorConfig(**fields))


def test_the_vocabulary_follows_llava_hf(tokenizer_folders, exported, tmp_path):
  vocabulary = side_files.hf_vocabulary(tokenizer_folders["spm_new"], DecoderConfig())
  assert vocabulary == side_files.HfVocabulary(32000, 32001, 32064)
  # a tokenizer with more tokens than the model has rows; a padding token of its own; rows that are enough
  few, many = dataclasses.replace(VICUNA.decoder, vocab_size=500), dataclasses.replace(QWEN.decoder, vocab_size=5000)
  hf_vocabulary = side_files.hf_vocabulary
  assert hf_vocabulary(tokenizer_folders["json_legacy"], few) == side_files.HfVocabulary(512, 513, 576)
  assert hf_vocabulary(tokenizer_folders["bytes"], QWEN.decoder) == side_files.HfVocabulary(400, 330, 448)
  assert hf_vocabulary(exported["bytes"][0], many) == side_files.HfVocabulary(400, 330, 5000)
  assert hf_vocabulary(exported["spm_new"][0], VICUNA.decoder) == exported["spm_new"][1]
  with pytest.raises(DataError, match="no such folder"):
    hf_vocabulary(tmp_path / "nothing", DecoderConfig())


@KINDS
def test_the_exported_tokenizer_makes_our_ids(tokenizer_folders, exported, kind):
  (folder, vocabulary), tokenizer = exported[kind], chat.load_tokenizer(str(tokenizer_folders[kind]))
  backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
  written = (folder / "chat_template.jinja").read_text()
  assert written == read(folder / "chat_template.json")["chat_template"]
  for turns, names, system in CONVERSATIONS.values():
    ours = chat.encode_prompt(turns, "vicuna_v1", tokenizer, len(names), system)
    expected = np.where(ours < 0, vocabulary.image_token_id, ours).tolist()
    assert backend.encode(rendered(written, turns, system, tokenizer)).ids == expected
  # where the tokenizer puts no space after a special token the template has one, before the newline
  assert ('before_newline = " "' in written) == (kind in ("spm_new", "json_new"))


def rendered(template, turns, system, tokenizer):
  """What transformers makes of a conversation whose answer is due."""
  from transformers.utils.chat_template_utils import render_jinja_template

  named = {"bos_token": "", "eos_token": ""} | tokenizer.named
  messages = chat_template.messages(turns, system)
  return render_jinja_template([messages], chat_template=template, add_generation_prompt=True, **named)[0][0]


LLAMA_3 = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
OWN = """{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>

{{ message['content'] | trim }}<|eot_id|>{% endfor %}
{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""


@pytest.fixture(scope="module")
def llama_3_folder(tokenizer_folders, tmp_path_factory):
  """A tokenizer of bytes that begins every text with a token, with a template of its own."""
  folder = tmp_path_factory.mktemp("llama_3")
  backend = Tokenizer.from_file(str(tokenizer_folders["bytes"] / "tokenizer.json"))
  backend.add_special_tokens(LLAMA_3)
  start = (LLAMA_3[0], backend.token_to_id(LLAMA_3[0]))
  backend.post_processor = processors.TemplateProcessing(single=f"{LLAMA_3[0]} $A", special_tokens=[start])
  backend.save(str(folder / "tokenizer.json"))
  config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": LLAMA_3[0], "eos_token": "<|endoftext|>"}
  (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": OWN}))
  return folder


@pytest.mark.parametrize(
  "kind, template",
  [
    *(("bytes", name) for name in ("chatml", "chatml_released", "qwen2_5", "internvl2")),
    *((kind, "mistral_instruct") for kind in MODELS),
    *(("llama_3", name) for name in ("llava_llama_3", "jinja", "vicuna_v1", "mistral_instruct")),
  ],
)
def test_every_template_makes_our_ids(tokenizer_folders, llama_3_folder, tmp_path, kind, template):
  source = llama_3_folder if kind == "llama_3" else tokenizer_folders[kind]
  model, tokenizer = MODELS.get(kind, QWEN), chat.load_tokenizer(str(source))
  vocabulary = side_files.hf_vocabulary(source, model.decoder)
  side_files.write_hf(tmp_path, model, source, template, vocabulary, "bfloat16")
  backend = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
  written = (tmp_path / "chat_template.jinja").read_text(encoding="utf-8")
  for turns, names, system in CONVERSATIONS.values():
    ours = chat.encode_prompt(turns, template, tokenizer, len(names), system)
    expected = np.where(ours < 0, vocabulary.image_token_id, ours).tolist()
    assert backend.encode(rendered(written, turns, system, tokenizer)).ids == expected
  # generation ends at the template's token, and at the tokenizer's as ours does
  ends = {tokenizer.eos_id, chat.end_id(template, tokenizer)}
  found = read(tmp_path / "generation_config.json")["eos_token_id"]
  assert (set(found) if isinstance(found, list) else {found}) == ends
  assert len(ends) == 1 + (template in ("llava_llama_3", "jinja"))


@KINDS
def test_transformers_reads_the_exported_tokenizer(tokenizer_folders, exported, kind):
  from transformers import AutoTokenizer

  folder, vocabulary = exported[kind]
  source, tokenizer = (AutoTokenizer.from_pretrained(path) for path in (tokenizer_folders[kind], folder))
  assert tokenizer.pad_token_id == vocabulary.pad_token_id and tokenizer.padding_side == "left"
  assert tokenizer.convert_tokens_to_ids("<image>") == vocabulary.image_token_id
  for text in ("Two dogs, 42!", " \n\u2713", "a</s>b <|im_end|> c"):
    assert tokenizer(text).input_ids == source(text).input_ids, text
  assert tokenizer.decode(source("Two dogs").input_ids, skip_special_tokens=True) == "Two dogs"
  config = read(folder / "tokenizer_config.json")
  assert "extra_special_tokens" not in config and config.get("model_max_length") == (2000 if kind == "bytes" else None)
  added = {"<image>": vocabulary.image_token_id, "<pad>": vocabulary.pad_token_id}
  if kind == "bytes":
    added = {"<image>": 400, "<|endoftext|>": 330, "<|im_start|>": 331, "<|im_end|>": 332}
  assert read(folder / "added_tokens.json") == added
  assert (folder / "tokenizer.model").is_file() == (tokenizer_folders[kind] / "tokenizer.model").is_file()


def test_config_says_what_the_model_is(exported):
  folder, _ = exported["spm_new"]
  config = read(folder / "config.json")
  assert config["model_type"] == "llava" and config["architectures"] == ["LlavaForConditionalGeneration"]
  assert config["dtype"] == config["torch_dtype"] == config["text_config"]["torch_dtype"] == "bfloat16"
  assert (config["image_token_index"], config["image_token_id"], config["pad_token_id"]) == (520, 520, 521)
  assert config["text_config"]["vocab_size"] == 576 and config["text_config"]["max_position_embeddings"] == 512
  # of three layers the model computes two, and the last one's output is the feature
  assert config["vision_config"]["num_hidden_layers"] == 2 and config["vision_feature_layer"] == -1
  assert config["vision_feature_select_strategy"] == "default" and config["image_seq_length"] == 16
  assert read(folder / "generation_config.json").items() >= {"eos_token_id": 2, "pad_token_id": 521}.items()
  processor = read(folder / "processor_config.json")
  assert (processor["patch_size"], processor["num_additional_image_tokens"]) == (14, 1)
  pictures = read(folder / "preprocessor_config.json")
  assert pictures["image_processor_type"] == "LlavaImageProcessor" and pictures["do_pad"] is True
  assert tuple(pictures["image_mean"]) == VICUNA.vision.mean and pictures["size"] == {"height": 56, "width": 56}


def test_cut_pictures_are_said_to_be_cut(tokenizer_folders, tmp_path):
  source = tokenizer_folders["spm_new"]
  official(tmp_path / "llava", source, with_projector(kind="mlp2x_gelu"), cut=True)
  assert read(tmp_path / "llava" / "config.json")["image_aspect_ratio"] == "square"
  vocabulary = side_files.hf_vocabulary(source, VICUNA.decoder)
  side_files.write_hf(tmp_path / "hf", VICUNA, source, "vicuna_v1", vocabulary, "float32", cut=True)
  written = read(tmp_path / "hf" / "preprocessor_config.json")
  wanted = {"do_pad": False, "do_center_crop": True, "size": {"shortest_edge": 56}}
  assert written.items() >= {"image_processor_type": "CLIPImageProcessor", **wanted}.items()


@KINDS
def test_our_readers_give_the_model_back(exported, kind):
  model, config = MODELS[kind], read(exported[kind][0] / "config.json")
  vision, decoder = (siglip, qwen2) if model is QWEN else (clip, llama)
  rows = exported[kind][1].vocab_size
  assert decoder.parse(config["text_config"], "") == dataclasses.replace(model.decoder, vocab_size=rows)
  tower = clip.with_colours(vision.parse(config["vision_config"], ""), exported[kind][0])
  assert tower == dataclasses.replace(model.vision, layers=model.vision.layers_used)


def test_siglip_has_no_class_token_and_no_head(exported):
  config, processor = (read(exported["bytes"][0] / name) for name in ("config.json", "processor_config.json"))
  assert config["vision_config"]["vision_use_head"] is False and config["tie_word_embeddings"] is True
  assert config["vision_feature_select_strategy"] == processor["vision_feature_select_strategy"] == "full"
  assert processor["num_additional_image_tokens"] == 0


def test_extra_tensors_are_the_norm_that_nothing_uses():
  tensors = side_files.extra_tensors(VICUNA)
  names = ["vision_tower.vision_model.post_layernorm.weight", "vision_tower.vision_model.post_layernorm.bias"]
  assert list(tensors) == names
  assert [array.tolist() for array in tensors.values()] == [[1.0] * 16, [0.0] * 16]


def test_what_transformers_cannot_express_is_refused(tokenizer_folders, tmp_path):
  folder, source = tmp_path / "exported", tokenizer_folders["spm_new"]
  vocabulary = side_files.hf_vocabulary(source, VICUNA.decoder)

  def write(model=VICUNA, template="vicuna_v1", vocabulary=vocabulary, dtype="float32"):
    side_files.write_hf(folder, model, source, template, vocabulary, dtype)

  with pytest.raises(ConfigError, match="projector.kind='spatial' .* official layout"):
    write(dataclasses.replace(VICUNA, projector=ProjectorConfig()))
  with pytest.raises(DataError, match=r"no special token '<\|im_start\|>'"):
    write(template="chatml")
  with pytest.raises(ConfigError, match="float64.*float32, float16, bfloat16"):
    write(dtype="float64")
  with pytest.raises(ConfigError, match="neither CLIP's nor SigLIP's"):
    write(dataclasses.replace(VICUNA, vision=dataclasses.replace(VICUNA.vision, pre_norm=False)))
  with pytest.raises(ConfigError, match="hf_vocabulary"):
    write(vocabulary=side_files.HfVocabulary(7, 8, 512))
  assert not folder.exists()


def test_a_tokenizer_that_no_template_fits_is_refused(tokenizer_folders, exported):
  folder, vocabulary = exported["spm_legacy"]
  backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
  other = chat.load_tokenizer(str(tokenizer_folders["spm_new"]))
  with pytest.raises(ConfigError, match="no chat template gives our token ids"):
    chat_template.jinja("vicuna_v1", other, backend, vocabulary.image_token_id)


def test_the_official_config_is_the_released_one(tokenizer_folders, tmp_path):
  readme = official(tmp_path / "llava-sp-lora", tokenizer_folders["spm_new"], lora=True)
  config = read(tmp_path / "llava-sp-lora" / "config.json")
  expected = {
    "_name_or_path": "lmsys/vicuna-7b-v1.5",
    "architectures": ["LlavaLlamaForCausalLM"],
    "model_type": "llava_llama",
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "mm_hidden_size": 1024,
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_projector_type": "mlp2x_gelu",
    "mm_patch_merge_type": "flat",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "use_mm_proj": True,
    "image_aspect_ratio": "pad",
    "tokenizer_padding_side": "right",
    "tokenizer_model_max_length": 2048,
    "torch_dtype": "float16",
    "hidden_size": 4096,
    "vocab_size": 32000,
    "rope_theta": 10000.0,
    "pad_token_id": 0,
  }
  assert config.items() >= expected.items()
  for name in ("tokenizer.model", "tokenizer_config.json"):
    assert (tmp_path / "llava-sp-lora" / name).read_bytes() == (tokenizer_folders["spm_new"] / name).read_bytes()
  assert "--model-base lmsys/vicuna-7b-v1.5" in readme and '"llava" and "lora"' in readme
  whole = official(tmp_path / "llava-sp", tokenizer_folders["json_new"])
  assert "--model-path FOLDER" in whole and "--model-base" not in whole and "tokenizer.model" in whole


@pytest.mark.parametrize(
  "fields, encoder, architecture, train",
  [
    ({}, "336_6_tokens", "conv336_cropping_sfe_dfi", "conv336_q"),
    ({"dfi_kernel": 0}, "336_6_tokens", "conv336", "conv336"),
    ({"dfi_kernel": 0, "stride": 4}, "336_3_tokens", "conv336_3_tokens", "conv336_3_tokens"),
    ({"dfi_kernel": 0, "stride": 1}, "224", "conv336_12_tokens", "conv336_12_tokens"),
    ({"dfi_kernel": 0, "sizes": (24,)}, "336_6_tokens", "conv336_24", "conv336_24"),
    ({"dfi_kernel": 0, "maps": "pooling"}, "336_pooling", "conv336_pooling_sfe", "conv336_adptive_pooling"),
    ({"maps": "pooling"}, "336_pooling", "conv336_adptive_pooling_fuse_49", "conv336_q"),
    ({"sfe": "windows", "window_strides": (2, 2), "dfi_kernel": 0}, "336_6_tokens", *["conv336_conv_49"] * 2),
    ({"sfe": "transformer", "dfi_kernel": 0}, "336_6_tokens", "tfm336", "tfm336"),
    (
      {"sfe": "transformer", "maps": "pooling", "token_order": "released", "dfi_kernel": 0},
      "336_6_tokens",
      *["tfm336_adptive_pooling"] * 2,
    ),
  ],
)
def test_the_readme_names_the_literals_of_a_variant(tokenizer_folders, tmp_path, fields, encoder, architecture, train):
  readme = official(tmp_path, tokenizer_folders["spm_new"], with_projector(**fields))
  assert f"`a='{encoder}'`" in readme and f"`{architecture}`" in readme and f"`a='{train}'`" in readme


def test_the_readme_says_what_the_released_code_has_not(tokenizer_folders, tmp_path):
  source = tokenizer_folders["spm_new"]
  assert "no such variant" in official(tmp_path, source, with_projector(dfi_kernel=0, head_bias="always"))
  narrow = with_projector(sfe="windows", window=8, window_strides=(2, 2), dfi_kernel=0)
  assert "no such variant: windows with sizes 8" in official(tmp_path, source, narrow)
  assert "a kernel of 8, not 16" in official(tmp_path, source, with_projector(dfi_kernel=8))
  assert "Nothing" in official(tmp_path, source, with_projector(kind="mlp2x_gelu"), "weights/vit-large")
  tower = VisionConfig(image_size=384, patch_size=16, class_token=False, patch_bias=True, pre_norm=False)
  assert literals(with_projector(tower)).encoder == "336"
  assert literals(with_projector(tower, maps="pooling")) is None
  assert "siglip_encoder.py" in official(tmp_path, source, with_projector(tower), "google/siglip-large-patch16-384")


def test_what_the_released_code_would_not_load_is_refused(tokenizer_folders, tmp_path):
  source = tokenizer_folders["spm_new"]
  with pytest.raises(ConfigError, match="no class for Qwen2"):
    official(tmp_path, source, ModelConfig(decoder=QWEN.decoder))
  for change in (dict(sliding_window=4096), dict(rope_factor=8.0)):
    with pytest.raises(ConfigError, match="no class for Mistral and none for Llama 3.1"):
      official(tmp_path, source, ModelConfig(decoder=DecoderConfig(**change)))
  with pytest.raises(ConfigError, match="head_width=8"):
    official(tmp_path, source, ModelConfig(decoder=VICUNA.decoder))
  with pytest.raises(ConfigError, match="CLIP towers only"):
    official(tmp_path, source, ModelConfig(vision=QWEN.vision, projector=VICUNA.projector))
  with pytest.raises(ConfigError, match="takes the tower for SigLIP"):
    official(tmp_path, source, vision="weights/vit-large")
  with pytest.raises(ConfigError, match="takes the tower for CLIP"):
    official(tmp_path, source, with_projector(QWEN.vision, stride=1, dfi_kernel=0), vision="weights/clip-like")
  with pytest.raises(ConfigError, match="vision_source is empty"):
    official(tmp_path, source, vision="")
  with pytest.raises(ConfigError, match="int8"):
    official(tmp_path, source, dtype="int8")


def test_exports_name_every_token_that_ends_answers(tokenizer_folders, tmp_path):
  source = shutil.copytree(tokenizer_folders["spm_new"], tmp_path / "source")
  (source / "generation_config.json").write_text('{"eos_token_id": [7, 2]}')
  official(tmp_path / "llava-sp", source)
  side_files.write_hf(
    tmp_path / "hf", VICUNA, source, "vicuna_v1", side_files.hf_vocabulary(source, VICUNA.decoder), "float32"
  )
  for folder in ("llava-sp", "hf"):
    assert read(tmp_path / folder / "generation_config.json")["eos_token_id"] == [2, 7]
    assert chat.load_tokenizer(str(tmp_path / folder)).end_ids == {2, 7}
