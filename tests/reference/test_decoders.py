"""Qwen2.5, Mistral and Llama 3 against transformers: logits of rows and of packed samples, exported models."""

import layouts
import numpy as np
import pytest
from test_saved_models import LANGUAGE, close, our_decoder, our_logits, shaken, some_ids, torch_logits

from mllm_jax import convert
from mllm_jax.weights.io import open_weights
from mllm_jax.weights.recognise import DECODERS, recognise

pytestmark = pytest.mark.torch
# Of 29 places; the scaled angles of 12 trained places are of all three kinds.
LENGTH = 29
LLAMA3 = dict(
  rope_type="llama3",
  rope_theta=100.0,
  factor=4.0,
  low_freq_factor=1.0,
  high_freq_factor=3.0,
  original_max_position_embeddings=12,
)
KINDS = {
  "qwen2.5": ("qwen2", dict(rope_parameters=dict(rope_type="default", rope_theta=1e6))),
  "mistral": ("mistral", dict(sliding_window=6)),
  "mistral without a window": ("mistral", dict(sliding_window=None)),
  "llama 3": ("llama", dict(rope_parameters=dict(rope_type="default", rope_theta=5e5))),
  "llama 3.1": ("llama", dict(rope_parameters=LLAMA3)),
  "llama 3.2": ("llama", dict(rope_parameters=LLAMA3, tie_word_embeddings=True)),
}


def saved(folder, kind):
  """A random model that transformers saved: (the model, ours)."""
  import torch
  from transformers import AutoConfig, AutoModelForCausalLM

  torch.manual_seed(0)
  model_type, settings = KINDS[kind]
  config = AutoConfig.for_model(model_type, **LANGUAGE, **settings, eos_token_id=None, bos_token_id=None)
  model = shaken(AutoModelForCausalLM.from_config(config).float())
  model.save_pretrained(folder)
  part = recognise(folder).parts["decoder"]
  table = DECODERS[model_type].table(part.config)
  return model, our_decoder(part.config, open_weights(folder), table)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_transformers(kind, tmp_path):
  model, decoder = saved(tmp_path, kind)
  assert bool(decoder.config.sliding_window) == (kind == "mistral")
  assert (decoder.config.rope_factor != 1) == (kind in ("llama 3.1", "llama 3.2"))
  ids = some_ids(length=LENGTH)
  expected = torch_logits(model, ids)
  close(our_logits(decoder, ids), expected)
  # two samples in a row see what they see alone
  positions = np.concatenate([np.arange(10), np.arange(LENGTH - 10)])[None].repeat(2, 0)
  segments = np.repeat([[1] * 10 + [2] * (LENGTH - 10)], 2, 0)
  packed = decoder.logits(decoder(decoder.embed(ids), positions, segments))
  close(packed[:, 10:], torch_logits(model, ids[:, 10:]))


@pytest.mark.parametrize("kind", ["qwen2.5", "mistral", "llama 3.1"])
def test_a_llava_with_this_decoder(kind, tmp_path):
  """Saved by transformers around a tiny tower, read, and exported again for transformers, which has the same logits."""
  import torch
  from transformers import AutoConfig, CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

  torch.manual_seed(0)
  model_type, settings = KINDS[kind]
  common = {name: value for name, value in layouts.LLAMA_CONFIG.items() if name not in ("model_type", "rope_theta")}
  text = AutoConfig.for_model(model_type, **common | settings)
  config = LlavaConfig(
    vision_config=CLIPVisionConfig(**layouts.CLIP_CONFIG), text_config=text, image_token_id=text.vocab_size - 1
  )
  llava = shaken(LlavaForConditionalGeneration(config).float())
  llava.save_pretrained(tmp_path / "llava")
  layouts.tokenizer(tmp_path / "llava")
  assert convert.main(["import", f"--model={tmp_path / 'llava'}", f"--out={tmp_path / 'ours'}"]) == 0
  command = ["export", f"--checkpoint={tmp_path / 'ours'}", "--format=hf", f"--out={tmp_path / 'hf'}"]
  assert convert.main(command) == 0
  again, problems = LlavaForConditionalGeneration.from_pretrained(
    tmp_path / "hf", dtype=torch.float32, output_loading_info=True
  )
  assert not any(problems.values()) and again.config.text_config.model_type == model_type
  assert again.config.text_config.rope_parameters == text.rope_parameters
  ids = some_ids(length=LENGTH) + 3
  close(torch_logits(again, ids)[..., : text.vocab_size], torch_logits(llava, ids))
