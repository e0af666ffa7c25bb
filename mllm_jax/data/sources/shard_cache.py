"""Copies of remote shards on this machine: ArrayRecord's library opens local files only.

Each is made when its first sample is asked for, and kept for later runs, in MLLM_JAX_CACHE, or a folder of the user's
cache (XDG_CACHE_HOME, ~/.cache). A shard that changed in the bucket is another one; nothing is ever removed.
"""

import fcntl
import hashlib
import os
import shutil
from pathlib import Path

from mllm_jax import places

SPARE = 2**28  # bytes that are left free on the disk


def folder() -> Path:
  """Where the copies lie."""
  if named := os.environ.get("MLLM_JAX_CACHE"):
    return Path(named)
  return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mllm_jax" / "shards"


def local_copy(shard: str, size: int, version: str) -> Path:
  """A local copy of a remote file of `size` bytes; `version` tells it from what had its name before or after.

  Processes and threads that ask for the same one wait for whoever copies it.

  Raises:
    PlaceError: the file is not there, not so long, or cannot be read, or the disk has no room for it.
  """
  top = folder()
  name = hashlib.sha256(f"{shard} {size} {version}".encode()).hexdigest()[:16] + "-" + places.base_name(shard)
  target = top / name
  if target.is_file():  # renamed to this when it was whole
    return target
  try:
    top.mkdir(parents=True, exist_ok=True)
    with open(top / f"{name}.lock", "w") as lock:
      fcntl.flock(lock, fcntl.LOCK_EX)
      if not target.is_file():
        _copy(shard, size, top / f"{name}.partial", target)
  except places.PlaceError:
    raise
  except FileNotFoundError:
    raise places.PlaceError(f"{shard}: is not there any more; write or copy the shards again") from None
  except OSError as error:
    raise places.PlaceError(
      f"{shard}: cannot be copied to {top} ({error.strerror}); name another folder with MLLM_JAX_CACHE"
    ) from error
  return target


def _copy(shard: str, size: int, partial: Path, target: Path) -> None:
  free = shutil.disk_usage(partial.parent).free
  if free < size + SPARE:
    raise places.PlaceError(
      f"{shard}: {size / 2**20:,.0f} MiB to copy, and {partial.parent} has {free / 2**20:,.0f} MiB free; name a folder "
      "on a larger disk with MLLM_JAX_CACHE, or mount the bucket (gcsfuse for gs://) and name the local folder"
    )
  try:
    places.download(shard, partial)
    found = partial.stat().st_size
    if found != size:
      raise places.PlaceError(
        f"{shard}: {found} bytes came where {size} are listed; it was cut or replaced, start again"
      )
    os.replace(partial, target)
  finally:
    partial.unlink(missing_ok=True)
