"""Attention: the one place that chooses how it is computed.

"splash"  JAX's Pallas kernel for TPUs, with segment ids, under `jax.shard_map`; on a CPU its slow interpreter
"cudnn"   cuDNN's flash attention on NVIDIA GPUs, in 16 bits; for rows of one sample and padding after it
"xla"     plain products, a block of queries at a time; anywhere, with segment ids
"auto"    the first of these that is made for the device and can do what is asked for
"""

import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from mllm_jax.config import ConfigError
from mllm_jax.sharding import BATCH_AXES

IMPLEMENTATIONS = ("auto", "splash", "cudnn", "xla")
SAVED_NAME = "attended"  # by which a remat policy keeps the result, and splash's row sums with it
CUDNN_HEAD_WIDTH = 128  # the widest that every GPU with flash attention takes
XLA_BLOCK = 512  # queries whose logits are held at a time
SPLASH_BLOCKS = (512, 384, 256)  # for sequences above SPLASH_WHOLE places; below, the sequence is one block
SPLASH_WHOLE, SPLASH_LANES = 768, 128


def attention(queries: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array | None = None) -> jax.Array:
  """softmax(Q K^T / sqrt(N)) V by plain products, the softmax in float32.

  queries [B, S, H, N]; keys and values [B, T, G, N] with G dividing H (grouped-query attention); mask bool,
  broadcastable to [B, H, S, T], True where a query may see a key. Every query must see a key. Returns [B, S, H, N].
  """
  return jax.nn.dot_product_attention(queries, keys, values, mask=mask, implementation="xla")


def causal(
  queries: jax.Array,
  keys: jax.Array,
  values: jax.Array,
  segment_ids: jax.Array,
  *,
  window: int = 0,
  implementation: str = "auto",
  packed: bool = True,
) -> jax.Array:
  """Attention of whole rows, where a query sees the keys of its own segment up to its own place, or with a `window` the
  last so many of them.

  queries [B, S, H, N]; keys and values [B, S, G, N]; segment_ids int [B, S], 0: padding. Where not `packed` each row
  must be one segment with padding after it. Returns [B, S, H, N]; what stands at padding is finite and of no use.
  """
  chosen = choose(implementation, packed=packed, dtype=queries.dtype, head_width=queries.shape[-1])
  window = window if window < queries.shape[1] else 0  # one that holds the whole row is none
  if chosen == "splash":
    return splash(queries, keys, values, segment_ids, segment_ids, is_causal=True, window=window)
  if chosen == "cudnn":
    lengths = (segment_ids > 0).sum(axis=1, dtype=jnp.int32)
    attended = cudnn(queries, keys, values, lengths, is_causal=True, window=window)
  else:
    attended = _causal_blocks(queries, keys, values, segment_ids, window)
  return checkpoint_name(attended, SAVED_NAME)


def causal_mask(queries_at: jax.Array, keys_at: jax.Array, window: int) -> jax.Array:
  """bool [..., S, T]: whether the query at a place of `queries_at` [..., S] sees the key at one of `keys_at` [..., T],
  which is none after its own and, with a `window`, one of the last so many."""
  back = queries_at[..., :, None] - keys_at[..., None, :]
  return (back >= 0) & (back < window) if window else back >= 0


def bidirectional(
  queries: jax.Array,
  keys: jax.Array,
  values: jax.Array,
  lengths: jax.Array | None = None,
  *,
  implementation: str = "auto",
) -> jax.Array:
  """Attention where every query sees the first `lengths` keys of its row, int32 [B] of 1 or more; None: all of them.

  queries, keys and values [B, S, H, N]. Returns [B, S, H, N].
  """
  chosen = choose(implementation, packed=False, dtype=queries.dtype, head_width=queries.shape[-1])
  seen = None if lengths is None else jnp.arange(keys.shape[1]) < lengths[:, None]
  if chosen == "splash":
    ones = jnp.ones(queries.shape[:2], jnp.int32)
    return splash(queries, keys, values, ones, ones if seen is None else seen.astype(jnp.int32), is_causal=False)
  if chosen == "cudnn":
    return cudnn(queries, keys, values, lengths, is_causal=False)
  return attention(queries, keys, values, None if seen is None else seen[:, None, None])


