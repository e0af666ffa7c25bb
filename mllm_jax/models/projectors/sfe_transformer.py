"""LLaVA-SP's spatial feature extractor made of transformer blocks (paper, table 3): a learned query for each map.

An encoder looks at the cells of a map, and a decoder of as many layers lets the map's query look at what it made of
them. Every map has both to itself. Cells have no positions of their own beyond what the tower put into them.

The released code applies dropout of 0.1 inside the blocks while it trains; that is left out.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from mllm_jax.config import ConfigError, ProjectorConfig
from mllm_jax.models.attention import attention
from mllm_jax.models.layers import LayerNorm, Linear, stack, uniform, zeros
from mllm_jax.models.projectors import maps

LAYERS = 4  # of the encoder, and of the decoder; the numbers here are the released code's
HEADS = 8
NORM_EPS = 1e-5


class Attention(nnx.Module):
  """Multi-head attention without biases, from x [B, S, C] to memory [B, M, C]: -> [B, S, C]."""

  def __init__(self, width: int, *, rngs: nnx.Rngs):
    packed = uniform(math.sqrt(6 / (4 * width)))  # Xavier, for the three matrices stacked
    self.q_proj, self.k_proj, self.v_proj = (
      Linear(width, width, bias=False, rngs=rngs, kernel_init=packed) for _ in range(3)
    )
    self.out_proj = Linear(width, width, bias=False, rngs=rngs)

  def __call__(self, x: jax.Array, memory: jax.Array) -> jax.Array:
    split = lambda y: y.reshape(*y.shape[:2], HEADS, -1)
    attended = attention(split(self.q_proj(x)), split(self.k_proj(memory)), split(self.v_proj(memory)))
    return self.out_proj(attended.reshape(x.shape))


class Block(nnx.Module):
  """A pre-norm layer whose feed-forward part is as wide as itself.

  crossed: a decoder's, which looks at the memory too.
  """

  def __init__(self, width: int, crossed: bool, *, rngs: nnx.Rngs):
    norm = lambda: LayerNorm(width, NORM_EPS, bias=False, rngs=rngs)
    self.self_norm, self.self_attention = norm(), Attention(width, rngs=rngs)
    self.cross_norm, self.cross_attention = (norm(), Attention(width, rngs=rngs)) if crossed else (None, None)
    self.norm = norm()
    self.fc1, self.fc2 = (Linear(width, width, bias=False, rngs=rngs) for _ in range(2))

  def __call__(self, x: jax.Array, memory: jax.Array | None = None) -> jax.Array:
    h = self.self_norm(x)
    x = x + self.self_attention(h, h)
    if self.cross_attention is not None:
      x = x + self.cross_attention(self.cross_norm(x), memory)
    return x + self.fc2(jax.nn.relu(self.fc1(self.norm(x))))


class Blocks(nnx.Module):
  """Layers one after another, and a norm. Those of an encoder are computed again in the backward pass: the scores of
  cells by cells are large."""

  def __init__(self, width: int, crossed: bool, *, rngs: nnx.Rngs):
    self.remat = not crossed
    self.layers = stack(lambda rngs: Block(width, crossed, rngs=rngs), LAYERS, rngs)
    self.norm = LayerNorm(width, NORM_EPS, bias=False, rngs=rngs)

  def __call__(self, x: jax.Array, memory: jax.Array | None = None) -> jax.Array:
    run = lambda layer, x, memory: layer(x, memory)
    run = jax.checkpoint(run) if self.remat else run
    x, _ = jax.lax.scan(lambda x, layer: (run(layer, x, memory), None), x, self.layers)
    return self.norm(x)


class TransformerExtractor(nnx.Module):
  """Patch map [B, G, G, C] -> spatial tokens [B, n, C], from the smallest map to the largest.

  Raises ConfigError for a width that the heads do not divide, or an unknown token_order.
  """

  def __init__(self, config: ProjectorConfig, grid: int, width: int, *, rngs: nnx.Rngs):
    if config.token_order not in ("map", "released"):
      raise ConfigError(f"projector.token_order={config.token_order!r} is unknown; known: map, released")
    if width % HEADS:
      raise ConfigError(f"projector.sfe=transformer has {HEADS} heads, which do not divide the tower's width {width}")
    self.config, self.width = config, width
    count = len(maps.map_sizes(config, grid))
    self.queries = nnx.Param(zeros(rngs.params(), (count, width)))
    self.encoders, self.decoders = (
      nnx.List([Blocks(width, crossed, rngs=rngs) for _ in range(count)]) for crossed in (False, True)
    )

  def cells(self, one_map: jax.Array) -> jax.Array:
    """The cells of a map [B, k, k, C] as the encoder gets them [B, k k, C].

    As released, pooled maps have their channels before their cells when they are cut into rows of C numbers, so that a
    row is a stretch of one channel or two over many cells.
    """
    if self.config.token_order == "released" and self.config.maps == "pooling":
      one_map = jnp.moveaxis(one_map, -1, 1)
    return one_map.reshape(len(one_map), -1, self.width)

  def __call__(self, patch_map: jax.Array) -> jax.Array:
    tokens = []
    for number, one_map in enumerate(maps.make(self.config, patch_map)):
      query = jnp.broadcast_to(self.queries[...][number].astype(one_map.dtype), (len(one_map), 1, self.width))
      memory = self.encoders[number](self.cells(one_map))
      tokens.append(self.decoders[number](query, memory))
    return jnp.concatenate(tokens, axis=1)
