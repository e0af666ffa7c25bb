"""Against transformers and PEFT: SigLIP, Qwen2, whole LLaVA checkpoints, adapters of uneven rank and scale."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from mllm_jax import parameters
from mllm_jax.config import LoraConfig
from mllm_jax.data.images import normalise
from mllm_jax.data.patches import patchify
from mllm_jax.models.decoder import Decoder
from mllm_jax.models.lora import merge
from mllm_jax.models.projectors.mlp import MlpProjector
from mllm_jax.models.vision import VisionTower
from mllm_jax.weights import clip, llama, mapping, mlp, qwen2, siglip
from mllm_jax.weights import peft as peft_table
from mllm_jax.weights.io import open_weights

pytestmark = pytest.mark.torch
VOCABULARY = 96
LANGUAGE = dict(
  vocab_size=VOCABULARY,
  hidden_size=32,
  intermediate_size=48,
  num_hidden_layers=3,
  num_attention_heads=4,
  num_key_value_heads=2,
)
SIGLIP = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, patch_size=14)
LORA_B_STD = 0.05


def close(ours, expected, relative=1e-4):
  """float32 sums in another order, some layers deep."""
  np.testing.assert_allclose(np.asarray(ours), expected, rtol=0, atol=relative * np.abs(expected).max())


def shaken(model):
  """`model` with every number drawn anew, so that no bias is zero and no norm's scale one."""
  import torch

  generator = torch.Generator().manual_seed(1)
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
  return model.eval()


def fill(make, prefix, sources):
  """The module that `make` describes with what each (weights, table, which paths) of `sources` gives."""
  graphdef, flat = parameters.flatten(nnx.eval_shape(make))
  loaded = {}
  for weights, table, wanted in sources:
    targets = {prefix + path: jax.ShapeDtypeStruct(x.shape, jnp.float32) for path, x in flat.items() if wanted(path)}
    loaded |= mapping.load(weights, table, targets)
  return parameters.unflatten(graphdef, {path.removeprefix(prefix): x for path, x in loaded.items()})


def our_tower(config, weights, table, any_aspect=False) -> VisionTower:
  make = lambda: VisionTower(config, any_aspect=any_aspect, dtype="float32", rngs=nnx.Rngs(0))
  return fill(make, "vision/", [(weights, table, lambda path: True)])


def our_decoder(config, weights, table, adapter=(LoraConfig(), None)) -> Decoder:
  lora, adapter_weights = adapter
  make = lambda: Decoder(config, lora, dtype="float32", remat="none", rngs=nnx.Rngs(0))
  sources = [(weights, table, lambda path: "lora/" not in path)]
  if adapter_weights is not None:
    sources.append((adapter_weights, peft_table.table(lora), lambda path: "lora/" in path))
  return fill(make, "decoder/", sources)


def our_logits(decoder: Decoder, ids: np.ndarray) -> np.ndarray:
  places = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
  return np.asarray(decoder.logits(decoder(decoder.embed(jnp.asarray(ids)), places, jnp.ones_like(places))))


def some_ids(rows=2, length=13):
  return np.random.default_rng(0).integers(0, VOCABULARY, (rows, length))


def torch_logits(model, ids):
  import torch

  with torch.no_grad():
    return model.eval()(torch.from_numpy(ids)).logits.float().numpy()


# 45 pixels are three patches of 14 and a rest that belongs to none, as SigLIP-so400m's 384 are 27 and a rest.
@pytest.mark.parametrize("image_size, select_layer", [(42, -2), (45, -2), (42, 1), (42, -1)])
def test_siglip_gives_transformers_features(tmp_path, image_size, select_layer):
  import torch
  from transformers import SiglipVisionConfig, SiglipVisionModel

  torch.manual_seed(0)
  model = shaken(SiglipVisionModel(SiglipVisionConfig(**SIGLIP, image_size=image_size)))
  model.save_pretrained(tmp_path)
  config = dataclasses.replace(siglip.read_config(tmp_path), select_layer=select_layer)
  tower = our_tower(config, open_weights(tmp_path), siglip.table(config))
  pictures = np.random.default_rng(0).integers(0, 256, (2, image_size, image_size, 3), dtype=np.uint8)
  images = normalise(pictures, config.mean, config.std)
  # transformers' own hook on the last layer: its hidden_states[-1] is normed in some versions.
  seen = {}
  encoder = getattr(model, "vision_model", model).encoder
  hooks = [
    layer.register_forward_hook(lambda _, inputs, output, place=place: seen.update({place: output}))
    for place, layer in enumerate(encoder.layers, start=1)
  ]
  with torch.no_grad():
    output = model(torch.from_numpy(np.moveaxis(images, -1, 1).copy()), output_hidden_states=True)
  for hook in hooks:
    hook.remove()
  expected = seen[config.layers_used]
  expected = (expected[0] if isinstance(expected, tuple) else expected).numpy()
  close(tower(patchify(images, 14)), expected)
  if select_layer == -2:
    np.testing.assert_array_equal(output.hidden_states[-2].numpy(), expected)


