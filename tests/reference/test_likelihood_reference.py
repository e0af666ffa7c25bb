"""Likelihoods of given answers against transformers in float64, on an exported model."""

import numpy as np
import pytest
from export_cases import MODELS, pictures, write_tokenizers

from mllm_jax import convert, parameters
from mllm_jax.config import ModelConfig
from mllm_jax.data import chat, images
from mllm_jax.data.aspects import Square
from mllm_jax.data.patches import unpatchify
from mllm_jax.data.processor import Processor
from mllm_jax.data.records import Turn
from mllm_jax.inference.engine import Engine
from mllm_jax.inference.likelihood import answer_row
from mllm_jax.models import projectors
from mllm_jax.models.mllm import abstract
from mllm_jax.weights import folder
from mllm_jax.weights.tensors import InMemory

pytestmark = pytest.mark.torch
KIND = "spm_new"
ANSWERS = ("yes", "two dogs and a cat", "no")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
  """(transformers' folder, our model, what makes its rows)."""
  workspace, config = tmp_path_factory.mktemp("exports"), MODELS[KIND]
  tokenizer_folder = write_tokenizers(workspace / "tokenizers")[KIND]
  model = random_model(config)
  parts = {"vision": config.vision, "decoder": config.decoder, "projector": config.projector}
  arrays = {path: np.asarray(value) for path, value in parameters.flatten(model)[1].items()}
  folder.write(workspace / "stored", folder.Manifest(parts, "vicuna_v1"), InMemory(arrays), str(tokenizer_folder))
  given = [f"--checkpoint={workspace / 'stored'}", "--format=hf", f"--out={workspace / 'exported'}"]
  assert convert.main(["export", *given]) == 0
  aspect = Square(config.vision, projectors.tokens_per_crop(config))
  return (
    workspace / "exported",
    model,
    Processor(chat.load_tokenizer(str(tokenizer_folder)), aspect, "vicuna_v1", 384, 1),
  )


def random_model(config: ModelConfig):
  draw = np.random.default_rng(0)
  graphdef, shapes = parameters.flatten(abstract(config))
  arrays = {
    path: (draw.normal(size=x.shape) * 0.3 + path.endswith("scale")).astype(np.float32) for path, x in shapes.items()
  }
  return parameters.unflatten(graphdef, arrays)


def test_likelihoods_are_those_of_transformers(exported):
  import torch
  from transformers import LlavaForConditionalGeneration

  path, model, processor = exported
  (_, picture), *_ = sorted(pictures().items())
  asked = [([Turn("human", "<image>\nHow many?")], [picture]), ([Turn("human", "How many legs has a dog?")], [])]
  rows = [answer_row(processor, [*turns, Turn("gpt", text)], shown) for turns, shown in asked for text in ANSWERS]
  found = Engine(model, processor, rows=4).likelihoods(rows)

  theirs = LlavaForConditionalGeneration.from_pretrained(path, dtype=torch.float64).eval()
  vision = processor.vision
  for row, likelihood in zip(rows, found):
    shown = [
      unpatchify(patches, grid, vision.patch_size) for patches, grid in zip(row.patches, row.grids) if grid.any()
    ]
    pixels = images.normalise(np.stack(shown), vision.mean, vision.std).transpose(0, 3, 1, 2) if shown else None
    ids = torch.tensor(np.where(row.visual_index >= 0, theirs.config.image_token_id, row.tokens), dtype=torch.int64)
    with torch.no_grad():
      values = None if pixels is None else torch.tensor(pixels, dtype=torch.float64)
      logits = theirs(input_ids=ids[None], pixel_values=values).logits[0, :, : model.config.decoder.vocab_size]
    places = torch.tensor(np.flatnonzero(row.loss_weights))
    expected = torch.log_softmax(logits[places], dim=-1)[torch.arange(len(places)), ids[places + 1]].sum().item()
    # float32 of some hundred operations behind one another, against float64
    np.testing.assert_allclose(likelihood.log_probability, expected, rtol=2e-4)
    assert likelihood.greedy == bool((logits[places].argmax(dim=-1) == ids[places + 1]).all())
  assert len({round(each.log_probability, 3) for each in found}) == len(found)
