"""Attention: the one place that chooses how it is computed."""

import jax


def attention(queries: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array | None = None) -> jax.Array:
  """softmax(Q K^T / sqrt(N)) V, the softmax in float32.

  queries [B, S, H, N]; keys and values [B, T, G, N] with G dividing H (grouped-query attention); mask bool,
  broadcastable to [B, H, S, T], True where a query may see a key. Every query must see a key. Returns [B, S, H, N].
  """
  return jax.nn.dot_product_attention(queries, keys, values, mask=mask, implementation="xla")
