"""The vision tower, the decoder and its adapters against transformers and PEFT."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import released
from flax import nnx

from mllm_jax import parameters
from mllm_jax.config import DecoderConfig, LoraConfig, VisionConfig
from mllm_jax.data.patches import patchify
from mllm_jax.models import lora
from mllm_jax.models.decoder import Decoder, KVCache
from mllm_jax.models.vision import VisionTower
from mllm_jax.weights import clip, llama, mapping, peft, siglip


def test_clip_features():
  golden = released.read("clip_tiny")
  config = VisionConfig(width=64, layers=4, heads=4, mlp_width=128)
  tower = nnx.eval_shape(lambda: VisionTower(config, dtype="float32", rngs=nnx.Rngs(0)))
  tower = released.fill(tower, "vision/", clip.table(config), released.group(golden, "w."))
  pixels = released.read("img_wide640x360")
  images = tower.normalise(patchify(pixels["clip.resized_uint8"][None], 14))
  expected = patchify(pixels["clip.pixel_values"].transpose(1, 2, 0), 14)
  np.testing.assert_allclose(images[0], expected, rtol=0, atol=1e-6)
  features = released.jit(lambda tower, images: tower(images))(tower, images)
  released.check_close("clip", np.asarray(features), golden["out.select"], relative=0, floor=1e-5)


def test_clip_features_at_any_aspect():
  """Images of two grids in one batch, beside a crop that is not used."""
  golden = released.read("vit_anyres", released.UHD)
  weights = {f"vision_model.{name}": array for name, array in released.group(golden, "w/").items()}
  half = (0.5, 0.5, 0.5)  # pixels from -1 to 1
  config = VisionConfig(width=32, layers=3, heads=4, mlp_width=64, mean=half, std=half)
  tower = nnx.eval_shape(lambda: VisionTower(config, any_aspect=True, dtype="float32", rngs=nnx.Rngs(0)))
  tower = released.fill(tower, "vision/", clip.table(config), weights)
  grids = np.zeros((3, 2), np.int32)
  patches = np.full((3, 576, 588), 255, np.uint8)  # what stands in the padding changes nothing
  for crop, number in enumerate((0, 3)):
    cut = patchify(golden[f"image{number}_u8"].transpose(1, 2, 0), 14)
    patches[crop, : len(cut)], grids[crop] = cut, golden["grids_hw"][crop]
  run = released.jit(lambda tower, patches, grids: tower(tower.normalise(patches), grids))
  features = np.asarray(run(tower, patches[:, None], grids[:, None]))[:, 0]
  assert np.isfinite(features).all()
  for crop, number in enumerate((0, 3)):
    expected = golden[f"feat{number}"]
    released.check_close(f"crop {crop}", features[crop, : len(expected)], expected, relative=1e-5)
  alone = np.asarray(run(tower, patches[1:2], grids[1:2]))[0]
  np.testing.assert_allclose(alone[:80], features[1, :80], rtol=0, atol=1e-5)

  # A square image of the tower's own size has the features that it has without any of this.
  plain = nnx.eval_shape(lambda: VisionTower(config, dtype="float32", rngs=nnx.Rngs(0)))
  plain = released.fill(plain, "vision/", clip.table(config), weights)
  image = np.random.default_rng(0).integers(0, 256, (1, 576, 588), dtype=np.uint8)
  square = np.asarray(run(tower, image, np.full((1, 2), 24, np.int32)))
  expected = np.asarray(released.jit(lambda tower, patches: tower(tower.normalise(patches)))(plain, image))
  np.testing.assert_allclose(square, expected, rtol=0, atol=1e-5)


def test_siglip_features():
  golden, where = released.read("siglip_tiny"), "siglip_tiny.npz, config_json"
  config = siglip.parse(json.loads(str(golden["config_json"])), where)
  assert (config.grid, config.layers_used, config.width) == (24, 2, 32)
  tower = nnx.eval_shape(lambda: VisionTower(config, dtype="float32", rngs=nnx.Rngs(0)))
  tower = released.fill(tower, "vision/", siglip.table(config), released.group(golden, "w."))
  images = patchify(released.read("img_wide640x360")["siglip.pixel_values"].transpose(1, 2, 0)[None], 16)
  rows = golden["out.rows"]
  features = released.jit(lambda tower, images: tower(images))(tower, images)
  released.check_close("siglip", np.asarray(features)[:, rows], golden["out.select"], relative=0, floor=1e-5)
  # One colour's white is 1 and its black -1.
  np.testing.assert_array_equal(
    tower.normalise(np.array([0, 255], np.uint8)[:, None] * np.ones(3, np.uint8))[:, 0], [-1, 1]
  )
  embedded = tower.patch_embedding(images)
  embedded = np.asarray(embedded + tower.position_embedding[...])[:, rows]
  released.check_close("siglip embeddings", embedded, golden["hidden_0"], relative=0, floor=1e-5)


def test_siglip_features_at_any_aspect():
  """Slices with this tower: crops of two shapes and an unused one in one batch."""
  weights, golden = released.read("siglip_tiny"), released.read("siglip_any_aspect")
  config = siglip.parse(json.loads(str(weights["config_json"])), "siglip_tiny.npz, config_json")
  tower = nnx.eval_shape(lambda: VisionTower(config, any_aspect=True, dtype="float32", rngs=nnx.Rngs(0)))
  tower = released.fill(tower, "vision/", siglip.table(config), released.group(weights, "w."))
  grids = np.concatenate([golden["grids"], np.zeros((1, 2), np.int32)])
  draw = np.random.default_rng(int(golden["seed"]))
  patches = np.full((3, 64, 3 * 16**2), 255, np.uint8)
  for crop, (rows, columns) in enumerate(golden["grids"]):
    image = draw.integers(0, 256, (rows * 16, columns * 16, 3), np.uint8)
    patches[crop, : rows * columns] = patchify(image, 16)
  run = released.jit(lambda tower, patches, grids: tower(tower.normalise(patches), grids))
  features = np.asarray(run(tower, patches, grids))
  assert np.isfinite(features).all()
  for crop in range(2):
    expected = golden[f"features{crop}"]
    released.check_close(f"crop {crop}", features[crop, : len(expected)], expected, relative=0, floor=1e-5)


@pytest.fixture(scope="module", params=["mha", "gqa2"])
def case(request, tmp_path_factory):
  """(name, golden, decoder config, decoder with its weights)."""
  golden = released.read(f"llama_{request.param}")
  folder = tmp_path_factory.mktemp("llama")
  (folder / "config.json").write_text(json.dumps(json.loads(str(golden["config_json"])) | {"model_type": "llama"}))
  config = llama.read_config(folder)
  assert config.kv_heads == {"mha": 4, "gqa2": 2}[request.param]
  return request.param, golden, config, make(golden, config)


def make(golden, config, remat="none"):
  """A decoder with the golden's weights."""
  decoder = nnx.eval_shape(lambda: Decoder(config, LoraConfig(), dtype="float32", remat=remat, rngs=nnx.Rngs(0)))
  return released.fill(decoder, "decoder/", llama.table(config), released.group(golden, "w."))


