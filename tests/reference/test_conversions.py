"""Whole models that transformers and PEFT saved: read in one step with the same logits; adapters that are written
apart, read by PEFT on the exported model."""

import layouts
import numpy as np
import pytest
import tiny
from PIL import Image

import mllm_jax
from mllm_jax import convert
from mllm_jax.data import images
from mllm_jax.data.patches import unpatchify

pytestmark = pytest.mark.torch


def picture() -> Image.Image:
  return Image.fromarray(np.random.default_rng(1).integers(0, 256, (56, 56, 3), np.uint8))


def torch_logits(model, processor, batch, image_id: int) -> np.ndarray:
  """transformers' logits for the rows of our batch."""
  import torch

  ids = np.where(batch.visual_index >= 0, image_id, batch.tokens)
  vision = processor.vision
  pictures = [unpatchify(patches[0], grids[0], vision.patch_size) for patches, grids in zip(batch.patches, batch.grids)]
  pixels = images.normalise(np.stack(pictures), vision.mean, vision.std)
  with torch.no_grad():
    return model.eval()(
      input_ids=torch.from_numpy(ids.astype(np.int64)),
      pixel_values=torch.from_numpy(np.moveaxis(pixels, -1, 1).copy()),
      attention_mask=torch.from_numpy((batch.segment_ids > 0).astype(np.int64)),
    ).logits.numpy()


def our_logits(model, batch) -> np.ndarray:
  return np.asarray(model.logits(batch))


@pytest.mark.parametrize("kind", ["clip and llama", "siglip and qwen2"])
def test_a_llava_that_transformers_saved(tmp_path, kind):
  """Random weights saved by transformers 5; our logits on picture and text are its own, to 1e-4 in float32."""
  import torch
  from transformers import AutoConfig, LlavaConfig, LlavaForConditionalGeneration

  config = layouts.model() if kind.startswith("clip") else layouts.model(vision=layouts.SIGLIP, decoder=layouts.QWEN2)
  vision, text = layouts.tower(config.vision)[1], layouts.decoder(config)[1]
  torch.manual_seed(0)
  llava = LlavaForConditionalGeneration(
    LlavaConfig(
      vision_config=AutoConfig.for_model(**vision),
      text_config=AutoConfig.for_model(**text),
      image_token_id=tiny.DECODER.vocab_size - 1,
      vision_feature_layer=-2,
      vision_feature_select_strategy="default" if config.vision.class_token else "full",
    )
  ).float()
  with torch.no_grad():
    for parameter in llava.parameters():
      parameter.normal_(0, 0.3)
  llava.save_pretrained(tmp_path / "llava")
  layouts.tokenizer(tmp_path / "llava")
  model, processor = mllm_jax.load(str(tmp_path / "llava"), dtype="float32")
  batch = processor(["What is it?"], [[picture()]])
  ours = our_logits(model, batch)
  theirs = torch_logits(llava, processor, batch, tiny.DECODER.vocab_size - 1)
  # float32 sums in another order
  np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())


def test_an_adapter_apart_from_its_llava_hf_model(tmp_path):
  """PEFT puts OUT/adapter on the exported model, which then gives our logits; merged the same."""
  import peft
  import torch
  from transformers import LlavaForConditionalGeneration

  model = layouts.model(layouts.MLP, layouts.LORA)
  vision = layouts.vision_folder(tmp_path / "clip", model)
  llm = layouts.decoder_folder(tmp_path / "vicuna", model)
  run = layouts.lora_folder(tmp_path / "lora", model, str(vision), str(llm))
  ours, processor = mllm_jax.load(str(run), dtype="float32", llm=str(llm))
  batch = processor(["What is it?"], [[picture()]])
  expected = our_logits(ours, batch)
  for lora in ("apart", "merged"):
    assert convert.main(["import", f"--model={run}", f"--llm={llm}", f"--out={tmp_path / 'ours'}", "--overwrite"]) == 0
    out = tmp_path / lora
    command = ["export", f"--checkpoint={tmp_path / 'ours'}", "--format=hf", f"--lora={lora}", f"--out={out}"]
    assert convert.main(command) == 0
    llava = LlavaForConditionalGeneration.from_pretrained(out, dtype=torch.float32)
    image_id, rows = llava.config.image_token_id, tiny.DECODER.vocab_size
    if lora == "apart":
      bare = torch_logits(llava, processor, batch, image_id)[..., :rows]
      assert np.abs(bare - expected).max() > 0.01 * np.abs(expected).max()
      llava = peft.PeftModel.from_pretrained(llava, out / "adapter")
    else:
      assert not (out / "adapter").exists()
    theirs = torch_logits(llava, processor, batch, image_id)[..., :rows]
    np.testing.assert_allclose(theirs, expected, atol=1e-4 * np.abs(expected).max())


def test_the_official_files_are_what_torch_load_reads(tmp_path):
  import torch

  model = layouts.model(tiny.PROJECTOR, layouts.LORA)
  vision = layouts.vision_folder(tmp_path / "clip", model)
  llm = layouts.decoder_folder(tmp_path / "vicuna", model)
  run = layouts.lora_folder(tmp_path / "lora", model, str(vision), str(llm))
  assert convert.main(["import", f"--model={run}", f"--llm={llm}", f"--out={tmp_path / 'ours'}"]) == 0
  command = ["export", f"--checkpoint={tmp_path / 'ours'}", "--format=official", "--lora=apart"]
  assert convert.main([*command, f"--out={tmp_path / 'official'}"]) == 0
  found = torch.load(tmp_path / "official" / "non_lora_trainables.bin", weights_only=True)
  wanted = layouts.projector_names(model, "base_model.model.model.")
  assert found.keys() == wanted.keys()
  for name, array in wanted.items():
    np.testing.assert_array_equal(found[name].numpy(), array)
