"""Telling two checkpoints apart without reading them whole."""

import hashlib

from mllm_jax import places
from mllm_jax.weights.io import Weights

BLOCKS, BLOCK_BYTES = 16, 2**16


def fingerprint(weights: Weights) -> str:
  """A hash of the names and sizes of a checkpoint's files and of 16 blocks of 64 KiB spread over each of them."""
  digest = hashlib.sha256()
  for file in sorted({weights.file(name) for name in weights.names()}, key=str):
    content = places.open_bytes(file)
    digest.update(f"{places.base_name(file)} {content.size}\n".encode())
    for part in range(BLOCKS):
      start = content.size * part // BLOCKS
      stop = min(content.size, start + BLOCK_BYTES)
      digest.update(content.view(start, stop).tobytes())
      content.release(start, stop)
  return digest.hexdigest()[:16]