def adapted(decoder, adapter, remat="none"):
  """(structure, base weights, shapes of the adapters' weights) of a decoder with adapters beside its kernels."""
  make = lambda: Decoder(decoder.config, adapter, dtype="float32", remat=remat, rngs=nnx.Rngs(0))
  graphdef, flat = parameters.flatten(nnx.eval_shape(make))
  return graphdef, parameters.flatten(decoder)[1], {path: shape for path, shape in flat.items() if "/lora/" in path}


def run(decoder, golden):
  """Hidden states and mean loss of the golden's rows."""
  ids, segments = golden["input_ids"].astype(np.int32), golden["attention_mask"].astype(np.int32)
  positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
  logits = decoder.logits(decoder(decoder.embed(ids), positions, segments))
  targets = golden["labels"][:, 1:]
  picked = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), np.maximum(targets, 0)[..., None], axis=-1)[..., 0]
  return -(picked * (targets >= 0)).sum() / (targets >= 0).sum(), logits


def test_decoder(case):
  name, golden, config, decoder = case
  (loss, logits), gradient = released.jit(jax.value_and_grad(lambda d: run(d, golden), has_aux=True))(decoder)
  real = golden["attention_mask"].astype(bool)
  released.check_close(f"llama_{name} logits", np.asarray(logits)[real], golden["logits"][real], relative=1e-5)
  released.check_close(f"llama_{name} loss", np.asarray(loss), golden["loss"], relative=1e-5)
  found = released.to_foreign(gradient, "decoder/", llama.table(config))
  expected = released.group(golden, "g.")
  assert sorted(found) == sorted(expected)
  for key, value in found.items():
    released.check_close(f"llama_{name} {key}", value, expected[key], relative=1e-4)


