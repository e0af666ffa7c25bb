"""Makes the demo's two towers from training scans and texts, and writes them as Hugging Face folders.

    python -m mllm_jax.demo.towers [--out mllm_jax/demo/assets] [--only clip|llama]

They ship with the package, so this need not be run; it takes about half an hour on two cores. Neither tower has seen a
held-out scan, and neither has seen the other: what joins them is left to the projector.
"""

import argparse
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from mllm_jax.config import DecoderConfig, VisionConfig
from mllm_jax.demo import tokenizer, towers_decoder, towers_vision
from mllm_jax.models.decoder import Decoder
from mllm_jax.models.vision import VisionTower
from mllm_jax.weights import clip, llama
from mllm_jax.weights.mapping import export

VISION_STEPS = 2400
DECODER_STEPS = 2600


def write_clip(folder: pathlib.Path, lower: VisionTower, last: towers_vision.LastLayer) -> None:
  """A `CLIPVisionModel` folder, float16: the layers of `lower`, then `last`."""
  config: VisionConfig = towers_vision.CONFIG
  arrays = _arrays("vision", lower)
  top = _arrays("vision/layers", last.layer)
  arrays |= {path: np.concatenate([arrays[path], layer[None]]) for path, layer in top.items()}
  tensors = export(arrays, clip.table(VisionConfig(**vars(config) | {"select_layer": -1})))
  tensors["vision_model.post_layernorm.weight"] = np.asarray(last.norm.scale[...])
  tensors["vision_model.post_layernorm.bias"] = np.asarray(last.norm.bias[...])
  _write(
    folder,
    tensors,
    {
      "architectures": ["CLIPVisionModel"],
      "model_type": "clip_vision_model",
      "hidden_size": config.width,
      "intermediate_size": config.mlp_width,
      "num_hidden_layers": config.layers,
      "num_attention_heads": config.heads,
      "num_channels": 3,
      "image_size": config.image_size,
      "patch_size": config.patch_size,
      "hidden_act": config.activation,
      "layer_norm_eps": config.norm_eps,
      "attention_dropout": 0.0,
      "projection_dim": config.width,
    },
  )
  size = config.image_size
  _write_json(
    folder / "preprocessor_config.json",
    {
      "image_processor_type": "CLIPImageProcessor",
      "do_convert_rgb": True,
      "do_resize": True,
      "size": {"shortest_edge": size},
      "resample": 3,
      "do_center_crop": True,
      "crop_size": {"height": size, "width": size},
      "do_rescale": True,
      "rescale_factor": 1 / 255,
      "do_normalize": True,
      "image_mean": list(config.mean),
      "image_std": list(config.std),
    },
  )


def write_llama(folder: pathlib.Path, decoder: Decoder, model: bytes) -> None:
  """A `LlamaForCausalLM` folder, float16, with its tokenizer."""
  config: DecoderConfig = decoder.config
  _write(
    folder,
    export(_arrays("decoder", decoder), llama.table(config)),
    {
      "architectures": ["LlamaForCausalLM"],
      "model_type": "llama",
      "vocab_size": config.vocab_size,
      "hidden_size": config.width,
      "intermediate_size": config.mlp_width,
      "num_hidden_layers": config.layers,
      "num_attention_heads": config.heads,
      "num_key_value_heads": config.kv_heads,
      "head_dim": config.head_width,
      "hidden_act": "silu",
      "max_position_embeddings": 1024,
      "rms_norm_eps": config.norm_eps,
      "rope_theta": config.rope_theta,
      "attention_bias": False,
      "mlp_bias": False,
      "tie_word_embeddings": config.tied_embeddings,
      "bos_token_id": 1,
      "eos_token_id": 2,
      "pad_token_id": 0,
    },
  )
  _write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})
  tokenizer.write(folder, model)


def _arrays(prefix: str, module: nnx.Module) -> dict[str, np.ndarray]:
  """The module's parameters by path."""
  state = nnx.to_flat_state(nnx.state(module, nnx.Param))
  return {"/".join([prefix, *map(str, path)]): np.asarray(leaf[...]) for path, leaf in state}


def _write(folder: pathlib.Path, tensors: dict[str, np.ndarray], config: dict) -> None:
  folder.mkdir(parents=True, exist_ok=True)
  tensors = {name: np.ascontiguousarray(tensor.astype(np.float16)) for name, tensor in tensors.items()}
  save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
  _write_json(folder / "config.json", config | {"torch_dtype": "float16"})


def _write_json(path: pathlib.Path, content: dict) -> None:
  path.write_text(json.dumps(content, indent=2) + "\n")


def rounded(module: nnx.Module) -> nnx.Module:
  """The module with its parameters rounded to float16, as they are shipped."""
  round_ = lambda x: x.astype(jnp.float16).astype(x.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
  graph, state = nnx.split(module)
  return nnx.merge(graph, jax.tree.map(round_, state))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "assets")
  parser.add_argument("--only", choices=("clip", "llama"))
  arguments = parser.parse_args()
  if arguments.only != "llama":
    lower, last = towers_vision.train(VISION_STEPS)
    write_clip(arguments.out / "clip", lower, last)
    print("linear probes on held-out scans:", towers_vision.probe(rounded(lower)))
  if arguments.only != "clip":
    model = tokenizer.train()
    decoder = towers_decoder.train(model, DECODER_STEPS)
    write_llama(arguments.out / "llama", decoder, model)
    speaker = towers_decoder.Speaker(model)
    print("questions answered from descriptions:", towers_decoder.evaluate(rounded(decoder), speaker, questions=200))


if __name__ == "__main__":
  main()
