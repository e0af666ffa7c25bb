"""ArrayRecord shards in a bucket: copied here when they are needed, once."""

import collections
import json
import pickle
import shutil
import threading

import fsspec
import pytest
from test_sources import write_shard

from mllm_jax import places
from mllm_jax.data import lengths
from mllm_jax.data.records import DataError, Records, check
from mllm_jax.data.sources import array_record, outlines, shard_cache
from mllm_jax.data.workers import in_processes
from mllm_jax.places import PlaceError

CONVERSATION = [{"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "A"}]


@pytest.fixture
def bucket(tmp_path, monkeypatch):
  """put(name, samples or text): writes a shard or a text to memory://shards; .copied counts the copies of each."""
  system = fsspec.filesystem("memory")
  monkeypatch.setenv("MLLM_JAX_CACHE", str(tmp_path / "cache"))
  array_record._reader.cache_clear()
  copied, download = collections.Counter(), places.download

  def counting(path, to):
    copied[places.base_name(path)] += 1
    download(path, to)

  monkeypatch.setattr(places, "download", counting)

  def put(name, content, first=0):
    if isinstance(content, int):
      write_shard(tmp_path / "written", content, first)
      content = (tmp_path / "written").read_bytes()
    system.pipe(f"/shards/{name}", content if isinstance(content, bytes) else content.encode())
    return len(content)

  put.copied, put.cache = copied, tmp_path / "cache"
  yield put
  system.rm("/shards", recursive=True)
  array_record._reader.cache_clear()


def with_manifest(put) -> None:
  """Three shards of 3, 2 and 4 samples, as `prepare` leaves them."""
  shards = []
  for number, (count, first) in enumerate([(3, 0), (2, 3), (4, 5)]):
    name = f"data-{number}.arrayrecord"
    shards.append({"name": name, "samples": count, "bytes": put(name, count, first)})
  put("manifest.json", json.dumps({"format": 1, "shards": shards}))


def test_a_shard_is_copied_when_it_is_needed_and_kept(bucket):
  with_manifest(bucket)
  records = Records.load("memory://shards", "")
  assert len(records) == 9 and not bucket.copied
  assert [records[i].id for i in (6, 8, 6)] == ["6", "8", "6"] and bucket.copied == {"data-2.arrayrecord": 1}
  assert records[0].name == "memory://shards, sample 0 ('0')"
  array_record._reader.cache_clear()  # as in a later run
  again = pickle.loads(pickle.dumps(Records.load("memory://shards/", "")))
  assert [sample.id for sample in again] == [str(i) for i in range(9)]
  assert set(bucket.copied.values()) == {1} and len(bucket.copied) == 3
  assert not [path for path in bucket.cache.iterdir() if path.suffix == ".partial"]

  before = lengths.source_state(records)
  bucket("data-1.arrayrecord", 2, 50)  # another with as many bytes
  array_record._reader.cache_clear()
  changed = Records.load("memory://shards", "")
  assert [sample.id for sample in changed][3:5] == ["50", "51"] and bucket.copied["data-1.arrayrecord"] == 2
  assert lengths.source_state(changed) != before == lengths.source_state(again)


def test_a_look_at_every_sample_copies_no_shard(bucket):
  with_manifest(bucket)
  manifest = json.loads(fsspec.filesystem("memory").cat("/shards/manifest.json"))
  for shard in manifest["shards"]:
    lines = [outlines.encode({"id": str(i), "conversations": CONVERSATION}, [(7, 5)]) for i in range(shard["samples"])]
    outlines.write(str(bucket.cache.parent / "outlines"), lines)
    shard["outlines"] = bucket(outlines.name_for(shard["name"]), (bucket.cache.parent / "outlines").read_bytes())
  bucket("manifest.json", json.dumps(manifest))
  records = Records.load("memory://shards", "")
  assert check(records, max_images=1) == []
  assert sorted(bucket.copied) == [f"data-{number}.outlines.gz" for number in range(3)]
  assert set(bucket.copied.values()) == {1}

  bucket("data-1.outlines.gz", b"other")  # of another size than the manifest's: not taken
  assert Records.load("memory://shards", "").outlines()[3].images != ((7, 5),)


def test_patterns_and_single_shards_need_no_manifest(bucket):
  bucket("a-0.arrayrecord", 2)
  bucket("a-1.arrayrecord", 1, 2)
  bucket("b.arrayrecord", 1, 3)
  assert [sample.id for sample in Records.load("memory://shards/a-*.arrayrecord", "")] == ["0", "1", "2"]
  assert [sample.id for sample in Records.load("memory://shards/b.arrayrecord", "")] == ["3"]
  assert len(Records.load("memory://shards", "")) == 4
  with pytest.raises(DataError, match="memory://shards/c-.*: no .arrayrecord file there"):
    Records.load("memory://shards/c-*.arrayrecord", "")


def test_many_ask_for_one_shard_at_once(bucket):
  with_manifest(bucket)
  records, found = Records.load("memory://shards", ""), []
  threads = [threading.Thread(target=lambda: found.append(records[7].id)) for _ in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert found == ["7"] * 8 and bucket.copied == {"data-2.arrayrecord": 1}


def test_worker_processes_read_the_copies(bucket):
  """The memory of this process is no bucket to others, so that only the copies are there."""
  with_manifest(bucket)
  records = Records.load("memory://shards", "")
  assert len(list(records)) == 9
  got = in_processes(records.__getitem__, [8, 0, 4], 1)
  assert [sample.id for sample in got] == ["8", "0", "4"]


def test_what_cannot_be_copied_is_named(bucket, monkeypatch):
  with_manifest(bucket)
  records = Records.load("memory://shards", "")
  fsspec.filesystem("memory").rm("/shards/data-0.arrayrecord")
  with pytest.raises(PlaceError, match="data-0.arrayrecord: is not there any more"):
    records[0]
  bucket("data-1.arrayrecord", b"cut")
  with pytest.raises(PlaceError, match="data-1.arrayrecord: 3 bytes came where [0-9]+ are listed; it was cut"):
    records[3]
  usage = shutil.disk_usage(bucket.cache)
  with monkeypatch.context() as patch:
    patch.setattr(shard_cache.shutil, "disk_usage", lambda folder: usage._replace(free=shard_cache.SPARE))
    with pytest.raises(PlaceError, match="has 256 MiB free; name a folder on a larger disk with MLLM_JAX_CACHE"):
      records[5]
  assert records[5].id == "5"
  with pytest.raises(DataError, match="2 shards|data-1.arrayrecord: has 3 bytes of [0-9]+ that manifest.json says"):
    Records.load("memory://shards", "")


def test_a_remote_folder_is_held_to_its_manifest(bucket):
  with_manifest(bucket)
  fsspec.filesystem("memory").rm("/shards/data-0.arrayrecord")
  with pytest.raises(DataError, match="1 shards are not what manifest.json says, such as data-0.arrayrecord: 0 sam"):
    Records.load("memory://shards", "")
  bucket("manifest.json", "{")
  with pytest.raises(DataError, match="memory://shards/manifest.json: is damaged"):
    Records.load("memory://shards", "")
  fsspec.filesystem("memory").rm("/shards/manifest.json")
  bucket("plan.json", "{}")
  with pytest.raises(DataError, match="is not finished; start the same"):
    Records.load("memory://shards", "")
  bucket("html.arrayrecord", "<html>" * 100)
  with pytest.raises(DataError, match="html.arrayrecord: is no ArrayRecord file"):
    Records.load("memory://shards/html.arrayrecord", "")
