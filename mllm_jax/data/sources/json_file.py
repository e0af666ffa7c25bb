"""LLaVA's JSON and JSON Lines files, of which only the place of each sample is held in memory."""

import atexit
import functools
import json
import os
import tempfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mllm_jax import places
from mllm_jax.data.records import DataError, Records, Sample, parse_sample
from mllm_jax.data.sources import scan

SMALL_BYTES = 64 * 2**20  # of a file that is no list, up to which it is parsed to say what it is instead
REMEDY = "set data.path to a LLaVA JSON or JSON Lines file"


class JsonRecords(Records):
  """The samples of one file in its order; each is read and parsed when it is asked for.

  Relative image paths are joined to `image_folder`. Can be pickled, and used by several threads; the file must not
  change meanwhile. Made by `JsonRecords.open`.
  """

  def __init__(self, source: str, local: str, image_folder: str, starts: np.ndarray, stops: np.ndarray):
    self.source, self.image_folder = source, image_folder
    self._local, self._starts, self._stops = local, starts, stops
    self._file = os.open(local, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

  @classmethod
  def open(cls, path: str, image_folder: str) -> "JsonRecords":
    """Looks through a JSON list, or JSON Lines where the name ends in .jsonl; a remote file is copied here first.

    Raises:
      DataError: the file is missing, unreadable, neither of the two formats, or holds no sample. A mistake inside a
        sample shows when that sample is asked for.
    """
    try:
      local = _local_copy(path) if places.is_remote(path) else path
      with open(local, "rb") as file:
        elements = scan.json_lines(file) if path.endswith(".jsonl") else scan.json_list(file)
        for i in elements.odd:
          _parse(_bytes(file, int(elements.starts[i]), int(elements.stops[i])))
    except FileNotFoundError:
      raise DataError(f"{path}: no such file; {REMEDY}") from None
    except places.PlaceError as error:
      raise DataError(str(error)) from error
    except OSError as error:
      raise DataError(f"{path}: cannot be read ({error.strerror}); {REMEDY}") from error
    except UnicodeDecodeError as error:
      raise DataError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except scan.NotAList as error:
      raise _not_a_list(path, local, error) from error
    except ValueError as error:
      raise _bad_element(path, local, elements, int(i), error) from error
    if not len(elements.starts):
      raise DataError(f"{path}: holds no samples; set data.path to a file with at least one")
    return cls(path, local, image_folder, elements.starts, elements.stops)

  def __reduce__(self):
    return JsonRecords, (self.source, self._local, self.image_folder, self._starts, self._stops)

  def __del__(self):
    if hasattr(self, "_file"):
      os.close(self._file)

  def __len__(self) -> int:
    return len(self._starts)

  def __getitem__(self, i: int) -> Sample:
    """Sample i. Raises IndexError past the end, DataError if it is not JSON or not structured as a LLaVA sample."""
    index = self._index(i)
    start, stop = int(self._starts[index]), int(self._stops[index])
    try:
      raw = _parse(os.pread(self._file, stop - start, start))
    except ValueError as error:
      raise DataError(
        f"{self.source}, sample {index} (bytes {start} to {stop}): not JSON ({_reason(error)}); write it again"
      ) from error
    return parse_sample(raw, index, self.source, self.image_folder)


def _parse(data: bytes) -> Any:
  """One element. Raises ValueError where it is not JSON."""
  try:
    return json.loads(data.removeprefix(scan.BOM))
  except RecursionError as error:
    raise ValueError("brackets nested too deeply") from error


def _reason(error: ValueError) -> str:
  return error.msg if isinstance(error, json.JSONDecodeError) else str(error)


def _bytes(file: BinaryIO, start: int, stop: int) -> bytes:
  file.seek(start)
  return file.read(stop - start)


def _line(local: str, byte: int) -> int:
  """The number, from 1, of the line that holds a byte."""
  newlines = 0
  with open(local, "rb") as file:
    while byte > 0:
      data = file.read(min(byte, scan.CHUNK_BYTES))
      if not data:
        break
      newlines += data.count(b"\n")
      byte -= len(data)
  return newlines + 1


def _bad_element(path: str, local: str, elements: scan.Elements, i: int, error: ValueError) -> DataError:
  line = _line(local, int(elements.starts[i]))
  if path.endswith(".jsonl"):
    return DataError(f"{path}: line {line} is not JSON ({_reason(error)}); write one object on each line")
  line += error.lineno - 1 if isinstance(error, json.JSONDecodeError) else 0
  return DataError(f"{path}: not JSON (line {line}: {_reason(error)}); write it again as a JSON list")


def _not_a_list(path: str, local: str, error: scan.NotAList) -> DataError:
  """What is wrong with a file that is no list: the first element that does not parse, or what it is instead."""
  with open(local, "rb") as file:
    head = file.read(4096).removeprefix(scan.BOM).lstrip()
    if not head.startswith(b"["):
      return _something_else(path, file)
    for i, (start, stop) in enumerate(zip(error.elements.starts.tolist(), error.elements.stops.tolist())):
      try:
        _parse(_bytes(file, start, stop))
      except ValueError as reason:
        return _bad_element(path, local, error.elements, i, reason)
    stops = error.elements.stops
    if error.byte < 0 and len(error.elements.starts):
      try:
        _parse(_bytes(file, int(stops[-1]) + 1, int(stops[-1]) + 1 + SMALL_BYTES))
      except ValueError as reason:
        line = _line(local, int(stops[-1]) + 1) + (reason.lineno - 1 if isinstance(reason, json.JSONDecodeError) else 0)
        what = f"line {line}: {_reason(reason)}, and the list does not end"
        return DataError(f"{path}: not JSON ({what}); copy the file again if it was cut, else write it again")
  if error.byte < 0:
    what = f"line {_line(local, os.path.getsize(local))}: the list does not end; was the file cut?"
    return DataError(f"{path}: not JSON ({what}); copy or write it again")
  what = f"line {_line(local, error.byte)}: Extra data behind the list"
  return DataError(f"{path}: not JSON ({what}); JSON Lines files must be named .jsonl")


def _something_else(path: str, file: BinaryIO) -> DataError:
  file.seek(0)
  try:
    value = _parse(file.read(SMALL_BYTES))
  except json.JSONDecodeError as error:
    hint = "; JSON Lines files must be named .jsonl" if error.msg == "Extra data" else "; write it again as a JSON list"
    return DataError(f"{path}: not JSON (line {error.lineno}: {error.msg}){hint}")
  except ValueError as error:
    return DataError(f"{path}: not JSON ({error}); write it again as a JSON list")
  return DataError(
    f"{path}: holds a JSON {type(value).__name__} where a list of samples is needed; put the samples in [...]"
  )


@functools.cache
def _local_copy(path: str) -> str:
  """A temporary copy of a remote file, made once in a process and removed at its end."""
  handle, name = tempfile.mkstemp(prefix="mllm_jax_", suffix="_" + places.base_name(path))
  os.close(handle)
  atexit.register(Path(name).unlink, missing_ok=True)
  places.download(path, Path(name))
  return name
