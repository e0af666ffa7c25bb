"""The vision tower: a ViT of the CLIP family (Radford et al. 2021; SigLIP, Zhai et al. 2023), from pixels to patch
features."""

import jax
import jax.numpy as jnp
from flax import nnx

from mllm_jax.config import ConfigError, VisionConfig
from mllm_jax.models.attention import attention
from mllm_jax.models.layers import LayerNorm, Linear, normal, stack

ACTIVATIONS = {
  "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
  "gelu": lambda x: jax.nn.gelu(x, approximate=False),
  "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


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

  def __call__(self, x: jax.Array) -> jax.Array:
    """x [B, P, C] -> [B, P, C]."""
    h = self.norm1(x)
    split = lambda y: y.reshape(*y.shape[:2], self.heads, -1)
    attended = attention(split(self.q_proj(h)), split(self.k_proj(h)), split(self.v_proj(h)))
    x = x + self.out_proj(attended.reshape(x.shape))
    return x + self.fc2(ACTIVATIONS[self.activation](self.fc1(self.norm2(x))))


class VisionTower(nnx.Module):
  """Patch features `hidden_states[select_layer]` without the class token, as LLaVA takes them.

  Only the layers that are used exist: with the released select_layer -2 the last layer and the post-norm are neither
  computed nor stored.
  """

  def __init__(self, config: VisionConfig, *, dtype: str, rngs: nnx.Rngs):
    if not 1 <= config.patch_size <= config.image_size:
      raise ConfigError(f"vision.image_size={config.image_size} has no room for a patch of {config.patch_size} pixels")
    if config.activation not in ACTIVATIONS:
      raise ConfigError(f"vision.activation={config.activation!r} is unknown; known: {', '.join(ACTIVATIONS)}")
    self.config = config
    self.dtype = jnp.dtype(dtype)
    embedding = normal(0.02)
    self.patch_embedding = Linear(config.patch_size**2 * 3, config.width, bias=config.patch_bias, rngs=rngs)
    self.class_embedding = nnx.Param(embedding(rngs.params(), (config.width,))) if config.class_token else None
    places = config.grid**2 + config.class_token
    self.position_embedding = nnx.Param(embedding(rngs.params(), (places, config.width)))
    self.pre_norm = LayerNorm(config.width, config.norm_eps, rngs=rngs) if config.pre_norm else None
    self.layers = stack(lambda rngs: VisionLayer(config, rngs=rngs), config.layers_used, rngs)

  def normalise(self, pixels: jax.Array) -> jax.Array:
    """uint8 [..., H, W, 3] -> float32 of the same shape: (pixels / 255 - mean) / std by colour."""
    mean, std = jnp.asarray(self.config.mean, jnp.float32), jnp.asarray(self.config.std, jnp.float32)
    return (pixels.astype(jnp.float32) / 255 - mean) / std

  @jax.named_scope("vision")
  def __call__(self, images: jax.Array) -> jax.Array:
    """Normalised images, float [B, H, W, 3] -> patch features [B, P, C], row-major over the grid.

    Rows and columns of pixels that fill no patch are dropped at the bottom and the right, as by a convolution without
    padding (SigLIP-so400m's 384 pixels are 27 patches of 14 and 6 pixels).
    """
    config, grid, side = self.config, self.config.grid, self.config.patch_size
    images = images[:, : grid * side, : grid * side]
    patches = images.reshape(-1, grid, side, grid, side, 3).swapaxes(2, 3).reshape(-1, grid**2, side**2 * 3)
    x = self.patch_embedding(patches.astype(self.dtype))
    if self.class_embedding is not None:
      class_token = jnp.broadcast_to(self.class_embedding[...].astype(self.dtype), (x.shape[0], 1, config.width))
      x = jnp.concatenate([class_token, x], axis=1)
    x = x + self.position_embedding[...].astype(self.dtype)
    if self.pre_norm is not None:
      x = self.pre_norm(x)
    x, _ = jax.lax.scan(lambda x, layer: (layer(x), None), x, self.layers)
    return x[:, 1:] if self.class_embedding is not None else x
