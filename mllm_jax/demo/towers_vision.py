"""Trains the demo's small CLIP vision tower: contrast between patches and phrases.

Every patch is pulled towards the phrase that describes what is centred in it ("red 7 at the top left", or "navy ground"
where no digit is) and away from all other phrases; a phrase's vector is the sum of its words' vectors. The loss stands
on hidden_states[-2], because that is what LLaVA-type models read; the last layer is trained with the same loss
afterwards on the finished lower ones, so that the checkpoint is whole.

Digits do not localise by themselves: training starts with digits in the middle of patches, all nine places filled, and
lets the jitter grow and the scenes thin out to those of the demo.
"""

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from PIL import Image

from mllm_jax.config import VisionConfig
from mllm_jax.data.patches import patchify
from mllm_jax.demo import scenes
from mllm_jax.models.layers import LayerNorm
from mllm_jax.models.vision import VisionLayer, VisionTower

CONFIG = VisionConfig(
  image_size=scenes.IMAGE_SIZE, patch_size=scenes.PATCH_SIZE, width=128, layers=5, heads=4, mlp_width=512
)
WORDS = (*scenes.COLOURS, *map(str, range(10)), *scenes.ROWS, *scenes.COLUMNS, *scenes.GROUNDS)


def word_slices() -> tuple[slice, ...]:
  """Where in WORDS the colours, digits, rows, columns and grounds stand."""
  ends = np.cumsum([len(scenes.COLOURS), 10, len(scenes.ROWS), len(scenes.COLUMNS), len(scenes.GROUNDS)])
  return tuple(slice(int(start), int(end)) for start, end in zip((0, *ends), ends))


def words_of(scene: scenes.Scene) -> np.ndarray:
  """The words of the right phrase for every patch, float32 [64, words] of zeros and ones."""
  words = np.zeros((scenes.GRID**2, len(WORDS)), np.float32)
  words[:, WORDS.index(scene.ground)] = 1
  for thing in scene.objects:
    words[thing.patch] = 0
    for word in (thing.colour, str(thing.digit), scenes.ROWS[thing.row], scenes.COLUMNS[thing.column]):
      words[thing.patch, WORDS.index(word)] = 1
  return words


def distorted_glyph(rng: np.random.Generator, scan: int, size: int) -> np.ndarray:
  """Like `scenes.glyph`, slightly rotated, sheared and stretched, so that the scans are not learnt by heart."""
  angle, shear = rng.normal(0, 0.12), rng.normal(0, 0.1)
  width, height = rng.uniform(0.92, 1.12, 2) * 8 / size
  matrix = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) @ np.array([[1, shear], [0, 1]])
  matrix = matrix * (width, height)
  offset = 4 + rng.normal(0, 0.2, 2) - matrix @ (size / 2, size / 2)
  coefficients = (*matrix[0], offset[0], *matrix[1], offset[1])
  ink = scenes.scan_image(scan).transform((size, size), Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC)
  return np.asarray(ink, np.float32) / 255


def make_batch(rng: np.random.Generator, size: int, jitter: int, full_share: float) -> tuple[np.ndarray, np.ndarray]:
  """Pictures uint8 [B, 64, 588] and the words of each patch [B, 64, words]. `full_share`: with nine digits."""
  batch = [
    scenes.sample_scene(
      rng, scenes.load_digits().train_indices, jitter=jitter, count=9 if rng.random() < full_share else None
    )
    for _ in range(size)
  ]
  glyphs = functools.partial(distorted_glyph, rng)
  return patches_of(batch, glyphs), np.stack([words_of(scene) for scene in batch])


def patches_of(batch: list[scenes.Scene], *glyphs) -> np.ndarray:
  """uint8 [B, 64, 588]: the scenes as the tower takes them."""
  return patchify(np.stack([scenes.render(scene, *glyphs) for scene in batch]), CONFIG.patch_size)


class PhraseHead(nnx.Module):
  """Scores of patches against words: a linear map of the features times the word vectors."""

  def __init__(self, width: int, rngs: nnx.Rngs):
    self.words = nnx.Param(jax.random.normal(rngs.params(), (len(WORDS), width)) * width**-0.5)
    self.bias = nnx.Param(jnp.zeros((len(WORDS),)))

  def __call__(self, features: jax.Array) -> jax.Array:
    """features [B, P, C] -> [B, P, words]; a phrase's score is the sum of its words' scores."""
    return features @ self.words[...].T + self.bias[...]


