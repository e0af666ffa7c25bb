"""Files and folders wherever they are: on this machine, or behind a protocol such as gs:// that fsspec knows.

A path is local (a str or Path) or remote ("PROTOCOL://..."). Everything raises PlaceError, with the path and the
remedy, where a remote place cannot be reached.
"""

import atexit
import contextlib
import functools
import mmap
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

Place = Path | str  # local places are Paths, remote ones stay text
SMALL_BYTES = 64 * 2**20  # of a configuration, an index or a tokenizer
PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs", "s3a": "s3fs", "abfs": "adlfs", "az": "adlfs"}
# What the services of fsspec call what changes with a file's content, the surest first.
VERSIONS = ("etag", "ETag", "md5Hash", "generation", "mtime", "LastModified", "last_modified", "updated", "created")
REMOTE = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
FLATTENED = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/(?!/)")


class PlaceError(ValueError):
  """A file that cannot be had from where it is; the message names it and the remedy."""


def with_home(argv: Sequence[str]) -> list[str]:
  """A command line whose `--option=~/path` means the home folder, which shells leave as it is behind a "="."""
  home = lambda found: found[1] + os.path.expanduser(found[2])
  return [re.sub(r"^(--[\w.]+=)(~(?=/|$).*)", home, argument, flags=re.DOTALL) for argument in argv]


def place(path: Place) -> Place:
  """A path in its own form: a Path where it is local, text where it is remote. file:// is local."""
  text = str(path)
  if isinstance(path, Path):
    text = FLATTENED.sub(r"\1://", text, count=1) if FLATTENED.match(text) else text  # Path("gs://x") is "gs:/x"
  found = REMOTE.match(text)
  if found is None:
    return Path(path)
  return Path(text[len("file://") :]) if found[1] == "file" else text


def is_remote(path: Place) -> bool:
  """Whether a path has a protocol other than file://."""
  return isinstance(place(path), str)


def join(folder: Place, name: str) -> Place:
  """The path of an entry of a folder."""
  folder = place(folder)
  return folder.rstrip("/") + "/" + name if isinstance(folder, str) else folder / name


def base_name(path: Place) -> str:
  """The last part of a path."""
  path = place(path)
  return path.rstrip("/").rsplit("/", 1)[-1] if isinstance(path, str) else path.name


def parent(path: Place) -> Place:
  """The folder that holds a path; of the root of a remote place, the root itself."""
  path = place(path)
  if not isinstance(path, str):
    return path.parent
  head, _, _ = path.rstrip("/").rpartition("/")
  return path if head.endswith(":/") else head


def is_file(path: Place) -> bool:
  """Whether there is a file."""
  path = place(path)
  return path.is_file() if isinstance(path, Path) else bool(_ask(path, "isfile"))


def is_dir(path: Place) -> bool:
  """Whether there is a folder; in a bucket, whether some object's name begins with the path."""
  path = place(path)
  return path.is_dir() if isinstance(path, Path) else bool(_ask(path, "isdir"))


def exists(path: Place) -> bool:
  """Whether there is a file or folder."""
  path = place(path)
  return path.exists() if isinstance(path, Path) else bool(_ask(path, "exists"))


def names(folder: Place) -> list[str]:
  """The names of a folder's entries, sorted."""
  folder = place(folder)
  if isinstance(folder, Path):
    return sorted(os.listdir(folder))
  listed = {str(entry).rstrip("/") for entry in _ask(folder, "ls", detail=False)}
  # Buckets may list the folder itself, as an empty object that stands for it.
  return sorted(
    {entry.rsplit("/", 1)[-1] for entry in listed if not folder.rstrip("/").endswith("/" + entry.strip("/"))}
  )


def files(folder: str) -> dict[str, tuple[int, str]]:
  """{name: (bytes, what tells this version of it from others)} of the files in a remote folder, by one request."""
  found = {}
  for entry in _ask(folder, "ls", detail=True):
    if entry.get("type") == "file" and isinstance(entry.get("size"), int):
      version = next((entry[key] for key in VERSIONS if entry.get(key)), "")
      found[str(entry["name"]).rsplit("/", 1)[-1]] = entry["size"], str(version)
  return found


def size(path: Place) -> int:
  """The bytes of a file."""
  path = place(path)
  if isinstance(path, Path):
    return path.stat().st_size
  found = _ask(path, "size")
  if not isinstance(found, int):
    raise PlaceError(f"{path}: its server does not say how long it is; copy it to a local folder")
  return found


def read_bytes(path: Place, limit: int = SMALL_BYTES) -> bytes:
  """A small file as a whole. Raises PlaceError where it is longer than `limit` bytes."""
  path = place(path)
  length = size(path)
  if length > limit:
    raise PlaceError(
      f"{path} has {length} bytes, and at most {limit} are expected of such a file; is it the right one?"
    )
  if isinstance(path, Path):
    return path.read_bytes()
  return bytes(_ask(path, "cat_file"))


def read_text(path: Place, limit: int = SMALL_BYTES) -> str:
  """A small UTF-8 file as a whole. Raises PlaceError where it is longer than `limit` bytes or not UTF-8."""
  try:
    return read_bytes(path, limit).decode("utf-8")
  except UnicodeDecodeError as error:
    raise PlaceError(f"{path} is not UTF-8 text ({error}); download it again") from error


def fetch(path: Place) -> bytes:
  """A file as a whole, however long, in one request. Raises FileNotFoundError where it is known not to be there."""
  path = place(path)
  if isinstance(path, Path):
    return path.read_bytes()
  system, inner = _filesystem(path)
  try:
    return bytes(system.cat_file(inner))
  except FileNotFoundError:
    raise
  except Exception as error:  # each service has errors of its own
    raise unreachable(path, error) from error


