"""Hierarchical window attention of LLaVA-UHD v2: a fixed number of visual tokens from an inverse semantic pyramid.

Each of g x g queries attends to one window of the feature maps of all levels, pooled to a few tokens a level (see
`windows`). As released there are four sets of queries, which share one attention and are merged by a linear layer; the
paper describes one.

What is computed is what the authors' code computes, the way there is not. Theirs projects every cell to the decoder's
width, normalises it, adds positions, pools keys and values apart, and projects both again for the attention. Pooling is
linear, and so is layer normalisation once the deviation of each cell is known:

  LN(x W + b) = gain * (x W' + b') / deviation(x) + offset,    W' and b' centred over the decoder's width.

So cells are pooled in the ViT's width, each divided by its deviation, which follows from x alone by the Gram matrix
W' W'^T. A window's token is then a vector of C + 2 numbers: the pooled features, the pooled 1 / deviation (what b' is
multiplied by) and the coverage (what constants are). Keys and values are linear in it, with matrices that are made once
a call. Positions enter the scores as a small table. No map of the decoder's width exists.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mllm_jax.config import ConfigError
from mllm_jax.models.layers import LayerNorm, Linear, normal, uniform, zeros
from mllm_jax.models.projectors import windows

NORM_EPS = 1e-6
QUERY_SETS = 4  # as released
STATISTICS = jax.lax.Precision.HIGHEST  # small products whose errors every cell or token would inherit


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Folded:
  """The parameters as the attention applies them, made once for any number of crops by `WindowAttention.fold`.

  deviation: for each level (Gram matrix [C, C], mixed term [C], constant), which give a cell's variance.
  queries: for each level [g*g, M, C + 2], M = heads x query sets: what scores a token.
  positions: [g*g, M, g*g]: what scores a token's weights over the position table.
  values: for each level [C + 2, heads, head width]: a token's value.
  """

  deviation: list[tuple[jax.Array, jax.Array, jax.Array]]
  queries: list[jax.Array]
  positions: jax.Array
  values: list[jax.Array]


class WindowAttention(nnx.Module):
  """Sets of g x g queries, each of which attends to one window of every level: -> [N, g*g, sets, D].

  marked: whether levels can be told apart by biases of their projections and embeddings added to their keys.
  """

  def __init__(
    self,
    levels: tuple[int, ...],
    vision_width: int,
    width: int,
    *,
    query_sets: int,
    query_grid: int,
    pooling: str,
    head_width: int,
    marked: bool,
    rngs: nnx.Rngs,
  ):
    check_levels(levels)
    if head_width < 1 or width % head_width:
      raise ConfigError(f"the projector's width {width} must be a multiple of its head width {head_width}")
    self.levels = tuple(levels)
    self.heads = width // head_width
    self.pooling = tuple(windows.make_pooling(pooling, query_grid, level) for level in levels)
    linear = lambda in_width, bias=True, init=normal(0.02): Linear(
      in_width, width, bias=bias, rngs=rngs, kernel_init=init
    )
    self.queries = nnx.Param(normal(0.02)(rngs.params(), (query_sets, query_grid**2, width)))
    self.pos_embed = nnx.Param(jnp.asarray(sincos_table(width, query_grid), jnp.float32))
    self.level_projectors = nnx.List([linear(vision_width, bias=marked) for _ in levels])
    self.level_embeddings = nnx.Param(zeros(rngs.params(), (len(levels), width))) if marked else None
    self.query_norm, self.key_norm = (LayerNorm(width, NORM_EPS, rngs=rngs) for _ in range(2))
    packed = uniform(math.sqrt(6 / (4 * width)))  # Xavier, for the three matrices stacked
    self.q_proj, self.k_proj, self.v_proj = (linear(width, init=packed) for _ in range(3))
    self.out_proj = linear(width)

  def fold(self, dtype: jnp.dtype) -> Folded:
    """What `__call__` needs of the parameters; the large matrices in `dtype`.

    Worth calling oneself only where crops are gone through one after another, to call it once for all of them.
    """
    float32 = lambda param: param[...].astype(jnp.float32)
    split = lambda x: x.reshape(*x.shape[:-1], self.heads, -1)
    positions = self.pos_embed[...].astype(dtype)
    query = self.q_proj(self.query_norm(self.queries[...].astype(dtype)) + positions)
    query = split(query) / math.sqrt(query.shape[-1] // self.heads)  # [sets, g*g, heads, head width]
    # The bias of the keys adds the same to all scores of a query: softmax cancels it.
    key_kernel, value_kernel = (split(m.kernel[...].astype(dtype)) for m in (self.k_proj, self.v_proj))

    def score(keys):
      scores = jnp.einsum("qwhd,chd->whqc", query, keys)
      return scores.reshape(scores.shape[0], -1, scores.shape[-1])

    deviation, queries, values = [], [], []
    gain, offset = float32(self.key_norm.scale), float32(self.key_norm.bias)
    for index, projector in enumerate(self.level_projectors):
      kernel = float32(projector.kernel)
      bias = jnp.zeros_like(gain) if projector.bias is None else float32(projector.bias)
      kernel, bias = kernel - kernel.mean(1, keepdims=True), bias - bias.mean()
      deviation.append(moments(kernel, bias))
      mark = 0 if self.level_embeddings is None else float32(self.level_embeddings)[index]
      rows = lambda constant: jnp.concatenate([kernel * gain, jnp.stack([bias * gain, constant])]).astype(dtype)
      queries.append(score(jnp.einsum("ce,ehd->chd", rows(offset + mark), key_kernel)))
      values.append(jnp.einsum("ce,ehd->chd", rows(offset), value_kernel))
    return Folded(deviation, queries, score(jnp.einsum("ce,ehd->chd", positions, key_kernel)), values)

  def tokens(self, index: int, features: jax.Array, grids: jax.Array, deviation) -> jax.Array:
    """Flat maps [N, 4^level P, C] -> the tokens of their windows [N, g*g, t, C + 2], in the type of the maps."""
    pooling = self.pooling[index]
    pooled, scales = windows.pool(pooling, features, inverse_deviation(features, *deviation), grids)
    constants = jnp.stack([scales, windows.coverage(pooling, grids)], -1).astype(features.dtype)
    tokens = jnp.concatenate([pooled, constants], -1)
    return tokens.reshape(tokens.shape[0], -1, *tokens.shape[3:])

  def __call__(self, levels: dict[int, jax.Array], grids: jax.Array, folded: Folded) -> jax.Array:
    """levels: {level: flat maps [N, 4^level P, C]}; grids: int32 [N, 2]. -> [N, g*g, sets, D]."""
    tokens = [
      self.tokens(index, levels[level], grids, folded.deviation[index]) for index, level in enumerate(self.levels)
    ]
    (n, places, _, _), dtype = tokens[0].shape, tokens[0].dtype
    scores, valid = [], []
    for index, level in enumerate(self.levels):
      pooling = self.pooling[index]
      patches = levels[level].shape[1] // 4**level
      table = windows.table_weights(pooling, grids, pooling.windows, patches).reshape(n, places, -1, places)
      by_content = jnp.einsum(
        "wmc,nwtc->nwmt", folded.queries[index], tokens[index], preferred_element_type=jnp.float32
      )
      by_position = jnp.einsum(
        "wmp,nwtp->nwmt", folded.positions, table.astype(dtype), preferred_element_type=jnp.float32
      )
      scores.append(by_content + by_position)
      valid.append(pooling.valid(grids))
    scores = jnp.where(jnp.concatenate(valid, -1)[:, None, None], jnp.concatenate(scores, -1), -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(dtype)
    ends = np.cumsum([pooling.tokens for pooling in self.pooling])
    found = sum(map(self.attend, jnp.split(weights, ends[:-1], axis=-1), tokens, folded.values))
    found = found.reshape(n, places, found.shape[2], -1).astype(dtype)
    return self.out_proj(found + self.v_proj.bias[...].astype(dtype))

  def attend(self, weights: jax.Array, tokens: jax.Array, kernel: jax.Array) -> jax.Array:
    """What the queries find in one level, float32 [N, g*g, sets, heads, head width]; weights: [N, g*g, M, t].

    Sums of tokens, then their values: less work than values, then their sums, as a window has about nine tokens and
    four sets of queries. The price are the sums, C + 2 numbers a query and head: 38 MB a crop and level in bfloat16 at
    7B. (Measured with the gradients, 2 crops of C 512, D 2048: 0.14 s against 0.18 s.)
    """
    n, places, _, t = weights.shape
    weights = weights.reshape(n, places, self.heads, -1, t)
    sums = jnp.einsum("nwhqt,nwtc->nwhqc", weights, tokens)
    return jnp.einsum("nwhqc,chd->nwqhd", sums, kernel, preferred_element_type=jnp.float32)


class HiwinAttention(nnx.Module):
  """Feature pyramid -> g*g visual tokens a crop (LLaVA-UHD v2, section 3.2, eq. 2-4).

  levels: which of the pyramid's levels are attended to, growing; level l has 2^l times the ViT's resolution. pooling:
  how a window becomes tokens, see `windows.make_pooling`. `width` is the decoder's; heads are width // head_width.
  Raises ConfigError for levels that do not grow, a width that heads do not divide, or an unknown pooling.
  """

  def __init__(
    self,
    levels: tuple[int, ...],
    vision_width: int,
    width: int,
    *,
    query_grid: int = 12,
    pooling: str = "selective",
    head_width: int = 128,
    rngs: nnx.Rngs,
  ):
    self.attention = WindowAttention(
      levels,
      vision_width,
      width,
      query_sets=QUERY_SETS,
      query_grid=query_grid,
      pooling=pooling,
      head_width=head_width,
      marked=True,
      rngs=rngs,
    )
    self.set_norm, self.out_norm = (LayerNorm(width, NORM_EPS, rngs=rngs) for _ in range(2))
    self.merge = Linear(QUERY_SETS * width, width, bias=True, rngs=rngs)
    self.proj = Linear(width, width, bias=False, rngs=rngs, kernel_init=normal(width**-0.5))

  def fold(self, dtype: jnp.dtype) -> Folded:
    """See `WindowAttention.fold`."""
    return self.attention.fold(dtype)

  @jax.named_scope("hiwin")
  def __call__(self, levels: dict[int, jax.Array], grids: jax.Array, folded: Folded | None = None) -> jax.Array:
    """levels: {level: flat maps [N, 4^level P, C]}, see `models.flat`; grids: int32 [N, 2], those of the ViT, at most P
    cells each. Padding may hold any finite numbers. -> [N, g*g, D] in the type of the maps; of a crop with the grid
    (0, 0) they are finite and mean nothing.

    All N crops are worked on at once. To save memory scan over crops, with `fold` called outside the scan. Raises
    ConfigError for a level that is not among the maps.
    """
    check_maps(self.attention.levels, levels)
    if folded is None:
      folded = self.fold(levels[self.attention.levels[0]].dtype)
    sets = self.set_norm(self.attention(levels, grids, folded))
    return self.proj(self.out_norm(self.merge(sets.reshape(*sets.shape[:2], -1))))


def check_levels(levels: tuple[int, ...]) -> None:
  """Raises ConfigError unless `levels` are some numbers from 0 on, growing."""
  if not levels or list(levels) != sorted(set(levels)) or levels[0] < 0:
    raise ConfigError(f"projector.levels={tuple(levels)} must be levels from 0 on, each once, from coarse to fine")


def check_maps(wanted: tuple[int, ...], levels: dict[int, jax.Array]) -> None:
  """Raises ConfigError where a wanted level is not among the maps."""
  missing = [level for level in wanted if level not in levels]
  if missing:
    raise ConfigError(f"the projector needs level {missing[0]}, and the pyramid has the levels {sorted(levels)}")


def moments(kernel: jax.Array, bias: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """What gives the variance of x W + b over the output's width: x G x + 2 x m + c, for a centred W [C, E] and b [E]."""
  width = bias.shape[0]
  gram = jnp.matmul(kernel, kernel.T, precision=STATISTICS) / width
  mixed = jnp.matmul(kernel, bias, precision=STATISTICS) / width
  return gram, mixed, jnp.square(bias).mean()


