"""Folders of weights: the ones that recipes name, how to get them, and how their JSON files are read."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from mllm_jax import places
from mllm_jax.config import IMAGENET_MEAN, IMAGENET_STD, DecoderConfig, VisionConfig
from mllm_jax.places import Place
from mllm_jax.weights.errors import WeightsError, brief

JSON_VALUES = 4_000_000  # 64 MiB of empty lists would take a gigabyte once parsed


@dataclasses.dataclass(frozen=True)
class Known:
  """A published checkpoint: its repository on the Hugging Face hub and the architecture it holds."""

  repo: str
  config: VisionConfig | DecoderConfig

  def command(self, folder: str | Path) -> str:
    """The command that downloads it into `folder`."""
    return f"hf download {self.repo} --local-dir {folder}"


SIGLIP_L = VisionConfig(
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
QWEN2_7B = DecoderConfig(
  vocab_size=152064,
  width=3584,
  layers=28,
  heads=28,
  kv_heads=4,
  mlp_width=18944,
  rope_theta=1e6,
  norm_eps=1e-6,
  attention_bias=True,
  max_positions=32768,
)
LLAMA3_8B = DecoderConfig(vocab_size=128256, kv_heads=8, mlp_width=14336, rope_theta=5e5, max_positions=8192)
INTERNVIT = VisionConfig(
  image_size=448,
  activation="gelu",
  norm_eps=1e-6,
  select_layer=-1,
  patch_bias=True,
  pre_norm=False,
  layer_scale=True,
  mean=IMAGENET_MEAN,
  std=IMAGENET_STD,
)
PUBLISHED = {
  "clip-vit-large-patch14-336": Known("openai/clip-vit-large-patch14-336", VisionConfig()),
  "siglip-large-patch16-384": Known("google/siglip-large-patch16-384", SIGLIP_L),
  "siglip-large-patch16-256": Known("google/siglip-large-patch16-256", dataclasses.replace(SIGLIP_L, image_size=256)),
  "siglip-base-patch16-512": Known(
    "google/siglip-base-patch16-512",
    dataclasses.replace(SIGLIP_L, image_size=512, width=768, layers=12, heads=12, mlp_width=3072),
  ),
  "siglip-so400m-patch14-384": Known(
    "google/siglip-so400m-patch14-384",
    dataclasses.replace(SIGLIP_L, patch_size=14, width=1152, layers=27, mlp_width=4304),
  ),
  "vicuna-7b-v1.5": Known("lmsys/vicuna-7b-v1.5", DecoderConfig()),
  "vicuna-13b-v1.5": Known(
    "lmsys/vicuna-13b-v1.5", DecoderConfig(width=5120, layers=40, heads=40, kv_heads=40, mlp_width=13824)
  ),
  "internvit-300m-448px": Known("OpenGVLab/InternViT-300M-448px", INTERNVIT),
  "qwen2-0.5b-instruct": Known(
    "Qwen/Qwen2-0.5B-Instruct",
    dataclasses.replace(
      QWEN2_7B,
      vocab_size=151936,
      width=896,
      layers=24,
      heads=14,
      kv_heads=2,
      head_width=64,
      mlp_width=4864,
      tied_embeddings=True,
    ),
  ),
  "qwen2-7b-instruct": Known("Qwen/Qwen2-7B-Instruct", QWEN2_7B),
  "qwen2.5-7b-instruct": Known("Qwen/Qwen2.5-7B-Instruct", QWEN2_7B),
  "mistral-7b-instruct-v0.1": Known(
    "mistralai/Mistral-7B-Instruct-v0.1",
    DecoderConfig(kv_heads=8, mlp_width=14336, sliding_window=4096, max_positions=32768),
  ),
  "mistral-7b-instruct-v0.2": Known(
    "mistralai/Mistral-7B-Instruct-v0.2",
    DecoderConfig(kv_heads=8, mlp_width=14336, rope_theta=1e6, max_positions=32768),
  ),
  "llama-3-8b-instruct": Known("meta-llama/Meta-Llama-3-8B-Instruct", LLAMA3_8B),
  "llama-3.1-8b-instruct": Known(
    "meta-llama/Llama-3.1-8B-Instruct", dataclasses.replace(LLAMA3_8B, rope_factor=8.0, max_positions=131072)
  ),
  "llama-3.2-3b-instruct": Known(
    "meta-llama/Llama-3.2-3B-Instruct",
    dataclasses.replace(
      LLAMA3_8B,
      width=3072,
      layers=28,
      heads=24,
      mlp_width=8192,
      tied_embeddings=True,
      rope_factor=32.0,
      max_positions=131072,
    ),
  ),
}


def lookup(folder: str | Path) -> Known | None:
  """What a folder's name stands for, so that a model can be described before its weights are there; None if unknown."""
  return PUBLISHED.get(Path(folder).name)


def missing(path: Place, sought: str) -> WeightsError:
  """The error for a file or folder that is not there: what was looked for, and how to get it where that is known."""
  path = places.place(path)
  if places.is_remote(path):
    return WeightsError(f"{path} does not exist: looked for {sought}; check the path, and whether the upload finished")
  folder = path if lookup(path) else path.parent
  known = lookup(folder)
  remedy = (
    f"get it with `{known.command(folder)}`"
    if known
    else "check the path, or download the checkpoint with `hf download REPOSITORY --local-dir FOLDER`"
  )
  return WeightsError(f"{path} does not exist: looked for {sought}; {remedy}")


def read_json(path: Place, sought: str) -> dict[str, Any]:
  """The object in a JSON file, local or remote. Raises WeightsError where there is none, saying that `sought` was
  looked for, and for a file above 64 MiB.
  """
  path = places.place(path)
  if not places.is_remote(path) and not path.parent.is_dir():
    raise missing(path.parent, f"a folder with {path.name}, {sought}")
  if not places.is_file(path):
    raise missing(path, sought)
  text = places.read_bytes(path)
  if sum(text.count(mark) for mark in (b",", b"[", b"{")) > JSON_VALUES:
    raise WeightsError(f"{path} has more than {JSON_VALUES} values; is it the right file?")
  try:
    content = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
  except RecursionError as error:
    raise WeightsError(f"{path} cannot be read as JSON (it is nested too deeply); download it again") from error
  except ValueError as error:
    raise WeightsError(f"{path} cannot be read as JSON ({str(error)[:200]}); download it again") from error
  if not isinstance(content, dict):
    raise WeightsError(f"{path} holds a {type(content).__name__} instead of an object; download it again")
  return content


def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
  """A JSON object whose names must differ; JSON itself would let the last one win."""
  content = dict(pairs)
  if len(content) < len(pairs):
    seen = set()
    twice = next(name for name, _ in pairs if name in seen or seen.add(name))
    raise ValueError(f"{brief(twice)} stands there twice")
  return content