def download(path: str, to: Path) -> None:
  """Copies a remote file to a local one, whatever its size."""
  system, inner = _filesystem(path)
  try:
    system.get_file(inner, str(to))
  except FileNotFoundError:
    raise
  except Exception as error:  # each service has errors of its own
    raise unreachable(path, error) from error


def local_copy(folder: Place, wanted: list[str]) -> Path:
  """A local folder with the small files `wanted` of a folder, for code that reads local files only.

  A local folder is returned as it is. Of a remote one the files are brought once per process, into a folder of the same
  name that is removed at exit; files that are not there are left out. Raises PlaceError for a file above 64 MiB.
  """
  folder = place(folder)
  if isinstance(folder, Path):
    return folder
  copy = _folder_for(folder.rstrip("/"))
  for name in wanted:
    if name != Path(name).name:
      raise ValueError(f"{name!r} is not the name of a file in a folder")
    if not (copy / name).exists() and is_file(join(folder, name)):
      (copy / name).write_bytes(read_bytes(join(folder, name)))
  return copy


@functools.cache
def _folder_for(remote: str) -> Path:
  top = Path(tempfile.mkdtemp(prefix="mllm_jax_"))
  atexit.register(shutil.rmtree, top, ignore_errors=True)
  copy = top / (base_name(remote) or "folder")
  copy.mkdir()
  return copy


def _filesystem(path: str):
  """The fsspec file system of a remote path, and the path as that system writes it."""
  import fsspec  # only here: a run from local files starts without it

  protocol = REMOTE.match(path)[1]
  try:
    return fsspec.core.url_to_fs(path)
  except ImportError as error:
    package = PACKAGES.get(protocol)
    remedy = f"pip install {package}" if package else str(error)
    raise PlaceError(f"{path}: the package that reads {protocol}:// is not installed; {remedy}") from error
  except ValueError as error:
    raise PlaceError(f"{path}: nothing is known that reads {protocol}:// ({error}); copy it to a folder") from error
  except Exception as error:  # each service has errors of its own, such as for credentials
    raise unreachable(path, error) from error


def _ask(path: str, method: str, **options):
  """The answer of a remote file system, as it is now rather than as it was when first listed."""
  system, inner = _filesystem(path)
  try:
    system.invalidate_cache()
    return getattr(system, method)(inner, **options)
  except Exception as error:  # each service has errors of its own
    raise unreachable(path, error) from error


def unreachable(path: str, error: Exception) -> PlaceError:
  """The error for a remote place that answers with an error."""
  what = f"{type(error).__name__}: {str(error)[:200]}"
  return PlaceError(f"{path} cannot be read ({what}); check the path, the network and the credentials")


class Bytes(Protocol):
  """The bytes of one file."""

  size: int

  def view(self, start: int, stop: int) -> np.ndarray:
    """Bytes start to stop as a read-only uint8 array. Raises ValueError for a range outside the file."""
    ...

  def release(self, start: int, stop: int) -> None:
    """Lets go of the memory of a range that is not needed for now; it may be viewed again."""
    ...


class MappedBytes:
  """A local file, mapped into memory."""

  def __init__(self, path: Path):
    with open(path, "rb") as file:
      self.size = os.fstat(file.fileno()).st_size
      # An empty file cannot be mapped.
      self._map = mmap.mmap(file.fileno(), self.size, access=mmap.ACCESS_READ) if self.size else None
    self._bytes = np.frombuffer(self._map if self.size else b"", np.uint8)

  def view(self, start: int, stop: int) -> np.ndarray:
    check_range(self, start, stop)
    return self._bytes[start:stop]

  def release(self, start: int, stop: int) -> None:
    check_range(self, start, stop)
    if start == stop or not hasattr(mmap, "MADV_DONTNEED"):
      return
    # Whole pages only; neighbours that share the outer ones find them in the page cache again.
    first = start - start % mmap.PAGESIZE
    with contextlib.suppress(OSError):  # advice: a kernel may decline it
      self._map.madvise(mmap.MADV_DONTNEED, first, stop - first)


class RangedBytes:
  """A remote file, read by ranges. Only the range fetched last is kept."""

  def __init__(self, path: str):
    self.path, self.size = path, size(path)
    self._system, self._inner = _filesystem(path)
    self._last = (0, np.zeros(0, np.uint8))

  def view(self, start: int, stop: int) -> np.ndarray:
    check_range(self, start, stop)
    first, kept = self._last  # one attribute, so that threads see both parts of the same range
    if not first <= start <= stop <= first + len(kept):
      try:
        fetched = self._system.cat_file(self._inner, start=start, end=stop) if start < stop else b""
      except Exception as error:  # each service has errors of its own
        raise unreachable(self.path, error) from error
      if len(fetched) != stop - start:
        raise PlaceError(
          f"{self.path}: {len(fetched)} bytes came instead of {stop - start} from {start}; it was cut or replaced "
          "while it was read, start again"
        )
      first, kept = start, np.frombuffer(fetched, np.uint8)
      self._last = (first, kept)
    view = kept[start - first : stop - first]
    view.flags.writeable = False
    return view

  def release(self, start: int, stop: int) -> None:
    check_range(self, start, stop)
    first, kept = self._last
    if start < first + len(kept) and first < stop:
      self._last = (0, np.zeros(0, np.uint8))


def check_range(source: Bytes, start: int, stop: int) -> None:
  if not 0 <= start <= stop <= source.size:
    raise ValueError(f"bytes {start} to {stop} do not lie within {source.size} bytes")


def open_bytes(path: Place) -> Bytes:
  """The bytes of a file, local or remote. Raises PlaceError or OSError where it cannot be opened."""
  path = place(path)
  return RangedBytes(path) if isinstance(path, str) else MappedBytes(path)