def test_greedy_generation_with_and_without_cache(case):
  _, golden, config, decoder = case
  prompt, answer = golden["greedy_prompt"], golden["greedy_out"][0]
  steps = len(answer) - prompt.shape[1]
  cached, plain = generate(decoder, config, decoder.embed(prompt), steps)
  assert cached == plain == answer[prompt.shape[1] :].tolist()


def generate(decoder, config, embeddings, steps):
  """Greedy ids of a prompt's embeddings [1, S, D]: with the cache, and by running the whole row anew for each."""
  length = embeddings.shape[1]
  extend = released.jit(lambda d, e, p, c: d.extend(e, p, c))
  whole = released.jit(lambda d, e, p, s: d(e, p, s))
  cache = KVCache.empty(config, config.layers, 1, length + steps, jnp.float32)
  hidden, cache = extend(decoder, embeddings, jnp.arange(length)[None], cache)
  cached = [int(decoder.logits(hidden[:, -1]).argmax())]
  for step in range(1, steps):
    hidden, cache = extend(decoder, decoder.embed(jnp.array([cached[-1:]])), jnp.array([[length + step - 1]]), cache)
    cached.append(int(decoder.logits(hidden[:, -1]).argmax()))
  plain, row = [], jnp.pad(embeddings, ((0, 0), (0, steps), (0, 0)))
  places = jnp.arange(length + steps)[None]
  for place in range(length, length + steps):
    hidden = whole(decoder, row, places, (places < place).astype(jnp.int32))
    plain.append(int(decoder.logits(hidden[:, place - 1]).argmax()))
    row = row.at[:, place].set(decoder.embed(jnp.array(plain[-1])))
  return cached, plain


def test_lora(case):
  name, base, config, decoder = case
  golden = released.read(f"lora_{name}")
  adapter = LoraConfig(rank=int(golden["r"]), alpha=float(golden["alpha"]), dropout=0.0)
  graphdef, weights, shapes = adapted(decoder, adapter)
  table, file = peft.table(adapter), released.weights(released.group(golden, "w."))
  loaded = mapping.load(file, table, {"decoder/" + path: shape for path, shape in shapes.items()})
  adapters = {path: loaded["decoder/" + path] for path in shapes}
  fresh = lambda adapters: parameters.unflatten(graphdef, weights | adapters)
  (loss, logits), gradient = released.jit(jax.value_and_grad(lambda a: run(fresh(a), base), has_aux=True))(adapters)
  real = base["attention_mask"].astype(bool)
  released.check_close(f"lora_{name} logits", np.asarray(logits)[real], golden["logits"][real], relative=1e-5)
  released.check_close(f"lora_{name} loss", np.asarray(loss), golden["loss"], relative=1e-5)
  found = mapping.export({"decoder/" + path: np.asarray(g) for path, g in gradient.items()}, table)
  expected = released.group(golden, "g.")
  assert sorted(found) == sorted(expected)
  for key, value in found.items():
    released.check_close(f"lora_{name} {key}", value, expected[key], relative=1e-4)

  merged = lora.merge(fresh(adapters))
  assert not any("/lora/" in path for path in parameters.flatten(merged)[1])
  _, logits = released.jit(lambda d: run(d, base))(merged)
  released.check_close(f"lora_{name} merged", np.asarray(logits)[real], golden["merged_logits"][real], relative=1e-5)
  kernels = released.to_foreign(merged, "decoder/", llama.table(config))
  for key, expected in released.group(golden, "merged.").items():
    released.check_close(f"lora_{name} merged {key}", kernels[key], expected, relative=1e-6)


