"""Tokens a second of answers, beside transformers' `generate` on the same random decoder in float32.

Prompts of text alone, all of one length, whose answers nothing ends early; a turn is the whole of it, the prompts'
reading included. The two take turns, and must give the same tokens. `--spatial` instead tells what LLaVA-SP's six
tokens cost an answer: of the FLOPs of LLaVA-1.5-7B's (tower, projector, prompt and answer), and of the time of two
models of the size asked for with the same tower and decoder.
"""

import argparse
import dataclasses
import statistics
import time
from typing import Any

import jax
import numpy as np

from mllm_jax import flops, parameters
from mllm_jax.bench import count
from mllm_jax.config import DecoderConfig, ModelConfig, ProjectorConfig, VisionConfig
from mllm_jax.data.processor import Row
from mllm_jax.demo.towers_decoder import config as demo_decoder
from mllm_jax.inference.engine import Engine
from mllm_jax.inference.requests import Request
from mllm_jax.models import projectors
from mllm_jax.models.mllm import Mllm, abstract

MODELS = {
  "demo": demo_decoder(597),
  "300m": DecoderConfig(width=1024, layers=18, heads=16, kv_heads=16, head_width=64, mlp_width=2816),
}
SMALL_TOWER = VisionConfig(image_size=56, width=16, layers=2, heads=2, mlp_width=32)
TOWER = VisionConfig(image_size=336, width=256, layers=6, heads=4, mlp_width=1024)
MLP, SPATIAL = ProjectorConfig(kind="mlp2x_gelu"), ProjectorConfig(kind="spatial", dfi_kernel=16, conv_width=512)


class Endless:
  """In place of a processor: no token ends an answer, and none has a text."""

  end_id, end_ids = -1, ()

  def __init__(self, max_length: int):
    self.tokenizer, self.max_length = self, max_length

  def decode(self, ids) -> str:
    return ""


def random_model(config: ModelConfig) -> Mllm:
  """Filled by NumPy: compiling the initialisers would take longest of all."""
  draw = np.random.default_rng(0)
  graphdef, shapes = parameters.flatten(abstract(config))
  fill = lambda path, x: (
    np.ones(x.shape, np.float32)
    if path.endswith("scale")
    else draw.standard_normal(x.shape, np.float32) / np.float32(np.sqrt(x.shape[-2] if x.ndim > 1 else 100))
  )
  return parameters.unflatten(graphdef, {path: jax.device_put(fill(path, x)) for path, x in shapes.items()})


def text_prompt(ids: np.ndarray) -> Row:
  """A prompt without a picture."""
  count = len(ids)
  zeros = lambda dtype: np.zeros(count, dtype)
  places = ids.astype(np.int32), zeros(np.int32), zeros(np.float32), np.ones(count, np.int32), np.arange(count)
  return Row(*places, np.full(count, -1), np.zeros((1, 1, 1), np.uint8), np.zeros((1, 2), np.int32))


def transformers_decoder(model: Mllm) -> Any:
  """The decoder as transformers' LlamaForCausalLM."""
  import torch
  from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

  config = model.config.decoder
  theirs = LlamaForCausalLM(
    LlamaConfig(
      vocab_size=config.vocab_size,
      hidden_size=config.width,
      intermediate_size=config.mlp_width,
      num_hidden_layers=config.layers,
      num_attention_heads=config.heads,
      num_key_value_heads=config.kv_heads,
      head_dim=config.head_width,
      rope_theta=config.rope_theta,
      rms_norm_eps=config.norm_eps,
      max_position_embeddings=config.max_positions,
      tie_word_embeddings=config.tied_embeddings,
    )
  ).eval()
  flat = {path: np.asarray(x) for path, x in parameters.flatten(model.decoder)[1].items()}
  weights = {"model.embed_tokens.weight": flat["embedding"], "model.norm.weight": flat["norm/scale"]}
  weights["lm_head.weight"] = flat["head"].T
  blocks = {name: "self_attn" for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
  blocks |= {name: "mlp" for name in ("gate_proj", "up_proj", "down_proj")}
  norms = {"input_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm"}
  for l in range(config.layers):
    start = f"model.layers.{l}."
    weights |= {f"{start}{block}.{name}.weight": flat[f"layers/{name}/kernel"][l].T for name, block in blocks.items()}
    weights |= {f"{start}{theirs_}.weight": flat[f"layers/{ours}/scale"][l] for ours, theirs_ in norms.items()}
  theirs.load_state_dict({name: torch.tensor(np.ascontiguousarray(x)) for name, x in weights.items()})
  theirs.generation_config = GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)
  return theirs


