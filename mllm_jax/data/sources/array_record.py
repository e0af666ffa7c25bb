"""ArrayRecord shards whose records hold a whole sample, images included: one file read instead of two.

A record (version 1) is, in this order:

  4 bytes  b"MLLM"
  1 byte   1, the version
  4 bytes  the header's length, little-endian
  header   UTF-8 JSON: a LLaVA sample, whose "image" only says where the images came from, and "images": the bytes of
           each encoded image, in order
  images   one behind the other

A folder of shards that `prepare` finished has a manifest.json that says how many records each has, and beside each
shard its `outlines`.
"""

import dataclasses
import fnmatch
import functools
import glob
import json
import os
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from mllm_jax import places
from mllm_jax.data.records import DataError, Records, Sample, parse_sample
from mllm_jax.data.sources import SHARD, outlines, shard_cache

MAGIC, VERSION = b"MLLM", 1
HEAD = struct.Struct("<4sBI")
MANIFEST = "manifest.json"
PLAN = "plan.json"  # stands in a folder while `prepare` is at work
# Every record is compressed alone, so that reading one does not mean decompressing its neighbours.
WRITE_OPTIONS = "group_size:1"
READ_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"  # the library's own advice for random access


def encode_record(sample: Sample, images: Sequence[bytes]) -> bytes:
  """A sample as a record; `images` are its encoded images. The same sample gives the same bytes."""
  header = header_of(sample)
  text = json.dumps({**header, "images": [len(image) for image in images]}, ensure_ascii=False).encode()
  return HEAD.pack(MAGIC, VERSION, len(text)) + text + b"".join(images)


def header_of(sample: Sample) -> dict:
  """A LLaVA sample with its images' names alone, from which `parse_sample` makes it again."""
  turns = [{"from": "system", "value": sample.system}] if sample.system is not None else []
  for turn in sample.turns:
    turns.append({"from": turn.role, "value": turn.text} | ({"category": turn.category} if turn.category else {}))
  names = {"image": list(sample.names)} if sample.names else {}
  return {"id": sample.id, "conversations": turns} | names | ({"category": sample.category} if sample.category else {})


def decode_record(record: bytes, index: int, source: str) -> Sample:
  """The sample of a record; its images are bytes. Raises DataError where the record is not of this format."""
  name = f"{source}, sample {index}"
  if len(record) < HEAD.size or record[:4] != MAGIC:
    raise DataError(f"{name}: is no record of this package; write the shards with `python -m mllm_jax.data prepare`")
  _, version, length = HEAD.unpack_from(record)
  if version != VERSION:
    raise DataError(f"{name}: is of format {version}, and this version reads {VERSION}; write the shards again")
  start = HEAD.size + length
  try:
    header = json.loads(record[HEAD.size : start])
    sizes = header.pop("images")
    stops = start + np.cumsum([0, *sizes])
    whole = int(stops[-1]) == len(record)
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise DataError(f"{name}: its header is damaged ({error}); write the shard again") from error
  if not whole:
    raise DataError(f"{name}: has {len(record)} bytes where {int(stops[-1])} are announced; write the shard again")
  sample = parse_sample(header, index, source, "")
  images = tuple(record[a:b] for a, b in zip(stops.tolist(), stops.tolist()[1:]))
  return dataclasses.replace(sample, images=images)


class ArrayRecords(Records):
  """The records of several shards, one behind the other, in the order of the shards' names.

  Can be pickled, and used by several threads. Made by `ArrayRecords.open`.

  states: (bytes, version) of each shard where they are remote, else ().
  """

  def __init__(
    self,
    source: str,
    shards: Sequence[str],
    counts: Sequence[int],
    states: Sequence[tuple[int, str]] = (),
    outline: outlines.Outlines | None = None,
  ):
    self.source, self.shards, self.states, self._outline = source, tuple(shards), tuple(states), outline
    self._first = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

  @classmethod
  def open(cls, path: str) -> "ArrayRecords":
    """Opens a shard, a folder of them, or a pattern such as "shards/train-*.arrayrecord".

    Remote ones are copied when a sample of theirs is asked for, or now where no manifest says how many they hold.

    Raises:
      DataError: there is none, one is damaged or missing, or the folder is not finished.
      PlaceError: a remote place cannot be read.
    """
    if places.is_remote(path):
      return cls._open_remote(path)
    shards = _shards(path)
    counts = [_reader(shard).num_records() for shard in shards]
    if not sum(counts):
      raise DataError(f"{path}: holds no samples; set data.path to shards with at least one")
    if not os.path.isdir(path):
      return cls(path, shards, counts)
    manifest = read_manifest(path)
    _check_manifest(path, manifest, shards, counts, os.path.exists(os.path.join(path, PLAN)))
    there = {entry.name: (entry.stat().st_size, "") for entry in os.scandir(path) if entry.is_file()}
    return cls(path, shards, counts, (), _outlines_beside(path, shards, counts, manifest, there))

  @classmethod
  def _open_remote(cls, path: str) -> "ArrayRecords":
    whole = not path.endswith(SHARD)
    folder, pattern = (path, "*" + SHARD) if whole else (str(places.parent(path)), places.base_name(path))
    there = places.files(folder)
    names = sorted(fnmatch.filter(there, pattern))
    if not names:
      raise DataError(f"{path}: no {SHARD} file there; set data.path to the shards, or their folder")
    manifest = parse_manifest(*_text(str(places.join(folder, MANIFEST)))) if MANIFEST in there else None
    said = {shard["name"]: shard for shard in manifest["shards"]} if manifest else {}
    for name in names:
      if name in said and said[name].get("bytes", there[name][0]) != there[name][0]:
        raise DataError(
          f"{folder}/{name}: has {there[name][0]} bytes of {said[name]['bytes']} that {MANIFEST} says; copy it again"
        )
    shards, states = [str(places.join(folder, name)) for name in names], [there[name] for name in names]
    counts = [
      said[name]["samples"] if name in said else _reader(shard, state).num_records()
      for name, shard, state in zip(names, shards, states)
    ]
    if not sum(counts):
      raise DataError(f"{path}: holds no samples; set data.path to shards with at least one")
    if whole:
      _check_manifest(path, manifest, shards, counts, PLAN in there)
    return cls(path, shards, counts, states, _outlines_beside(path, shards, counts, manifest, there))

  def __reduce__(self):
    return ArrayRecords, (self.source, self.shards, np.diff(self._first).tolist(), self.states, self._outline)

  def outlines(self) -> Records:
    """The samples without their images, where `prepare` wrote them beside the shards; else the samples as they are."""
    return self if self._outline is None else self._outline

  def __len__(self) -> int:
    return int(self._first[-1])

  def __getitem__(self, i: int) -> Sample:
    """Sample i. Raises IndexError past the end, DataError if the record cannot be read or is of another format."""
    index = self._index(i)
    shard = int(np.searchsorted(self._first, index, side="right")) - 1
    within = index - int(self._first[shard])
    path = self.shards[shard]
    try:
      (record,) = _reader(path, self.states[shard] if self.states else None).read([within])
    except places.PlaceError:  # no fault of the sample's, and so nothing to skip
      raise
    except (RuntimeError, ValueError, IndexError) as error:
      raise DataError(f"{path}, record {within}: cannot be read ({str(error)[:200]}); write the shard again") from error
    return decode_record(record, index, self.source)


