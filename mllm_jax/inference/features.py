"""Visual tokens of crops, kept for as long as there is room, so that a picture is looked at once."""

import collections
import hashlib

import jax

from mllm_jax.data.processor import Row

BYTES = 256 << 20  # 55 crops of LLaVA-SP-7B's in bfloat16


class FeatureCache:
  """{digest of a crop: its visual tokens [T, D]} up to so many bytes; those not used for longest go first."""

  def __init__(self, room: int = BYTES):
    self.room = room
    self.bytes = 0
    self._kept: collections.OrderedDict[bytes, jax.Array] = collections.OrderedDict()

  def get(self, digest: bytes) -> jax.Array | None:
    found = self._kept.get(digest)
    if found is not None:
      self._kept.move_to_end(digest)
    return found

  def put(self, digest: bytes, tokens: jax.Array) -> None:
    """Keeps the tokens of a crop that is not there yet. One larger than all the room is not kept."""
    self._kept[digest] = tokens
    self.bytes += tokens.nbytes
    while self.bytes > self.room:
      self.bytes -= self._kept.popitem(last=False)[1].nbytes


def digests(row: Row) -> list[bytes]:
  """What each crop of a row is known by: its pixels and its shape."""
  used = int(row.grids.any(axis=1).sum())
  return [hashlib.blake2b(row.patches[k].tobytes() + row.grids[k].tobytes()).digest() for k in range(used)]