def check(implementation: str) -> None:
  """Raises ConfigError for an implementation that does not exist."""
  if implementation not in IMPLEMENTATIONS:
    raise ConfigError(f"model.attention={implementation!r} is unknown; known: {', '.join(IMPLEMENTATIONS)}")


def choose(implementation: str, *, packed: bool, dtype: jnp.dtype, head_width: int) -> str:
  """The implementation that "auto" stands for, or the given one. Raises ConfigError where that cannot work."""
  check(implementation)
  device = _device()
  small = jnp.dtype(dtype).itemsize == 2 and head_width % 8 == 0 and head_width <= CUDNN_HEAD_WIDTH
  if implementation == "auto":
    # Without a mesh nobody says how arrays on several chips are split, and the kernel needs to know.
    if device == "tpu" and (not jax.sharding.get_abstract_mesh().empty or jax.device_count() == 1):
      return "splash"
    return "cudnn" if device == "gpu" and small and not packed else "xla"
  problem = None
  if implementation == "splash" and device == "gpu":
    problem = "is for TPUs, and this is a GPU"
  elif implementation == "cudnn" and device != "gpu":
    problem = f"is for NVIDIA GPUs, and this is a {device.upper()}"
  elif implementation == "cudnn" and packed:
    problem = "cannot keep the samples of packed rows apart"
  elif implementation == "cudnn" and not small:
    problem = (
      f"takes 16 bits and heads of at most {CUDNN_HEAD_WIDTH}, a multiple of 8; these are {jnp.dtype(dtype)} and "
      f"{head_width} wide"
    )
  if problem is not None:
    raise ConfigError(f"model.attention={implementation} {problem}; leave it at auto")
  return implementation


def _device() -> str:
  """The platform ("cpu", "gpu", "tpu") of the mesh that `jax.set_mesh` has set, which may be one that is only compiled
  for; without one the process' own."""
  mesh = jax.sharding.get_abstract_mesh()
  return jax.default_backend() if mesh.empty else mesh.abstract_device.platform


def _causal_blocks(queries, keys, values, segment_ids, window):
  """`causal` by plain products. A block of queries meets only the keys that some of them may see, and its logits are
  made again in the backward pass, so that those of a whole row are never held."""
  length = queries.shape[1]

  def block(queries, keys, values, segment_ids):
    count, end = queries.shape[1], keys.shape[1]
    places = jnp.arange(end)
    mine, mine_at = segment_ids[:, end - count :], places[end - count :]
    mask = (mine[:, :, None] == segment_ids[:, None, :]) & causal_mask(mine_at, places, window)
    return attention(queries, keys, values, mask[:, None])

  if length <= XLA_BLOCK:
    return block(queries, keys, values, segment_ids)
  run, parts = jax.checkpoint(block), []
  for start in range(0, length, XLA_BLOCK):
    end = min(start + XLA_BLOCK, length)
    first = max(start + 1 - window, 0) if window else 0
    parts.append(run(queries[:, start:end], keys[:, first:end], values[:, first:end], segment_ids[:, first:end]))
  return jnp.concatenate(parts, axis=1)


def cudnn(
  queries: jax.Array,
  keys: jax.Array,
  values: jax.Array,
  lengths: jax.Array | None,
  *,
  is_causal: bool,
  window: int = 0,
  implementation: str = "cudnn",
) -> jax.Array:
  """cuDNN's attention; keys from each row's length on, int32 [B], are not seen, and in causal attention with a `window`
  only the last so many are. Another implementation of `jax.nn.dot_product_attention` takes the same arguments.

  In causal attention the rows are their own keys: queries from the length on are padding too, and give 0.
  """
  seen_around = (window - 1, 0) if window else None
  call = lambda *arrays, **lengths: jax.nn.dot_product_attention(
    *arrays, is_causal=is_causal, local_window_size=seen_around, implementation=implementation, **lengths
  )
  if lengths is None:
    return call(queries, keys, values)
  lengths = jnp.maximum(lengths, 1)
  full = jnp.full_like(lengths, queries.shape[1])
  # What the kernel leaves at padding, and in its gradient there, is not said: both are made 0.
  seen = (jnp.arange(keys.shape[1]) < lengths[:, None])[..., None, None]
  blank = lambda x: jnp.where(seen, x, 0)
  if not is_causal:
    return call(queries, blank(keys), blank(values), query_seq_lengths=full, key_value_seq_lengths=lengths)
  arrays = (blank(queries), blank(keys), blank(values))
  return blank(call(*arrays, query_seq_lengths=lengths, key_value_seq_lengths=lengths))