def test_lora_dropout_keeps_the_mean_and_is_off_without_a_key():
  config = LoraConfig(rank=4, alpha=8.0, dropout=0.25)
  adapter = lora.Lora(16, 8, config, rngs=nnx.Rngs(0))
  adapter.b = nnx.Param(jax.random.normal(jax.random.key(1), (4, 8)))
  x = jax.random.normal(jax.random.key(2), (3, 16))
  plain = x @ adapter.a[...] @ adapter.b[...] * 2.0
  np.testing.assert_allclose(adapter(x, None), plain, rtol=1e-6)
  draws = jax.vmap(lambda key: adapter(x, key))(jax.random.split(jax.random.key(3), 4000))
  assert np.abs(draws[0] - plain).max() > 0.01
  error = draws.std(0) / np.sqrt(4000)
  assert (np.abs(draws.mean(0) - plain) < 5 * error).all()


@pytest.fixture(scope="module")
def decoder():
  """A decoder with the golden's weights, where one kind of attention is enough."""
  golden = released.read("llama_mha")
  config = DecoderConfig(vocab_size=320, width=64, layers=4, heads=4, kv_heads=4, head_width=16, mlp_width=160)
  return make(golden, config)


def test_no_token_sees_another_segment(decoder):
  """Changing one sample of a packed row leaves the other's hidden states equal to the last bit."""
  segments = jnp.array([[1] * 7 + [2] * 9 + [0] * 4])
  positions = jnp.array([[*range(7), *range(9), *range(4)]])
  embeddings = jax.random.normal(jax.random.key(0), (1, 20, decoder.config.width))
  forward = released.jit(lambda d, e: d(e, positions, segments))
  before = forward(decoder, embeddings)
  for part, others in ((slice(0, 7), slice(7, 20)), (slice(7, 16), [*range(7), *range(16, 20)])):
    after = forward(decoder, embeddings.at[:, part].multiply(-3.0))
    assert (before[:, others] == after[:, others]).all()
    assert (jnp.abs(before[:, part] - after[:, part]).max(-1) > 1e-3).all()
  alone = released.jit(lambda d, e: d(e, positions[:, 7:16], segments[:, 7:16]))(decoder, embeddings[:, 7:16])
  np.testing.assert_allclose(alone, before[:, 7:16], rtol=0, atol=2e-6)


def test_remat_policies_give_the_same_gradients(decoder):
  ids, key = jax.random.randint(jax.random.key(1), (2, 12), 0, 320), jax.random.key(0)
  places, segments = jnp.tile(jnp.arange(12), (2, 1)), jnp.ones((2, 12), jnp.int32)
  gradients = {}
  for remat in ("none", "named", "offload", "full"):
    # Dropout, since what is recomputed must drop the same places again.
    graphdef, weights, shapes = adapted(decoder, LoraConfig(rank=2, alpha=4.0, dropout=0.5), remat)
    adapters = {path: np.full(shape.shape, 0.05, np.float32) for path, shape in shapes.items()}

    def total(adapters):
      model = parameters.unflatten(graphdef, weights | adapters)
      hidden = model(model.embed(ids), places, segments, key)
      return (hidden * jnp.cos(jnp.arange(hidden.size)).reshape(hidden.shape)).sum()

    gradients[remat] = released.jit(jax.grad(total))(adapters)
  for remat in ("named", "offload", "full"):
    for path, expected in gradients["none"].items():
      assert np.abs(expected).max() > 1e-3
      released.check_close(f"remat {remat} {path}", gradients[remat][path], np.asarray(expected), relative=2e-6)