@pytest.mark.parametrize("image_size", [56, 58])
def test_siglip_at_any_aspect_is_transformers_interpolating_its_positions(tmp_path, image_size):
  import torch
  from transformers import SiglipVisionConfig, SiglipVisionModel

  torch.manual_seed(0)
  model = shaken(SiglipVisionModel(SiglipVisionConfig(**SIGLIP, image_size=image_size)))
  model.save_pretrained(tmp_path)
  config = siglip.read_config(tmp_path)
  tower = our_tower(config, open_weights(tmp_path), siglip.table(config), any_aspect=True)
  draw = np.random.default_rng(0)
  grids, features, patches = [(2, 7), (4, 4), (6, 1)], [], np.full((3, 17, 3 * 14**2), 9.0, np.float32)
  for crop, (rows, columns) in enumerate(grids):
    image = draw.normal(size=(rows * 14, columns * 14, 3)).astype(np.float32)
    patches[crop, : rows * columns] = patchify(image, 14)
    pixels = torch.from_numpy(np.moveaxis(image, -1, 0)[None].copy())
    with torch.no_grad():
      output = model(pixels, output_hidden_states=True, interpolate_pos_encoding=True)
    features.append(output.hidden_states[-2][0].numpy())
  found = np.asarray(tower(patches, np.array(grids, np.int32)))
  for crop, expected in enumerate(features):
    close(found[crop, : len(expected)], expected)


def test_the_vision_half_of_a_siglip_model(tmp_path):
  import torch
  from transformers import SiglipConfig, SiglipModel

  torch.manual_seed(0)
  text = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=50)
  model = shaken(SiglipModel(SiglipConfig(text_config=text, vision_config=SIGLIP | {"image_size": 42})))
  model.save_pretrained(tmp_path)
  config = siglip.read_config(tmp_path)
  tower = our_tower(config, open_weights(tmp_path), siglip.table(config))
  images = np.random.default_rng(0).normal(size=(1, 42, 42, 3)).astype(np.float32)
  with torch.no_grad():
    pixels = torch.from_numpy(np.moveaxis(images, -1, 1).copy())
    expected = model.vision_model(pixels, output_hidden_states=True).hidden_states[-2].numpy()
  close(tower(jnp.asarray(patchify(images, 14))), expected)


@pytest.mark.parametrize("tied", [False, True])
def test_qwen2_gives_transformers_logits_and_answers(tmp_path, tied):
  import torch
  from transformers import Qwen2Config, Qwen2ForCausalLM

  torch.manual_seed(0)
  rope = {"rope_type": "default", "rope_theta": 1e6}
  settings = Qwen2Config(**LANGUAGE, tie_word_embeddings=tied, rope_parameters=rope)
  model = shaken(Qwen2ForCausalLM(settings))
  model.save_pretrained(tmp_path)
  config = qwen2.read_config(tmp_path)
  assert (config.rope_theta, config.tied_embeddings, config.attention_bias) == (1e6, tied, True)
  decoder = our_decoder(config, open_weights(tmp_path), qwen2.table(config))
  ids = some_ids()
  close(our_logits(decoder, ids), torch_logits(model, ids))
  with torch.no_grad():
    whole = model.generate(torch.from_numpy(ids[:1]), max_new_tokens=6, min_new_tokens=6, do_sample=False)[0].tolist()
  ours = ids[:1]
  for token in whole[ids.shape[1] :]:
    assert int(our_logits(decoder, ours)[0, -1].argmax()) == token
    ours = np.concatenate([ours, [[token]]], axis=1)


def test_qwen2_exported_is_read_by_transformers(tmp_path):
  import torch
  from transformers import Qwen2Config, Qwen2ForCausalLM

  torch.manual_seed(0)
  model = shaken(Qwen2ForCausalLM(Qwen2Config(**LANGUAGE)))
  model.save_pretrained(tmp_path / "theirs")
  config = qwen2.read_config(tmp_path / "theirs")
  decoder = our_decoder(config, open_weights(tmp_path / "theirs"), qwen2.table(config))
  arrays = {"decoder/" + path: np.asarray(x) for path, x in parameters.flatten(decoder)[1].items()}
  exported = mapping.export(arrays, qwen2.table(config))
  theirs = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
  assert exported.keys() == theirs.keys()
  for name, tensor in exported.items():
    np.testing.assert_array_equal(tensor, theirs[name])


