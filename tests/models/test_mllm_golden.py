"""The whole model against the released one: pixels and ids in; embeddings, logits, loss, gradients and answers out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import released
from flax import nnx

from mllm_jax import parameters, recipes
from mllm_jax.batch import NEWLINE, Batch
from mllm_jax.config import DecoderConfig, ModelConfig, ProjectorConfig, VisionConfig
from mllm_jax.data import layout, tiles
from mllm_jax.data.chat import Encoded
from mllm_jax.data.patches import patchify
from mllm_jax.models import mllm, projectors
from mllm_jax.models.decoder import KVCache
from mllm_jax.weights import clip, llama, mapping, spatial

GRID = 24
PROJECTORS = {
  "e2e_crop_dfi": ProjectorConfig(maps="cropping", dfi_kernel=16, conv_width=8),
  "e2e_pool_sfe": ProjectorConfig(maps="pooling", dfi_kernel=0, conv_width=8),
}


CONFIG = ModelConfig(
  vision=VisionConfig(width=16, layers=3, heads=2, mlp_width=32),
  decoder=DecoderConfig(vocab_size=320, width=64, layers=4, heads=4, kv_heads=4, head_width=16, mlp_width=160),
  dtype="float32",
  remat="none",
)


@pytest.fixture(scope="module", params=PROJECTORS)
def case(request):
  """(name, golden, model with its weights)."""
  golden = released.read(request.param)
  config = dataclasses.replace(CONFIG, projector=PROJECTORS[request.param])
  return request.param, golden, load(config, released.group(golden, "w."))


def load(config, projector):
  """A model with the goldens' towers and the released tensors of a projector."""
  tower = released.group(released.read("e2e_crop_dfi"), "clip.")
  decoder = released.group(released.read("llama_mha"), "w.")
  graphdef, shapes = parameters.flatten(mllm.abstract(config))
  flat = {}
  for prefix, table, arrays in (
    ("vision/", clip.table(config.vision), tower),
    ("projector/", spatial.table(config.projector, GRID), projector),
    ("decoder/", llama.table(config.decoder), decoder),
  ):
    targets = {path: shape for path, shape in shapes.items() if path.startswith(prefix)}
    flat |= mapping.load(released.weights(arrays), table, targets)
  return parameters.unflatten(graphdef, flat)


def make_batch(ids, trained_on, pictures, tokens_per_crop, length):
  """A Batch of rows of ids with -200 for the picture; a row without one has a black crop that is not looked at."""
  rows = []
  for row, trained in zip(ids, trained_on):
    encoded = Encoded(row, trained)
    rows.append(layout.pad(layout.expand(encoded, [tokens_per_crop] * int((row == -200).sum())), length))
  arrays = [np.stack(field) for field in zip(*rows)]
  grids = np.where(np.stack([(row == -200).any() for row in ids])[:, None, None], GRID, 0) * np.ones((1, 1, 2))
  return Batch(*arrays, patches=patchify(pictures[:, None], 14), grids=grids.astype(np.int32))


def golden_batch(golden, model):
  pictures = [released.read(name)["clip.resized_uint8"] for name in ("img_wide640x360", "img_tall300x500")]
  pictures = np.stack([*pictures, np.zeros_like(pictures[0])])
  lengths = golden["attention_mask"].sum(1)
  ids = [row[:count] for row, count in zip(golden["input_ids"], lengths)]
  trained_on = [row[:count] != -100 for row, count in zip(golden["labels"], lengths)]
  tokens = projectors.tokens_per_crop(model.config)
  return make_batch(ids, trained_on, pictures, tokens, int(golden["out.seq_lens"].max()))


def test_embeddings_logits_loss_and_gradients(case):
  name, golden, model = case
  batch = golden_batch(golden, model)
  graphdef, flat = parameters.flatten(model)
  trained = {path: x for path, x in flat.items() if path.startswith("projector/") or path == "decoder/embedding"}

  def loss(trained):
    model = parameters.unflatten(graphdef, flat | trained)
    embeddings = model.embed(batch.tokens, batch.visual_index, model.visual_tokens(batch.patches, batch.grids))
    logits = model.decoder.logits(model.decoder(embeddings, batch.positions, batch.segment_ids))
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch.targets[..., None], axis=-1)[..., 0]
    return (losses * batch.loss_weights).sum() / batch.loss_weights.sum(), (embeddings, logits)

  (value, (embeddings, logits)), gradients = released.jit(jax.value_and_grad(loss, has_aux=True))(trained)
  real = golden["out.attention_mask"]
  assert (real == (batch.segment_ids > 0)).all()
  embeddings, logits = np.asarray(embeddings), np.asarray(logits)[:, golden["logits_positions"]]
  released.check_close(
    f"{name} embeddings", embeddings[real], golden["out.inputs_embeds"][real], relative=0, floor=1e-5
  )
  real = real[:, golden["logits_positions"]]
  released.check_close(f"{name} logits", logits[real], golden["out.logits_at"][real], relative=1e-5)
  released.check_close(f"{name} loss", np.asarray(value), golden["out.loss"], relative=1e-5)

  expected = released.group(golden, "g.")
  embedding = np.asarray(gradients.pop("decoder/embedding"))
  released.check_close(f"{name} embedding", embedding, expected.pop("model.embed_tokens.weight"), relative=1e-4)
  found = mapping.export(jax.device_get(gradients), spatial.table(model.config.projector, GRID))
  assert sorted(found) == sorted(expected)
  size = max(np.abs(gradient).max() for gradient in expected.values())
  for key, gradient in found.items():
    floor = 1e-5 * size if "key_projector" in key and key.endswith("bias") else 0  # zero but for rounding
    released.check_close(f"{name} {key}", gradient, expected[key], relative=1e-4, floor=floor)


