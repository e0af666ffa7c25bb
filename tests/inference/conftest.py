"""The released tiny LLaVA-SP with its weights, a tinier random model, and prompts for both."""

import json
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from mllm_jax import parameters
from mllm_jax.batch import Batch
from mllm_jax.config import DecoderConfig, ModelConfig, ProjectorConfig, VisionConfig
from mllm_jax.data import chat, layout
from mllm_jax.data.processor import Processor
from mllm_jax.models.mllm import abstract
from mllm_jax.models.projectors import tokens_per_crop
from mllm_jax.weights import clip, llama, spatial
from mllm_jax.weights.io import open_weights
from mllm_jax.weights.mapping import load

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens" / "sp"

RELEASED = ModelConfig(
  vision=VisionConfig(width=16, layers=3, heads=2, mlp_width=32),
  decoder=DecoderConfig(vocab_size=320, width=64, layers=4, heads=4, kv_heads=4, head_width=16, mlp_width=160),
  projector=ProjectorConfig(conv_width=8), dtype="float32", remat="none")

TINY = ModelConfig(
  vision=VisionConfig(image_size=56, width=16, layers=2, heads=2, mlp_width=32),
  decoder=DecoderConfig(vocab_size=320, width=32, layers=2, heads=2, kv_heads=1, head_width=16, mlp_width=64),
  projector=ProjectorConfig(stride=1, dfi_kernel=2, conv_width=8), dtype="float32", remat="none")


@pytest.fixture(scope="session")
def released(tmp_path_factory):
  """(the released model, the golden arrays)."""
  golden = dict(np.load(GOLDENS / "e2e_crop_dfi.npz"))
  language = dict(np.load(GOLDENS / "llama_mha.npz"))
  folder, flat = tmp_path_factory.mktemp("weights"), {}
  _, targets = parameters.flatten(abstract(RELEASED))
  parts = [("clip.", "vision/", golden, clip.table(RELEASED.vision)), ("w.", "decoder/", language, llama.table(RELEASED.decoder)),
           ("w.", "projector/", golden, spatial.table(RELEASED.projector, RELEASED.vision.grid))]
  for prefix, ours, arrays, table in parts:
    file = folder / f"{ours[:-1]}.safetensors"
    save_file({name[len(prefix):]: array for name, array in arrays.items() if name.startswith(prefix)}, file)
    flat |= load(open_weights(file), table, {path: target for path, target in targets.items() if path.startswith(ours)})
  graphdef, _ = parameters.flatten(abstract(RELEASED))
  return parameters.unflatten(graphdef, flat), golden


@pytest.fixture(scope="session")
def tiny():
  """A random model whose greedy answers vary. Filled by NumPy: compiling the initialisers would take longest of all."""
  rng = np.random.default_rng(3)
  graphdef, shapes = parameters.flatten(abstract(TINY))
  fill = lambda path, shape: np.ones(shape) if path.endswith("scale") else rng.normal(0, 0.3, shape)
  return parameters.unflatten(graphdef, {path: jnp.asarray(fill(path, leaf.shape), jnp.float32) for path, leaf in shapes.items()})


def prompt(ids, pixels=None, places=None, config=TINY) -> Batch:
  """A batch of one row; -200 in `ids` stands for the picture `pixels` (H, W, 3)."""
  size = config.vision.image_size
  encoded = chat.Encoded(np.asarray(ids, np.int32), np.zeros(len(ids), bool))
  row = layout.expand(encoded, [tokens_per_crop(config)] * int((encoded.ids == chat.IMAGE_TOKEN_INDEX).sum()))
  row = layout.pad(row, places or len(row.tokens))
  pixels = np.zeros((size, size, 3), np.uint8) if pixels is None else pixels
  return Batch(*(field[None] for field in row), pixels=pixels[None, None], grids=np.full((1, 1, 2), config.vision.grid, np.int32))


def stack(batches, places) -> Batch:
  """Batches of any length as one, padded to `places`."""
  def join(name):
    fill = -1 if name == "visual_index" else 0
    arrays = [getattr(batch, name) for batch in batches]
    if arrays[0].ndim == 2:
      arrays = [np.pad(array, ((0, 0), (0, places - array.shape[1])), constant_values=fill) for array in arrays]
    return np.concatenate(arrays)

  return Batch(**{name: join(name) for name in Batch.__dataclass_fields__})


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tokenizer")
  shutil.copyfile(GOLDENS / "tiny_spm.model", folder / "tokenizer.model")
  (folder / "tokenizer_config.json").write_text(json.dumps(
    {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True, "unk_token": "<unk>", "bos_token": "<s>",
     "eos_token": "</s>"}))
  (folder / "config.json").write_text('{"model_type": "llama"}')
  return chat.load_tokenizer(str(folder))


@pytest.fixture(scope="session")
def processor(tokenizer):
  return Processor(tokenizer, TINY.vision, tokens_per_crop(TINY), "vicuna_v1", 256, 1)