def contrast(scores: jax.Array, words: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Cross-entropy of the right phrase among all phrases, and the share of object patches whose phrase scores highest.

  The phrases are all of colour x digit x row x column, and the grounds. Since scores add up, the sum over the product
  of four sets is the product of four sums: nothing of the size of all phrases is computed. Object and ground patches
  weigh alike, however many there are of each.
  """
  *factors, grounds = word_slices()
  log_sum = jax.nn.logsumexp
  total = jnp.logaddexp(sum(log_sum(scores[..., f], -1) for f in factors), log_sum(scores[..., grounds], -1))
  log_prob = jnp.sum(scores * words, -1) - total
  is_object = 1 - words[..., grounds].sum(-1)
  mean = lambda x, weights: jnp.sum(x * weights) / jnp.sum(weights)
  best = sum(scores[..., f].max(-1) for f in factors)
  hits = (jnp.sum(scores * words, -1) > best - 1e-3) & (best > scores[..., grounds].max(-1))
  return -mean(log_prob, is_object) - mean(log_prob, 1 - is_object), mean(hits.astype(jnp.float32), is_object)


class LastLayer(nnx.Module):
  """What CLIP has above hidden_states[-2]: one more layer and the norm after it."""

  def __init__(self, config: VisionConfig, rngs: nnx.Rngs):
    self.layer = VisionLayer(config, rngs=rngs)
    self.norm = LayerNorm(config.width, config.norm_eps, rngs=rngs)

  def __call__(self, features: jax.Array) -> jax.Array:
    return self.norm(self.layer(features))


def widen(module: nnx.Module) -> nnx.Module:
  """Kernels of N(0, 1 / fan in). The N(0, 0.02^2) of wide models lets a narrow one start too slowly."""
  for path, leaf in nnx.iter_graph(module):
    if path and path[-1] == "kernel":
      leaf.set_value(leaf[...] * (50 * leaf.shape[-2] ** -0.5))
  return module


def fit(loss, trainable, frozen, schedule, steps, make, log, name):
  """Minimises loss(trainable, frozen, patches, words) -> (loss, accuracy) with AdamW; returns what was trained."""
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.99, weight_decay=0.02))
  graph, params = nnx.split(trainable)
  opt_state = optimizer.init(params)

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def update(params, opt_state, frozen, patches, words):
    (value, accuracy), grads = jax.value_and_grad(
      lambda p: loss(nnx.merge(graph, p), frozen, patches, words), has_aux=True
    )(params)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, value, accuracy

  start = time.time()
  for step in range(steps):
    params, opt_state, value, accuracy = update(params, opt_state, frozen, *make(step))
    if step % 50 == 0 or step == steps - 1:
      seconds = time.time() - start
      log(f"{name} step {step:5d} loss {float(value):.3f} objects named {float(accuracy):.3f} {seconds:.0f} s")
  return nnx.merge(graph, params)


def train(steps: int, log=print) -> tuple[VisionTower, LastLayer]:
  """The tower up to hidden_states[-2], and the last layer."""
  lower = settle(train_lower(steps, log=log))
  return lower, train_last(lower, steps // 10, log=log)


def train_lower(steps: int, batch_size: int = 64, seed: int = 0, log=print) -> VisionTower:
  """The layers up to hidden_states[-2]."""
  rng, rngs = np.random.default_rng(seed), nnx.Rngs(seed)
  lower = widen(VisionTower(CONFIG, dtype="float32", rngs=rngs))
  model = nnx.List([lower, PhraseHead(CONFIG.width, rngs)])

  def loss(model, frozen, patches, words):
    del frozen
    return contrast(model[1](model[0](model[0].normalise(patches))), words)

  def make(step):
    done = step / steps
    return make_batch(rng, batch_size, jitter=min(scenes.JITTER, int(done * 12)), full_share=max(0.0, 1 - 1.4 * done))

  schedule = optax.warmup_cosine_decay_schedule(0, 2e-3, 100, steps, 2e-5)
  return fit(loss, model, None, schedule, steps, make, log, "vision")[0]


def settle(tower: VisionTower, size: float = 0.25, seed: int = 2) -> VisionTower:
  """The tower with features centred between objects and ground, and `size` times as large.

  The features carry the same information as before, but a projector learns from them far sooner: with features
  around 3 and far from zero, two of four starts had learnt nothing after 120 steps. Every layer normalises what it
  reads, so that scaling all that is written to the residual stream scales the stream and changes nothing else; the last
  bias shifts it.
  """
  patches, words = make_batch(np.random.default_rng(seed), 300, scenes.JITTER, 0.0)
  features = np.asarray(tower(tower.normalise(jnp.asarray(patches))))
  is_object = words[..., word_slices()[-1]].sum(-1) == 0
  middle = (features[is_object].mean(0) + features[~is_object].mean(0)) / 2
  settled = nnx.clone(tower)
  last_bias = settled.layers.fc2.bias
  last_bias.set_value(last_bias[...].at[-1].add(-middle))
  for written in (
    settled.pre_norm.scale,
    settled.pre_norm.bias,
    settled.layers.out_proj.kernel,
    settled.layers.out_proj.bias,
    settled.layers.fc2.kernel,
    last_bias,
  ):
    written.set_value(written[...] * size)
  return settled


def train_last(lower: VisionTower, steps: int, batch_size: int = 64, seed: int = 1, log=print) -> LastLayer:
  """The last layer, on top of finished lower ones."""
  rng, rngs = np.random.default_rng(seed), nnx.Rngs(seed)
  model = nnx.List([widen(LastLayer(CONFIG, rngs)), PhraseHead(CONFIG.width, rngs)])

  def loss(model, frozen, patches, words):
    return contrast(model[1](model[0](frozen(frozen.normalise(patches)))), words)

  make = lambda _: make_batch(rng, batch_size, scenes.JITTER, 0.0)
  return fit(loss, model, lower, optax.cosine_decay_schedule(1e-3, steps), steps, make, log, "last layer")[0]


@dataclasses.dataclass(frozen=True)
class Probe:
  """Accuracy of linear probes on held-out pictures: digit, colour and place of objects; object or ground."""

  digit: float
  colour: float
  place: float
  object: float


def probe(tower: VisionTower, pictures: int = 600, seed: int = 1) -> Probe:
  """Fits linear classifiers on the features of training pictures and scores them on held-out ones."""
  rng, digits = np.random.default_rng(seed), scenes.load_digits()
  run = jax.jit(lambda tower, x: tower(tower.normalise(x)))

  def examples(scans):
    batch = [scenes.sample_scene(rng, scans) for _ in range(pictures)]
    features = np.concatenate([np.asarray(run(tower, patches_of(batch[i : i + 50]))) for i in range(0, pictures, 50)])
    where = [(i, thing) for i, scene in enumerate(batch) for thing in scene.objects]
    at = features[[i for i, _ in where], [thing.patch for _, thing in where]]
    things = [thing for _, thing in where]
    labels = (
      np.array([t.digit for t in things]),
      np.array([list(scenes.COLOURS).index(t.colour) for t in things]),
      np.array([t.row * 3 + t.column for t in things]),
    )
    is_object = np.stack([words_of(s)[:, word_slices()[-1]].sum(-1) == 0 for s in batch]).astype(int)
    return [(at, label) for label in labels] + [(features.reshape(-1, features.shape[-1]), is_object.ravel())]

  scores = []
  for (x, y), (held_x, held_y) in zip(examples(digits.train_indices), examples(digits.held_out_indices)):
    kernel, bias = _softmax_regression(x, y)
    scores.append(float(((held_x @ kernel + bias).argmax(1) == held_y).mean()))
  return Probe(*scores)


@jax.jit(static_argnames="steps")
def _softmax_regression(x: jax.Array, y: jax.Array, steps: int = 400) -> tuple[jax.Array, jax.Array]:
  """Kernel [C, classes] and bias of a linear classifier of x [N, C] into y [N]."""
  optimizer = optax.adam(optax.cosine_decay_schedule(0.03, steps))
  params = jnp.zeros((x.shape[1], 16)), jnp.zeros((16,))

  def step(carry, _):
    params, state = carry
    cross_entropy = lambda p: optax.softmax_cross_entropy_with_integer_labels(x @ p[0] + p[1], y).mean()
    grads = jax.grad(lambda p: cross_entropy(p) + 1e-4 * jnp.sum(p[0] ** 2))(params)
    updates, state = optimizer.update(grads, state)
    return (optax.apply_updates(params, updates), state), None

  return jax.lax.scan(step, (params, optimizer.init(params)), None, steps)[0][0]