def _outlines_beside(
  source: str, shards: Sequence[str], counts: Sequence[int], manifest: dict | None, there: dict[str, tuple[int, str]]
) -> outlines.Outlines | None:
  """What lies beside the shards as their manifest says, or None; `there`: the folder's files, (bytes, version) each."""
  said = {shard["name"]: shard.get("outlines") for shard in (manifest or {"shards": []})["shards"]}
  files, states = [], []
  for shard in shards:
    name = places.base_name(shard)
    beside = outlines.name_for(name)
    if said.get(name) is None or there.get(beside, (None, ""))[0] != said[name]:
      return None
    files.append(str(places.join(places.parent(shard), beside)))
    states.append(there[beside])
  return outlines.Outlines(source, files, states if places.is_remote(shards[0]) else (), counts)


@functools.cache
def _reader(shard: str, state: tuple[int, str] | None = None) -> Any:
  """The open reader of a shard, one in a process: it may be shared by threads, and cannot be pickled."""
  local = shard if state is None else str(shard_cache.local_copy(shard, *state))
  if not os.path.isfile(local):
    raise DataError(f"{shard}: no such file; write the shards again with `python -m mllm_jax.data prepare`")
  from array_record.python import array_record_module  # not where a run reads JSON

  reader = array_record_module.ArrayRecordReader(local, options=READ_OPTIONS)
  if not reader.ok():  # the library says so instead of raising
    raise DataError(f"{shard}: is no ArrayRecord file, or was cut; copy or write it again")
  return reader


def _shards(path: str) -> list[str]:
  if os.path.isdir(path):
    found = sorted(glob.glob(os.path.join(glob.escape(path), "*" + SHARD)))
    if not found:
      raise DataError(
        f"{path}: cannot be read as a data set: it is a folder without {SHARD} files; set data.path to a LLaVA JSON or "
        "JSON Lines file, or to a folder that `python -m mllm_jax.data prepare` wrote"
      )
    return found
  if os.path.isfile(path):
    return [path]
  found = sorted(glob.glob(path))
  if not found:
    raise DataError(f"{path}: no such file, and no file matches it; set data.path to the shards, or their folder")
  return found


def read_manifest(folder: str) -> dict | None:
  """What manifest.json of a local folder says; None where there is none. Raises DataError where it makes no sense."""
  path = os.path.join(folder, MANIFEST)
  return parse_manifest(*_text(path)) if os.path.isfile(path) else None


def _text(path: str) -> tuple[str, str]:
  try:
    return path, places.read_text(path)
  except OSError as error:
    raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def parse_manifest(path: str, text: str) -> dict:
  """What the manifest in `path` says. Raises DataError where it cannot be understood."""
  try:
    content = json.loads(text)
    content["format"], [(shard["name"], shard["samples"]) for shard in content["shards"]]
  except (ValueError, KeyError, TypeError) as error:
    raise DataError(f"{path}: is damaged ({error}); write the folder again with `mllm_jax.data prepare`") from error
  return content


def _check_manifest(
  folder: str, manifest: dict | None, shards: Sequence[str], counts: Sequence[int], begun: bool
) -> None:
  """Raises DataError where a folder does not hold what its manifest says. One without a manifest is taken as it is,
  unless `prepare` has begun it."""
  if manifest is None:
    if begun:
      raise DataError(f"{folder}: is not finished; start the same `python -m mllm_jax.data prepare` again")
    return
  there = {os.path.basename(shard): count for shard, count in zip(shards, counts, strict=True)}
  said = {shard["name"]: shard["samples"] for shard in manifest["shards"]}
  wrong = sorted(name for name in there.keys() | said.keys() if there.get(name, 0) != said.get(name, 0))
  if wrong:
    name = wrong[0]
    raise DataError(
      f"{folder}: {len(wrong)} shards are not what {MANIFEST} says, such as {name}: {there.get(name, 0)} samples of "
      f"{said.get(name, 0)}; copy the folder again"
    )