def decode(name: str, batch: int, prompt: int, tokens: int, repeat: int) -> dict[str, list[float]]:
  """{whose: tokens a second of each turn}. Raises RuntimeError where the two differ in their tokens."""
  import torch

  model = random_model(ModelConfig(vision=SMALL_TOWER, decoder=MODELS[name], projector=MLP, dtype="float32"))
  theirs = transformers_decoder(model)
  ids = np.random.default_rng(1).integers(3, MODELS[name].vocab_size, (batch, prompt))
  requests = [Request(text_prompt(row), tokens) for row in ids]
  engine = Engine(model, Endless(prompt + tokens), rows=batch)

  def ask_theirs():
    with torch.inference_mode():
      given = torch.tensor(ids)
      return theirs.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=tokens)[:, prompt:].numpy()

  sides = {"ours": lambda: np.array([a.ids for a in engine.answer(requests)]), "transformers": ask_theirs}
  first = {whose: ask() for whose, ask in sides.items()}  # compiles, too
  if not np.array_equal(*first.values()):
    same = (first["ours"] == first["transformers"]).mean()
    raise RuntimeError(f"only {same:.1%} of the tokens are the same")
  rates = {whose: [] for whose in sides}
  for _ in range(repeat):
    for whose, ask in sides.items():
      start = time.perf_counter()
      ask()
      rates[whose].append(batch * tokens / (time.perf_counter() - start))
  return rates


def answer_flops(projector: ProjectorConfig, text: int, tokens: int) -> float:
  """Of LLaVA-1.5-7B's answer of so many tokens to a question of so many about one picture."""
  config = ModelConfig(projector=projector)
  shapes = parameters.flatten(abstract(config))[1]
  patches = config.vision.grid**2
  places = projectors.tokens_per_crop(config) + text + tokens - 1  # the last token is not read any more
  work = flops.Work(places, places * (places + 1) / 2, tokens, 1, patches, (patches + config.vision.class_token) ** 2)
  return flops.step_flops(config, shapes, dict.fromkeys(shapes, 0.0), work)


def spatial_seconds(name: str, text: int, tokens: int, repeat: int) -> dict[str, list[float]]:
  """{projector: seconds for an answer about a new picture, of each turn}."""
  draw = np.random.default_rng(2)
  sides = {}
  for label, projector in {"LLaVA-1.5": MLP, "LLaVA-SP": dataclasses.replace(SPATIAL, conv_width=128)}.items():
    model = random_model(ModelConfig(vision=TOWER, decoder=MODELS[name], projector=projector, dtype="float32"))
    visual = projectors.tokens_per_crop(model.config)
    sides[label] = Engine(model, Endless(4096), rows=1), visual
  seconds = {label: [] for label in sides}
  for turn in range(repeat + 1):
    for label, (engine, visual) in sides.items():
      row = text_prompt(draw.integers(3, 500, visual + text))
      patches = draw.integers(0, 256, (1, TOWER.grid**2, TOWER.patch_values), np.uint8)
      index = np.where(np.arange(visual + text) < visual, np.arange(visual + text), -1)
      row = row._replace(visual_index=index, patches=patches, grids=np.full((1, 2), TOWER.grid, np.int32))
      start = time.perf_counter()
      engine.answer([Request(row, tokens)])
      if turn:  # the first one compiles
        seconds[label].append(time.perf_counter() - start)
  return seconds


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(prog="python -m mllm_jax.bench decode", description=__doc__)
  parser.add_argument(
    "--model", choices=list(MODELS), default="demo", help="whose size the decoder has (default: demo)"
  )
  parser.add_argument("--batch", default="1,16", help="prompts at once, several with commas (default: 1,16)")
  parser.add_argument("--prompt", type=count, default=64, help="tokens of a prompt (default: 64)")
  parser.add_argument("--tokens", type=count, default=64, help="tokens of an answer (default: 64)")
  parser.add_argument("--repeat", type=count, default=5, help="turns of each (default: 5)")
  parser.add_argument("--spatial", action="store_true", help="what LLaVA-SP's six tokens cost")
  options = parser.parse_args(argv)
  if options.spatial:
    full = {kind: answer_flops(each, options.prompt, options.tokens) for kind, each in (("mlp", MLP), ("sp", SPATIAL))}
    print(f"7B, FLOPs of an answer: {full['mlp'] / 1e12:.3f}e12, LLaVA-SP's {full['sp'] / full['mlp'] - 1:+.2%}")
    seconds = spatial_seconds(options.model, options.prompt, options.tokens, options.repeat)
    base, spatial = (statistics.median(each) for each in seconds.values())
    print(f"{options.model}, seconds of an answer: {base:.3f}, LLaVA-SP's {spatial / base - 1:+.2%}")
    return 0
  for batch in map(int, options.batch.split(",")):
    rates = decode(options.model, batch, options.prompt, options.tokens, options.repeat)
    ours, theirs = (statistics.median(each) for each in rates.values())
    ratios = sorted(a / b for a, b in zip(*rates.values()))
    print(f"{options.model}, batch {batch:3d}: {ours:8.1f} tokens/s, transformers {theirs:8.1f}", end="")
    print(f", ratio {ours / theirs:5.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
  return 0
