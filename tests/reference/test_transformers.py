"""Against PyTorch, transformers and PEFT themselves: the shipped towers, checkpoints that torch wrote, adapters that
PEFT wrote."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mllm_jax import parameters, recipes
from mllm_jax.config import LoraConfig
from mllm_jax.data import images
from mllm_jax.data.patches import patchify
from mllm_jax.models import lora as lora_lib
from mllm_jax.models.decoder import Decoder
from mllm_jax.models.vision import VisionTower
from mllm_jax.weights import clip, llama, mapping
from mllm_jax.weights import peft as peft_table
from mllm_jax.weights.io import open_weights

pytestmark = pytest.mark.torch
CLIP, LLAMA = recipes.DEMO_ASSETS / "clip", recipes.DEMO_ASSETS / "llama"


def fill(module: nnx.Module, prefix: str, sources: list[tuple]) -> nnx.Module:
  """`module` with the arrays that each (folder, table, which paths) of `sources` gives."""
  graphdef, flat = parameters.flatten(module)
  loaded = {}
  for folder, table, wanted in sources:
    targets = {prefix + path: jax.ShapeDtypeStruct(x.shape, jnp.float32) for path, x in flat.items() if wanted(path)}
    loaded |= mapping.load(open_weights(folder), table, targets)
  return parameters.unflatten(graphdef, {path.removeprefix(prefix): x for path, x in loaded.items()})


def our_decoder(folder, lora: LoraConfig = LoraConfig(), adapter=None) -> Decoder:
  config = llama.read_config(folder)
  module = nnx.eval_shape(lambda: Decoder(config, lora, dtype="float32", remat="none", rngs=nnx.Rngs(0)))
  sources = [(folder, llama.table(config), lambda path: "lora/" not in path)]
  if adapter is not None:
    sources.append((adapter, peft_table.table(lora), lambda path: "lora/" in path))
  return fill(module, "decoder/", sources)


def our_logits(decoder: Decoder, ids: np.ndarray) -> np.ndarray:
  places = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
  return np.asarray(decoder.logits(decoder(decoder.embed(jnp.asarray(ids)), places, jnp.ones_like(places))))


def test_the_shipped_tower_gives_transformers_features():
  import torch
  from transformers import CLIPVisionModel

  config = clip.read_config(CLIP)
  module = nnx.eval_shape(lambda: VisionTower(config, dtype="float32", rngs=nnx.Rngs(0)))
  tower = fill(module, "vision/", [(CLIP, clip.table(config), lambda path: True)])
  picture = np.random.default_rng(0).integers(0, 256, (2, config.image_size, config.image_size, 3), dtype=np.uint8)
  pixels = images.normalise(picture, config.mean, config.std)
  model = CLIPVisionModel.from_pretrained(CLIP, dtype=torch.float32)
  with torch.no_grad():
    output = model(torch.from_numpy(np.moveaxis(pixels, -1, 1).copy()), output_hidden_states=True)
  expected = output.hidden_states[-2][:, 1:].numpy()
  # float32 sums in another order, five layers deep
  np.testing.assert_allclose(
    np.asarray(tower(tower.normalise(jnp.asarray(patchify(picture, 14))))), expected, atol=1e-4 * np.abs(expected).max()
  )


def test_the_shipped_decoder_gives_transformers_logits_and_answers():
  import torch
  from transformers import LlamaForCausalLM

  model = LlamaForCausalLM.from_pretrained(LLAMA, dtype=torch.float32)
  decoder = our_decoder(LLAMA)
  ids = np.random.default_rng(0).integers(3, decoder.config.vocab_size, (2, 17))
  with torch.no_grad():
    expected = model(torch.from_numpy(ids)).logits.numpy()
    answer = model.generate(torch.from_numpy(ids[:1]), max_new_tokens=8, do_sample=False)[0, 17:].tolist()
  np.testing.assert_allclose(our_logits(decoder, ids), expected, atol=1e-4 * np.abs(expected).max())
  ours = ids[:1]
  for token in answer:
    step = int(our_logits(decoder, ours)[0, -1].argmax())
    assert step == token
    ours = np.concatenate([ours, [[step]]], axis=1)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_checkpoints_that_torch_wrote_are_read_without_it(tmp_path, dtype):
  import torch
  from transformers import LlamaConfig, LlamaForCausalLM

  torch.manual_seed(0)
  config = LlamaConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
  )
  model = LlamaForCausalLM(config).to(getattr(torch, dtype))
  config.save_pretrained(tmp_path)
  torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
  decoder = our_decoder(tmp_path)
  ids = np.random.default_rng(0).integers(0, 96, (2, 11))
  with torch.no_grad():
    expected = model.float()(torch.from_numpy(ids)).logits.numpy()
  np.testing.assert_allclose(our_logits(decoder, ids), expected, atol=1e-5)


def test_an_adapter_that_peft_wrote_gives_its_logits_apart_and_merged(tmp_path):
  import peft
  import torch
  from transformers import LlamaForCausalLM

  torch.manual_seed(0)
  base = LlamaForCausalLM.from_pretrained(LLAMA, dtype=torch.float32)
  targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
  model = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM"))
  for name, parameter in model.named_parameters():
    if "lora_B" in name:
      torch.nn.init.normal_(parameter, std=0.05)
  model.save_pretrained(tmp_path)
  ids = np.random.default_rng(0).integers(3, base.config.vocab_size, (2, 9))
  with torch.no_grad():
    expected = model.eval()(torch.from_numpy(ids)).logits.numpy()
  lora = peft_table.read_config(tmp_path)
  assert (lora.rank, lora.alpha) == (4, 16)
  decoder = our_decoder(LLAMA, lora, tmp_path)
  np.testing.assert_allclose(our_logits(decoder, ids), expected, atol=1e-4 * np.abs(expected).max())
  np.testing.assert_allclose(our_logits(lora_lib.merge(decoder), ids), expected, atol=1e-4 * np.abs(expected).max())