def adapted(base, **settings):
  """(a PEFT model on `base` whose B are not zero)."""
  import peft
  import torch

  torch.manual_seed(0)
  model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
  for name, parameter in model.named_parameters():
    if "lora_B" in name:
      torch.nn.init.normal_(parameter, std=LORA_B_STD)
  return model


UNEVEN = {
  "patterns": dict(
    r=4,
    lora_alpha=16,
    target_modules="all-linear",
    rank_pattern={"q_proj": 2, r"layers\.[12]\.mlp\.down_proj": 6, "^model.layers.0.self_attn.v_proj": 1},
    alpha_pattern={"down_proj": 3, "layers.1.self_attn.k_proj": 40, r".*\.0\.mlp\.up_proj": 5},
  ),
  "rslora": dict(r=4, lora_alpha=16, target_modules=["q_proj", "up_proj"], use_rslora=True),
  "rslora with patterns": dict(
    r=3,
    lora_alpha=7,
    target_modules=r".*\.(v_proj|o_proj|gate_proj)",
    use_rslora=True,
    rank_pattern={"o_proj": 5},
    alpha_pattern={"layers.2.mlp.gate_proj": 1},
  ),
  "some layers": dict(r=2, lora_alpha=4, target_modules=["v_proj", "down_proj"], layers_to_transform=[0, 1]),
}


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("name", UNEVEN)
def test_uneven_adapters_give_pefts_logits_and_come_back(tmp_path, name, family):
  import peft
  import torch
  from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

  torch.manual_seed(0)
  kind = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}[family]
  base = shaken(kind[1](kind[0](**LANGUAGE)))
  base.save_pretrained(tmp_path / "base")
  model = adapted(base, **UNEVEN[name])
  model.save_pretrained(tmp_path / "adapter")
  ids = some_ids()
  expected, plain = torch_logits(model, ids), torch_logits(model.unload(), ids)
  assert np.abs(expected - plain).max() > 0.02 * np.abs(expected).max()  # or the comparison would say nothing

  reader = {"llama": llama, "qwen2": qwen2}[family]
  config, weights = reader.read_config(tmp_path / "base"), open_weights(tmp_path / "base")
  adapter = peft_table.open_adapter(tmp_path / "adapter", config.layers)
  decoder = our_decoder(config, weights, reader.table(config), adapter)
  close(our_logits(decoder, ids), expected)
  close(our_logits(merge(decoder), ids), expected)

  lora, flat = adapter[0], parameters.flatten(decoder)[1]
  arrays = {"decoder/" + path: np.asarray(x) for path, x in flat.items() if "/lora/" in path}
  (tmp_path / "again").mkdir()
  save_file(mapping.export(arrays, peft_table.table(lora)), tmp_path / "again" / "adapter_model.safetensors")
  content = peft_table.config_file(lora, str(tmp_path / "base"))
  (tmp_path / "again" / "adapter_config.json").write_text(json.dumps(content))
  fresh = kind[1].from_pretrained(tmp_path / "base", dtype=torch.float32)
  close(torch_logits(peft.PeftModel.from_pretrained(fresh, tmp_path / "again"), ids), expected)


def test_padding_stays_zero_in_training(tmp_path):
  import torch
  from transformers import LlamaConfig, LlamaForCausalLM

  torch.manual_seed(0)
  base = shaken(LlamaForCausalLM(LlamaConfig(**LANGUAGE)))
  base.save_pretrained(tmp_path / "base")
  adapted(base, **UNEVEN["patterns"]).save_pretrained(tmp_path / "adapter")
  config = llama.read_config(tmp_path / "base")
  adapter = peft_table.open_adapter(tmp_path / "adapter", config.layers)
  decoder = our_decoder(config, open_weights(tmp_path / "base"), llama.table(config), adapter)
  ids, places = jnp.asarray(some_ids()), jnp.broadcast_to(jnp.arange(13), (2, 13))
  loss = lambda d: jnp.square(d.logits(d(d.embed(ids), places, jnp.ones_like(places)))).sum()
  gradient = parameters.flatten(jax.grad(loss)(decoder))[1]
  value = parameters.flatten(decoder)[1]
  for path in (path for path in value if "/lora/" in path):
    assert not np.asarray(gradient[path])[np.asarray(value[path]) == 0].any(), path
  assert np.abs(gradient["layers/q_proj/lora/a"]).max() > 0


