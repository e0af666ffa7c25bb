"""Activations of an answer over the pyramid's levels, against finite differences of its log-probability."""

import jax
import mllm_jax
import numpy as np
import pytest
import tiny_folders
from flax import nnx
from PIL import Image

from mllm_jax import visualize
from mllm_jax.visualization import activation, crops

CELLS = {0: (0, 5, 11), 2: (3, 100, 200)}  # of 4 x 4 patches
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
  path = tiny_folders.write(tmp_path_factory.mktemp("model") / "hiwin", "hiwin")
  return path, *mllm_jax.load(str(path))


def test_they_are_what_finite_differences_say(loaded):
  _, model, processor = loaded
  picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (56, 56, 3), np.uint8))
  pieces = processor.aspect.crops(picture)
  crop = crops.encode(model, pieces, 0)
  assert len(pieces) == 1 and crop.grid == (4, 4)
  asked = activation.ask(processor, picture, "what is it", "a b")
  found, chance, tokens = activation.activations(model, asked, crop)
  assert {level: x.shape for level, x in found.items()} == {0: (4, 4), 2: (16, 16)}
  assert tokens == asked.tokens.tolist() and chance < 0

  @jax.jit
  def log_probability(model, factors):
    batch = asked.batch
    maps = Scaled(model.projector.pyramid)(crop.features, crop.patches, crop.grids, factors)
    visual = model.projector.resampler(maps, crop.grids)
    hidden = model.decoder(model.embed(batch.tokens, batch.visual_index, visual), batch.positions, batch.segment_ids)
    chances = jax.nn.log_softmax(model.decoder.logits(hidden)[0])
    return sum(chances[place, token] for place, token in zip(asked.places, asked.tokens))

  ones = {level: np.ones((1, 4**level * 16), np.float32) for level in found}
  assert log_probability(model, ones) == pytest.approx(chance, rel=1e-5)
  for level, cells in CELLS.items():
    for cell in cells:
      values = []
      for sign in (1, -1):
        factors = {name: x.copy() for name, x in ones.items()}
        factors[level][0, cell] += sign * EPSILON
        values.append(float(log_probability(model, factors)))
      slope = (values[0] - values[1]) / (2 * EPSILON)
      # A difference of two numbers near `chance` in float32, over 0.04.
      noise = 4e-7 * abs(chance) / EPSILON
      assert found[level].ravel()[cell] == pytest.approx(max(slope, 0), rel=0.02, abs=noise)
  assert all((x > 0).any() for x in found.values())


def test_without_a_word_it_is_the_models_own(loaded):
  path, model, processor = loaded
  picture = Image.fromarray(np.zeros((56, 168, 3), np.uint8))
  asked = activation.ask(processor, picture, "what is it", "")
  crop = crops.encode(model, processor.aspect.crops(picture), 2)
  found, chance, tokens = activation.activations(model, asked, crop)
  best = np.asarray(jax.jit(lambda model, batch: model.logits(batch))(model, asked.batch))[0, -1]
  assert tokens == [best.argmax()] and chance == pytest.approx(jax.nn.log_softmax(best).max(), abs=1e-5)
  assert all(np.isfinite(x).all() for x in found.values())


def test_the_page_has_them(loaded, tmp_path):
  image, out = tiny_folders.picture(tmp_path / "wide.png"), tmp_path / "looked"
  options = [f"--model={loaded[0]}", f"--image={image}", f"--out={out}", "--crop=3", "--question=what is <it>"]
  assert visualize.main([*options, "--word=a b"]) == 0
  assert {"asked.png", "activation-0.png", "activation-2.png"} <= {file.name for file in out.iterdir()}
  text = (out / "index.html").read_text()
  assert "Activation of “a b” in crop 3" in text and "what is &lt;it&gt;" in text and "of all activation" in text


def test_what_to_put_right(loaded, tmp_path, capsys):
  image = tiny_folders.picture(tmp_path / "wide.png")
  options = [f"--image={image}", f"--out={tmp_path / 'looked'}"]
  with pytest.raises(SystemExit, match="2"):
    visualize.main([f"--model={loaded[0]}", *options, "--word=a"])
  assert "add --question" in capsys.readouterr().err
  flat = tiny_folders.write(tmp_path / "mlp", "mlp")
  assert visualize.main([f"--model={flat}", *options, "--question=what is it"]) == 2
  assert "have levels, and this one is of 'mlp2x_gelu'" in capsys.readouterr().err