def splash(
  queries: jax.Array,
  keys: jax.Array,
  values: jax.Array,
  query_segments: jax.Array,
  key_segments: jax.Array,
  *,
  is_causal: bool,
  window: int = 0,
) -> jax.Array:
  """The TPU kernel, each device on its own rows and heads; a query sees the keys with its segment id, in causal
  attention with a `window` the last so many.

  Rows that the mesh's batch axes do not divide, and heads that its tensor axis does not, are computed by all.
  """
  mesh = jax.sharding.get_abstract_mesh()
  run = lambda *arrays: _splash_on_one(*arrays, is_causal=is_causal, window=window)
  if mesh.empty:
    return run(queries, keys, values, query_segments, key_segments)
  divides = lambda axes, *sizes: all(size % math.prod(mesh.shape[axis] for axis in axes) == 0 for size in sizes)
  rows = BATCH_AXES if divides(BATCH_AXES, queries.shape[0]) else None
  heads = "tensor" if divides(("tensor",), queries.shape[2], keys.shape[2]) else None
  spec, ids = P(rows, None, heads, None), P(rows, None)
  return jax.shard_map(run, in_specs=(spec, spec, spec, ids, ids), out_specs=spec, check_vma=False)(
    queries, keys, values, query_segments, key_segments
  )


def splash_blocks(length: int) -> tuple[int, int]:
  """(places of a block, places of a sequence padded to blocks): the least padding, and of equals the larger block."""
  whole = -(-length // SPLASH_LANES) * SPLASH_LANES
  if whole <= SPLASH_WHOLE:
    return whole, whole
  padded = {block: -(-length // block) * block for block in SPLASH_BLOCKS}
  block = min(padded, key=padded.get)
  return block, padded[block]


def _splash_on_one(queries, keys, values, query_segments, key_segments, *, is_causal, window):
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels  # takes a while
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

  (_, length, heads, width), dtype = queries.shape, queries.dtype
  block, padded = splash_blocks(length)
  # Padding has the id 0 on both sides: no query is without a key that it may see.
  pad = lambda x: jnp.pad(x, [(0, 0), (0, padded - length)] + [(0, 0)] * (x.ndim - 2))
  arrange = lambda x: jnp.swapaxes(pad(x), 1, 2)
  shape = (padded, padded)
  if window:
    mask = masks.LocalMask(shape, window_size=(window - 1, 0), offset=0)
  else:
    mask = masks.CausalMask(shape) if is_causal else masks.FullMask(shape)
  sizes = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute")
  kernel = kernels.make_splash_mha(
    masks.MultiHeadMask([mask] * heads),
    # One kernel gives all three gradients, in five products of queries x keys; two kernels would need seven.
    block_sizes=kernels.BlockSizes(**{f"block_{name}": block for name in sizes}, use_fused_bwd_kernel=True),
    head_shards=1,
    q_seq_shards=1,
    residual_checkpoint_name=SAVED_NAME,
    interpret=_device() != "tpu",
  )
  scaled = (queries.astype(jnp.float32) / math.sqrt(width)).astype(dtype)
  segments = kernels.SegmentIds(pad(query_segments), pad(key_segments))
  attended = jax.vmap(kernel)(arrange(scaled), arrange(keys), arrange(values), segments)
  return jnp.swapaxes(attended, 1, 2)[:, :length]