LLAVA = [("clip", "llama"), ("siglip", "qwen2")]


def tiny_llava(vision, language):
  """A LlavaForConditionalGeneration of transformers."""
  import torch
  from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
  )

  torch.manual_seed(0)
  vision_config = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}[vision](**SIGLIP, image_size=42)
  text_config = {"llama": LlamaConfig, "qwen2": Qwen2Config}[language](**LANGUAGE)
  config = LlavaConfig(vision_config=vision_config, text_config=text_config, image_token_index=VOCABULARY - 1)
  return shaken(LlavaForConditionalGeneration(config))


@pytest.mark.parametrize("vision, language", LLAVA)
@pytest.mark.parametrize("source", ["as saved", "as in memory"])
def test_the_parts_of_transformers_own_llava(tmp_path, vision, language, source):
  """Each part reads its tensors and the nested configuration out of one whole checkpoint."""
  import torch

  model = tiny_llava(vision, language)
  model.save_pretrained(tmp_path)
  if source == "as in memory":
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors")
  content = json.loads((tmp_path / "config.json").read_text())
  weights, where = open_weights(tmp_path), str(tmp_path / "config.json")
  tower_reader, reader = {"clip": clip, "siglip": siglip}[vision], {"llama": llama, "qwen2": qwen2}[language]
  tower_config = tower_reader.parse(content["vision_config"], f"{where}, vision_config")
  config = reader.parse(content["text_config"], f"{where}, text_config")
  tower = our_tower(tower_config, weights, tower_reader.table(tower_config))
  decoder = our_decoder(config, weights, reader.table(config))
  make = lambda: MlpProjector(tower_config.width, config.width, rngs=nnx.Rngs(0))
  projector = fill(make, "projector/", [(weights, mlp.table(), lambda path: True)])

  images = np.random.default_rng(0).normal(size=(1, 42, 42, 3)).astype(np.float32)
  pixels = torch.from_numpy(np.moveaxis(images, -1, 1).copy())
  with torch.no_grad():
    hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
    features = hidden[:, 1:] if vision == "clip" else hidden
    expected = model.model.multi_modal_projector(features).numpy()
    ids = some_ids() % (VOCABULARY - 1)  # no image among them
    expected_logits = torch_logits(model, ids)
  close(projector(tower(jnp.asarray(patchify(images, 14)))), expected)
  close(our_logits(decoder, ids), expected_logits)


def test_an_adapter_on_a_llava_model_there_and_back(tmp_path):
  """PEFT attaches what `config_file` and `table` wrote to the decoder alone, and what it saves is read again."""
  import peft

  model = tiny_llava("clip", "llama")
  model.save_pretrained(tmp_path / "base")
  config = llama.parse(json.loads((tmp_path / "base" / "config.json").read_text())["text_config"], "text_config")
  prefix = "base_model.model.model.language_model."
  lora = LoraConfig(rank=3, alpha=6.0, dropout=0.0, targets=("q_proj", "down_proj"))
  make = lambda: Decoder(config, lora, dtype="float32", remat="none", rngs=nnx.Rngs(0))
  generator = np.random.default_rng(0)
  arrays = {
    "decoder/" + path: generator.normal(0, 0.1, shape.shape).astype(np.float32)
    for path, shape in parameters.flatten(nnx.eval_shape(make))[1].items()
    if "/lora/" in path
  }
  (tmp_path / "adapter").mkdir()
  save_file(mapping.export(arrays, peft_table.table(lora, prefix)), tmp_path / "adapter" / "adapter_model.safetensors")
  content = peft_table.config_file(lora, str(tmp_path / "base"), prefix)
  (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(content))

  ids = some_ids() % (VOCABULARY - 1)
  theirs = peft.PeftModel.from_pretrained(model, tmp_path / "adapter")
  names = [name for name, _ in theirs.named_parameters() if "lora_" in name]
  assert len(names) == 2 * 2 * config.layers and not any("vision" in name for name in names)
  expected = torch_logits(theirs, ids)
  theirs.save_pretrained(tmp_path / "saved")
  for folder in ("adapter", "saved"):
    adapter = peft_table.open_adapter(tmp_path / folder, config.layers)
    assert adapter[0] == lora
    decoder = our_decoder(config, open_weights(tmp_path / "base"), llama.table(config), adapter)
    close(our_logits(decoder, ids), expected)
