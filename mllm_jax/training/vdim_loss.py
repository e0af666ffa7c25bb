"""The loss that LLaVA-UHD v2's VDIM is pre-trained with, on its own, before the language model comes in.

For one picture and one jitter of it: the vision tower's features of the jittered picture are what the jittered
high-resolution maps of the clean picture must give when they are pooled (FeatUp's multi-view consistency). A map is
never made at the picture's size: resizing, jittering and blurring are linear along each axis, and are composed there
first.

Everything here is for one square picture; `jax.vmap` makes it a batch. Chance is drawn by `draw`, from a key, and
handed in. So every picture has its own draws, where the released code shares jitter and sampled places on a device.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mllm_jax.models.downsampler import HIGHEST, PretrainingHeads, bilinear_matrix, draw_keep

PAD = 30  # pixels by which a picture is extended on each side before it is cropped
CRF_WEIGHT = 1e-3
# The sampled CRF's kernel: (weight, variance of the places, variance of the colours).
BILATERAL = (10.0, 0.1, 0.15)
SPATIAL = (3.0, 0.005)


class Jitter(NamedTuple):
  """A random view: the picture is extended, enlarged `zoom` times, cropped to its old size at (row, column), flipped.

  row, column: int32 scalars; zoom: float32, 1 or more; flip: bool, left to right.
  """

  row: jax.Array
  column: jax.Array
  zoom: jax.Array
  flip: jax.Array


class Draws(NamedTuple):
  """All that is random in one jitter of one picture.

  projection: float32 [C, R] with columns of unit length, or None: features are compared as they are.
  keep: float32 [levels, n, n], see `draw_keep`.
  places: int32 [levels, 2, samples], (row, column) of the pixels that the CRF term looks at, or None: no such term.
  dropout: a key for each level, or None: no dropout.
  """

  jitter: Jitter
  projection: jax.Array | None
  keep: jax.Array
  places: jax.Array | None
  dropout: jax.Array | None


def draw(
  key: jax.Array, size: int, patches: int, width: int, levels: int = 2, projected: int = 30, crf_samples: int = 1000
) -> Draws:
  """The draws for one jitter of a picture of size x size pixels and patches x patches features of `width` channels.

  The released recipe takes two jitters a step; the CRF term belongs to the first, so the second has crf_samples=0.
  """
  keys = jax.random.split(key, 5)
  projection = jax.random.normal(keys[1], (width, projected), jnp.float32) if projected else None
  return Draws(
    draw_jitter(keys[0], size),
    None if projection is None else projection / jnp.linalg.norm(projection, axis=0),
    draw_keep(keys[2], (levels, patches, patches)),
    jax.random.randint(keys[3], (levels, 2, crf_samples), 0, size) if crf_samples else None,
    jax.random.split(keys[4], levels),
  )


def draw_jitter(key: jax.Array, size: int) -> Jitter:
  """A random view of a picture of size x size pixels: half of them enlarged up to twice, half of them flipped."""
  zoomed, zoom, row, column, flip = jax.random.split(key, 5)
  zoom = jnp.where(jax.random.bernoulli(zoomed), jax.random.uniform(zoom, minval=1.0, maxval=2.0), 1.0)
  places = jnp.floor((size + 2 * PAD) * zoom).astype(jnp.int32) - size + 1
  return Jitter(
    jax.random.randint(row, (), 0, places),
    jax.random.randint(column, (), 0, places),
    zoom,
    jax.random.bernoulli(flip),
  )


def view(x: jax.Array, start: jax.Array, zoom: jax.Array) -> jax.Array:
  """Jitter along the first axis of [L, ...]: extended by reflection, enlarged bilinearly, L places from `start`.

  A place i of the enlarged axis lies at (i + 0.5) / zoom - 0.5 of the extended one, whatever the enlarged length is
  rounded to; beyond the end the end is repeated.

  Raises ValueError where the axis is too short to be extended by reflection.
  """
  length = len(x)
  if length <= PAD:
    raise ValueError(f"{length} pixels cannot be extended by {PAD} by reflection; use larger pictures")
  extended = length + 2 * PAD
  position = (start + jnp.arange(length) + 0.5) / zoom - 0.5
  position = jnp.clip(position, 0, extended - 1)
  first = jnp.floor(position).astype(jnp.int32)
  share = (position - first).reshape(-1, *[1] * (x.ndim - 1))

  def at(place):
    place = jnp.abs(place - PAD)
    return x[jnp.where(place < length, place, 2 * (length - 1) - place)]

  return (1 - share) * at(first) + share * at(jnp.minimum(first + 1, extended - 1))


def jittered(image: jax.Array, jitter: Jitter) -> jax.Array:
  """The view of a picture: float [L, L, c] -> the same shape."""
  columns = view(view(image, jitter.row, jitter.zoom).swapaxes(0, 1), jitter.column, jitter.zoom)
  return jnp.where(jitter.flip, columns[::-1], columns).swapaxes(0, 1)


def axis_matrices(jitter: Jitter, size: int, cells: int) -> tuple[jax.Array, jax.Array]:
  """What brings a map of cells x cells to the size x size pixels of the view: float32 [size, cells], for the rows and
  for the columns.
  """
  resize = jnp.asarray(bilinear_matrix(size, cells))
  columns = view(resize, jitter.column, jitter.zoom)
  return view(resize, jitter.row, jitter.zoom), jnp.where(jitter.flip, columns[::-1], columns)


def jitter_loss(
  maps: Sequence[jax.Array],
  target: jax.Array,
  image: jax.Array,
  heads: PretrainingHeads,
  draws: Draws,
  jitters: int = 2,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """What one jitter of one picture adds to the loss of a step (a scalar), and its parts by name.

  maps: the levels' high-resolution features of the clean picture, each [h, h, C]. target [n, n, C]: the vision tower's
  features of `jittered(image, draws.jitter)`. image [L, L, 3]: the clean picture as VDIM is guided by it. jitters: how
  many such losses a step adds up; the reconstruction is divided by it, the CRF term, of the first jitter only, is not.

  Reconstruction (of each level, equally): mean of difference^2 / (2 s^2) + log s. The CRF term compares the jittered
  map with the clean picture, as the released code does.
  """
  size, total, parts = len(image), jnp.zeros((), jnp.float32), {}
  target = jax.lax.stop_gradient(target.astype(jnp.float32))
  for level, (features, downsampler, scale_net) in enumerate(zip(maps, heads.downsamplers, heads.scales, strict=True)):
    to_rows, to_columns = axis_matrices(draws.jitter, size, len(features))
    dropout = None if draws.dropout is None else draws.dropout[level]
    pooled = downsampler(features, to_rows, to_columns, draws.keep[level], dropout)
    scale = scale_net(target)
    error = project(pooled - target, draws.projection)
    parts[f"reconstruction_{level}"] = (jnp.square(error) / (2 * jnp.square(scale)) + jnp.log(scale)).mean() / jitters
    total += parts[f"reconstruction_{level}"]
    if draws.places is not None:
      projected, (row, column) = project(features.astype(jnp.float32), draws.projection), draws.places[level]
      lines = jnp.einsum("sh,hwc->swc", to_rows[row], projected, precision=HIGHEST)
      sampled = jnp.einsum("sw,swc->sc", to_columns[column], lines, precision=HIGHEST)
      parts[f"crf_{level}"] = crf(sampled, image[row, column], jnp.stack([row, column], axis=-1) / size)
      total += CRF_WEIGHT * parts[f"crf_{level}"]
  return total, parts


def project(features: jax.Array, projection: jax.Array | None) -> jax.Array:
  """Features [..., C] seen through a random projection [C, R]: [..., R]."""
  return features if projection is None else jnp.matmul(features, projection, precision=HIGHEST)


def crf(features: jax.Array, colours: jax.Array, places: jax.Array) -> jax.Array:
  """A CRF's pairwise energy among sampled pixels: the mean over all pairs of kernel times squared distance of features.

  features [samples, C], colours [samples, 3], places [samples, 2] in 0..1. The sum over pairs is taken as the quadratic
  form of the kernel's graph Laplacian, so that no [samples, samples, C] is held; features are centred first, which
  changes no distance and keeps that form precise.
  """
  distance = lambda x: jnp.square(x[:, None] - x[None]).sum(-1)
  (weight, place_variance, colour_variance), (spatial_weight, spatial_variance) = BILATERAL, SPATIAL
  apart = distance(places)
  kernel = weight * jnp.exp(-apart / (2 * place_variance) - distance(colours) / (2 * colour_variance))
  kernel += spatial_weight * jnp.exp(-apart / (2 * spatial_variance))
  centred = features - features.mean(0)
  own = (kernel.sum(0) * jnp.square(centred).sum(-1)).sum()
  return 2 * (own - (centred * jnp.matmul(kernel, centred, precision=HIGHEST)).sum()) / kernel.size
