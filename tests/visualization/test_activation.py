"""Activations of an answer over the pyramid's levels, against finite differences of its log-probability."""

import html

import jax
import numpy as np
import pytest
import tiny_folders
from flax import nnx
from PIL import Image
from released import jit

import mllm_jax
from mllm_jax import visualize
from mllm_jax.visualization import activation, crops

CELLS = {0: (0, 5, 11), 1: (3, 30, 50)}  # of 4 x 4 patches
EPSILON = 2e-2


class Scaled(nnx.Module):
  """A pyramid with one cell of one level scaled."""

  def __init__(self, pyramid: nnx.Module):
    self.pyramid = pyramid

  def __call__(self, features, patches, grids, factors):
    maps = self.pyramid(features, patches, grids)
    return {level: x * factors[level][..., None].astype(x.dtype) for level, x in maps.items()}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
  path = tiny_folders.write(tmp_path_factory.mktemp("model") / "mlp144", "mlp144")
  return path, *mllm_jax.load(str(path))


def test_they_are_what_finite_differences_say(loaded):
  _, model, processor = loaded
  picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (56, 56, 3), np.uint8))
  pieces = processor.aspect.crops(picture)
  crop = crops.encode(model, pieces, 0)
  assert len(pieces) == 1 and crop.grid == (4, 4)
  asked = activation.ask(processor, picture, "what is it", "a b")
  found, chance, tokens = activation.activations(model, asked, crop)
  assert {level: x.shape for level, x in found.items()} == {0: (4, 4), 1: (8, 8)}
  assert tokens == asked.tokens.tolist() and chance < 0

  @jit
  def log_probability(model, batch, crop, factors):
    maps = Scaled(model.projector.pyramid)(crop.features, crop.patches, crop.grids, factors)
    visual = model.projector.resampler(maps, crop.grids)
    hidden = model.decoder(model.embed(batch.tokens, batch.visual_index, visual), batch.positions, batch.segment_ids)
    chances = jax.nn.log_softmax(model.decoder.logits(hidden)[0])
    return sum(chances[place, token] for place, token in zip(asked.places, asked.tokens))

  ones = {level: np.ones((1, 4**level * 16), np.float32) for level in found}
  assert float(log_probability(model, asked.batch, crop, ones)) == pytest.approx(chance, rel=1e-5)
  for level, cells in CELLS.items():
    for cell in cells:
      values = []
      for sign in (1, -1):
        factors = {name: x.copy() for name, x in ones.items()}
        factors[level][0, cell] += sign * EPSILON
        values.append(float(log_probability(model, asked.batch, crop, factors)))
      slope = (values[0] - values[1]) / (2 * EPSILON)
      # A difference of two numbers near `chance` in float32, over 0.04.
      noise = 4e-7 * abs(chance) / EPSILON
      assert found[level].ravel()[cell] == pytest.approx(max(slope, 0), rel=0.02, abs=noise)
  assert all((x > 0).any() for x in found.values())


def test_the_page_has_the_models_own_word_without_one(loaded, tmp_path):
  path, model, processor = loaded
  image, out = tiny_folders.picture(tmp_path / "wide.png"), tmp_path / "looked"
  options = [f"--model={path}", f"--image={image}", f"--out={out}", "--crop=3", "--question=what is <it>"]
  assert visualize.main(options) == 0
  assert {"asked.png", "activation-0.png", "activation-1.png"} <= {file.name for file in out.iterdir()}
  text = (out / "index.html").read_text()
  assert "what is &lt;it&gt;" in text and "of all activation" in text
  asked = activation.ask(processor, Image.open(image), "what is <it>", "")
  logits = np.asarray(jit(lambda model, batch: model.logits(batch))(model, asked.batch))[0, -1].astype(np.float64)
  best = processor.tokenizer.decode([logits.argmax()]).strip()
  chance = np.exp(logits.max()) / np.exp(logits).sum()
  assert f"answers “{best}” with probability {chance:.2g}" in html.unescape(text)


def test_what_to_put_right(loaded, tmp_path, capsys):
  image = tiny_folders.picture(tmp_path / "wide.png")
  options = [f"--image={image}", f"--out={tmp_path / 'looked'}"]
  with pytest.raises(SystemExit, match="2"):
    visualize.main([f"--model={loaded[0]}", *options, "--word=a"])
  assert "add --question" in capsys.readouterr().err
  flat = tiny_folders.write(tmp_path / "mlp", "mlp")
  assert visualize.main([f"--model={flat}", *options, "--question=what is it"]) == 2
  assert "have levels, and this one is of 'mlp2x_gelu'" in capsys.readouterr().err
