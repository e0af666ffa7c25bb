"""The vision tower: a ViT of the CLIP family (Radford et al. 2021; SigLIP, Zhai et al. 2023; InternViT, Chen et al.
2024), from pixels to patch features."""

import jax
import jax.numpy as jnp
from flax import nnx

from mllm_jax.config import ConfigError, VisionConfig
from mllm_jax.models import attention as attention_lib
from mllm_jax.models import flat
from mllm_jax.models.layers import LayerNorm, Linear, normal, stack
from mllm_jax.sharding import rows_only

ACTIVATIONS = {
  "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
  "gelu": lambda x: jax.nn.gelu(x, approximate=False),
  "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}
LAYER_SCALE = 0.1  # InternViT's, before any training


class VisionLayer(nnx.Module):
  """One pre-norm transformer layer."""

  def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
    self.heads = config.heads
    self.activation = config.activation
    self.norm1 = LayerNorm(config.width, config.norm_eps, rngs=rngs)
    self.q_proj = Linear(config.width, config.width, bias=True, rngs=rngs)
    self.k_proj = Linear(config.width, config.width, bias=True, rngs=rngs)
    self.v_proj = Linear(config.width, config.width, bias=True, rngs=rngs)
    self.out_proj = Linear(config.width, config.width, bias=True, rngs=rngs)
    self.norm2 = LayerNorm(config.width, config.norm_eps, rngs=rngs)
    self.fc1 = Linear(config.width, config.mlp_width, bias=True, rngs=rngs)
    self.fc2 = Linear(config.mlp_width, config.width, bias=True, rngs=rngs)
    scale = lambda: nnx.Param(jnp.full(config.width, LAYER_SCALE, jnp.float32)) if config.layer_scale else None
    self.attention_scale, self.mlp_scale = scale(), scale()

  def __call__(self, x: jax.Array, lengths: jax.Array | None = None, attention: str = "auto") -> jax.Array:
    """x [N, P, C] -> [N, P, C]; lengths int32 [N]: how many of the first patches may be seen, None: all; attention: as
    in `ModelConfig`."""
    h = self.norm1(x)
    split = lambda y: y.reshape(*y.shape[:2], self.heads, -1)
    q, k, v = split(self.q_proj(h)), split(self.k_proj(h)), split(self.v_proj(h))
    attended = attention_lib.bidirectional(q, k, v, lengths, implementation=attention)
    scaled = lambda y, scale: y if scale is None else y * scale[...].astype(y.dtype)
    x = x + scaled(self.out_proj(attended.reshape(x.shape)), self.attention_scale)
    return x + scaled(self.fc2(ACTIVATIONS[self.activation](self.fc1(self.norm2(x)))), self.mlp_scale)


class VisionTower(nnx.Module):
  """Patch features `hidden_states[select_layer]` without the class token, as LLaVA takes them.

  Only the layers that are used exist: with the released select_layer -2 the last layer and the post-norm are neither
  computed nor stored.

  any_aspect: images of any grid, as LLaVA-UHD has them (Guo et al. 2024, section 3.2), on one padded length: the table
  of positions is resized bicubically to each image's grid, and padding is masked. Otherwise every image has the grid
  that the tower was trained on.

  remat: the backward pass, where the tower is trained, computes each layer again instead of keeping what is inside it.
  attention: as in `ModelConfig`.
  """

  def __init__(
    self,
    config: VisionConfig,
    *,
    any_aspect: bool = False,
    dtype: str,
    remat: bool = False,
    attention: str = "auto",
    rngs: nnx.Rngs,
  ):
    if not 1 <= config.patch_size <= config.image_size:
      raise ConfigError(f"vision.image_size={config.image_size} has no room for a patch of {config.patch_size} pixels")
    if config.activation not in ACTIVATIONS:
      raise ConfigError(f"vision.activation={config.activation!r} is unknown; known: {', '.join(ACTIVATIONS)}")
    self.config = config
    self.any_aspect = any_aspect
    self.remat = remat
    self.attention = attention
    self.dtype = jnp.dtype(dtype)
    embedding = normal(0.02)
    self.patch_embedding = Linear(config.patch_values, config.width, bias=config.patch_bias, rngs=rngs)
    self.class_embedding = nnx.Param(embedding(rngs.params(), (config.width,))) if config.class_token else None
    places = config.grid**2 + config.class_token
    self.position_embedding = nnx.Param(embedding(rngs.params(), (places, config.width)))
    self.pre_norm = LayerNorm(config.width, config.norm_eps, rngs=rngs) if config.pre_norm else None
    self.layers = stack(lambda rngs: VisionLayer(config, rngs=rngs), config.layers_used, rngs)

  def normalise(self, patches: jax.Array) -> jax.Array:
    """uint8 [..., 3 p p] -> float32 of the same shape: (pixels / 255 - mean) / std by colour."""
    mean, std = jnp.asarray(self.config.mean, jnp.float32), jnp.asarray(self.config.std, jnp.float32)
    pixels = patches.reshape(*patches.shape[:-1], -1, 3).astype(jnp.float32) / 255
    return ((pixels - mean) / std).reshape(patches.shape)

  @jax.named_scope("vision")
  def __call__(self, patches: jax.Array, grids: jax.Array | None = None) -> jax.Array:
    """Normalised patches, float [..., P, 3 p p] -> patch features [..., P, C], row by row over each grid.

    grids: int32 [..., 2], with any_aspect; features beyond a grid's end are of no use.
    """
    config, axes = self.config, patches.shape[:-1]
    patches = patches.reshape(-1, *patches.shape[-2:])
    x = self.patch_embedding(patches.astype(self.dtype))
    before = int(config.class_token)
    if config.class_token:
      class_token = jnp.broadcast_to(self.class_embedding[...].astype(self.dtype), (x.shape[0], 1, config.width))
      x = jnp.concatenate([class_token, x], axis=1)
    if self.any_aspect:
      positions, valid = self._positions(grids.reshape(-1, 2), patches.shape[1])
      x = x + positions.astype(self.dtype)
      # An unused crop would see nothing at all without a class token.
      lengths = jnp.maximum(valid.sum(axis=1, dtype=jnp.int32), 1)
    else:
      x, lengths = x + self.position_embedding[...].astype(self.dtype), None
    if self.pre_norm is not None:
      x = self.pre_norm(x)
    run = lambda layer, x: layer(x, lengths, self.attention)
    run = jax.checkpoint(run) if self.remat else run
    x, _ = jax.lax.scan(lambda x, layer: (rows_only(run(layer, x)), None), rows_only(x), self.layers)
    return x[:, before:].reshape(*axes, config.width)

  def _positions(self, grids: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
    """The table of positions resized to each grid, float32 [N, places, C], and which places are an image's [N, places],
    the first ones; a class token's place is the very first."""
    table, side = self.position_embedding[...].astype(jnp.float32), self.config.grid
    before = int(self.config.class_token)
    row, column, valid = flat.coordinates(grids, length)
    rows = flat.bicubic_matrix(row, grids[:, 0], side, side)
    columns = flat.bicubic_matrix(column, grids[:, 1], side, side)
    weights = (rows[..., :, None] * columns[..., None, :]).reshape(*row.shape, side**2)
    patches = jnp.einsum("nij,jc->nic", weights, table[before:], preferred_element_type=jnp.float32)
    first = jnp.broadcast_to(table[:before], (len(grids), before, table.shape[-1]))
    valid = jnp.concatenate([jnp.ones((len(grids), before), bool), valid], axis=1)
    return jnp.concatenate([first, patches], axis=1), valid