def inverse_deviation(features: jax.Array, gram: jax.Array, mixed: jax.Array, constant: jax.Array) -> jax.Array:
  """float32 [..., P]: 1 / sqrt(variance + eps) of what `moments` was made of, for features [..., P, C]."""
  linear = jnp.einsum("...c,c->...", features, mixed.astype(features.dtype), preferred_element_type=jnp.float32)
  variance = quadratic_form(features, gram) + 2 * linear + constant
  # What is a sum of squares may come out below zero by rounding.
  return jax.lax.rsqrt(jnp.maximum(variance, 0) + NORM_EPS)


@jax.custom_vjp
def quadratic_form(x: jax.Array, matrix: jax.Array) -> jax.Array:
  """float32 [...]: x M x for x [..., C] and a symmetric M [C, C].

  Differentiated by hand: x M is made again instead of kept, and one product serves both places of x.
  """
  return (_product(x, matrix) * x.astype(jnp.float32)).sum(-1)


def _product(x: jax.Array, matrix: jax.Array) -> jax.Array:
  return jnp.matmul(x, matrix.astype(x.dtype), preferred_element_type=jnp.float32)


def _form_forward(x, matrix):
  return quadratic_form(x, matrix), (x, matrix)


def _form_backward(residuals, gradient):
  x, matrix = residuals
  d_x = 2 * gradient[..., None] * _product(x, matrix)
  scaled = (gradient[..., None] * x).astype(x.dtype)
  d_matrix = jnp.einsum("...c,...e->ce", scaled, x, preferred_element_type=jnp.float32)
  return d_x.astype(x.dtype), d_matrix


quadratic_form.defvjp(_form_forward, _form_backward)


def sincos_table(width: int, side: int) -> np.ndarray:
  """Sine-cosine positions of a side x side grid, float64 [side * side, width]: the column in the first half of the
  channels, the row in the second (as in MAE, He et al. 2022). Raises ConfigError where width is no multiple of 4.
  """
  if width % 4:
    raise ConfigError(f"the projector's width {width} must be a multiple of 4 for its position table")
  frequencies = 1 / 10000 ** (np.arange(width // 4, dtype=np.float32) / np.float32(width / 4))
  angles = np.arange(side, dtype=np.float32)[:, None] * frequencies
  axis = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
  by_row, by_column = np.repeat(axis, side, axis=0), np.tile(axis, (side, 1))
  return np.concatenate([by_column, by_row], axis=1)