def test_greedy_answer(case):
  """Eight tokens of a prompt with a picture: with the cache, by whole rows, and the released answer."""
  _, golden, model = case
  config, steps = model.config.decoder, golden["gen.out"].shape[1] - 1
  ids = golden["gen.prompt"]
  picture = released.read("img_wide640x360")["clip.resized_uint8"][None]
  length = ids.shape[1] - 1 + projectors.tokens_per_crop(model.config)
  batch = make_batch(ids, np.zeros(ids.shape, bool), picture, projectors.tokens_per_crop(model.config), length)
  embeddings = released.jit(lambda m, b: m.embed(b.tokens, b.visual_index, m.visual_tokens(b.patches, b.grids)))(
    model, batch
  )
  cached, first_logits = with_cache(model.decoder, config, embeddings, steps)
  released.check_close("first logits", first_logits, golden["gen.first_logits"], relative=1e-5)
  assert cached == without_cache(model.decoder, embeddings, steps) == golden["gen.out"][0, 1:].tolist()


def test_tiled_images():
  """The released path for pictures of any shape: five crops, a newline after each row of the tiles."""
  golden, picture = released.read("e2e_anyres"), released.read("img_wide640x360")
  weights = released.group(released.read("e2e_crop_dfi"), "w.") | released.group(golden, "w.")
  assert "model.image_newline" in weights
  config = dataclasses.replace(CONFIG, projector=dataclasses.replace(PROJECTORS["e2e_crop_dfi"], image_newline=True))
  model = load(config, weights)
  crops = np.zeros((1, 6, 336, 336, 3), np.uint8)  # with a crop that is not used
  crops[0, :5] = picture["anyres.tiles_uint8"].transpose(0, 2, 3, 1)
  grids = np.full((1, 6, 2), 24, np.int32)
  table = tiles.table_rows(*golden["image_size_wh"], config.vision, projectors.tokens_per_crop(config))
  encoded = Encoded(golden["input_ids"][0].astype(np.int32), golden["input_ids"][0] > 0)
  row = layout.expand(encoded, [len(table)], table_rows=table)
  assert len(row.tokens) == golden["trunc2048.len"]
  embed = released.jit(lambda m, tokens, index, *crops: m.embed(tokens, index, m.visual_tokens(*crops)))
  embeddings = np.asarray(embed(model, row.tokens[None], row.visual_index[None], patchify(crops, 14), grids))
  released.check_close("anyres embeddings", embeddings, golden["out.inputs_embeds"], relative=0, floor=1e-5)


@pytest.mark.parametrize("kind", ["spatial", "mlp2x_gelu"])
def test_the_newline_of_either_projector(kind):
  """A parameter of the projector's, initialised and trained with it, that stands where the layout says."""
  config = dataclasses.replace(CONFIG, projector=dataclasses.replace(PROJECTORS["e2e_crop_dfi"], kind=kind))
  without = parameters.flatten(mllm.abstract(config))[1]
  config = dataclasses.replace(config, projector=dataclasses.replace(config.projector, image_newline=True))
  shapes = parameters.flatten(mllm.abstract(config))[1]
  assert set(shapes) - set(without) == {"projector/image_newline"}
  rates = parameters.match(recipes.parameter_table(projector=1e-3), list(shapes), "parameters")
  assert rates["projector/image_newline"] == 1e-3

  newlines = lambda seed: projectors.make(config, nnx.Rngs(seed)).image_newline[...]
  drawn = np.asarray([newlines(seed) for seed in range(8)])
  assert abs(drawn.std() - 1 / 8) < 0.01 and drawn[0].tolist() != drawn[1].tolist()  # normal over sqrt(D); D is 64

  model = mllm.Mllm(config, rngs=nnx.Rngs(0))
  index, visual = np.array([[-1, 0, NEWLINE, 1]], np.int32), jnp.ones((1, 2, 64)) * jnp.array([[2.0], [3.0]])
  embeddings = np.asarray(model.embed(np.array([[5, 0, 0, 0]], np.int32), index, visual))[0]
  np.testing.assert_array_equal(embeddings[0], np.asarray(model.decoder.embed(np.array([[5]])))[0, 0])
  assert (embeddings[1] == 2).all() and (embeddings[3] == 3).all()
  np.testing.assert_array_equal(embeddings[2], np.asarray(model.projector.image_newline[...]))


def with_cache(decoder, config, embeddings, steps):
  length = embeddings.shape[1]
  extend = released.jit(lambda d, e, p, c: d.extend(e, p, c))
  cache = KVCache.empty(config, config.layers, 1, length + steps, jnp.float32)
  hidden, cache = extend(decoder, embeddings, jnp.arange(length)[None], cache)
  first_logits = np.asarray(decoder.logits(hidden[0, -1]))
  ids = [int(first_logits.argmax())]
  for place in range(length, length + steps - 1):
    hidden, cache = extend(decoder, decoder.embed(jnp.array([ids[-1:]])), jnp.array([[place]]), cache)
    ids.append(int(decoder.logits(hidden[0, -1]).argmax()))
  return ids, first_logits


def without_cache(decoder, embeddings, steps):
  length = embeddings.shape[1]
  row, places = jnp.pad(embeddings, ((0, 0), (0, steps), (0, 0))), jnp.arange(length + steps)[None]
  whole = released.jit(lambda d, e, filled: d(e, places, (places < filled).astype(jnp.int32)))
  ids = []
  for place in range(length, length + steps):
    ids.append(int(decoder.logits(whole(decoder, row, place)[0, place - 1]).argmax()))
    row = row.at[:, place].set(decoder.embed(jnp.array(ids[-1])))
  return ids
