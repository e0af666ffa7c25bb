"""ArrayRecord shards, TensorFlow datasets, mixes, and images under other names and in buckets."""

import io
import json
import pickle
import subprocess
import sys

import fsspec
import numpy as np
import pytest
from array_record.python import array_record_module
from PIL import Image

from mllm_jax.config import ConfigError, DataConfig
from mllm_jax.data import image_files, images
from mllm_jax.data.records import DataError, Records, Sample, Turn, check
from mllm_jax.data.sources import array_record, mix

TURNS = (Turn("human", "<image>\nQ é"), Turn("gpt", "A", "colour"))


def png(value: int) -> bytes:
  buffer = io.BytesIO()
  Image.new("RGB", (4, 4), (value, 0, 0)).save(buffer, "png")
  return buffer.getvalue()


def write_shard(path, samples, first=0):
  writer = array_record_module.ArrayRecordWriter(str(path), array_record.WRITE_OPTIONS)
  for i in range(samples):
    sample = Sample(str(first + i), i, (), TURNS, "ocr", "Be brief.")
    writer.write(array_record.encode_record(sample, [png(first + i)]))
  writer.close()


def test_a_record_gives_its_sample_back():
  for sample in (
    Sample("7", 3, (b"abc", b"", b"de"), TURNS, "ocr", "Be brief.", "x"),
    Sample("é", 0, (), (Turn("human", "Q"), Turn("gpt", "")), "", None, "x"),
    Sample("s", 1, (), TURNS, "", "", "x"),
  ):
    record = array_record.encode_record(sample, sample.images)
    assert array_record.decode_record(record, sample.index, "x") == sample
    assert record == array_record.encode_record(sample, sample.images)


@pytest.mark.parametrize(
  "damage,message",
  [
    (lambda r: b"", "no record of this package"),
    (lambda r: b"TFRe" + r[4:], "no record of this package"),
    (lambda r: r[:4] + b"\x02" + r[5:], "is of format 2, and this version reads 1"),
    (lambda r: r[:-1], "bytes where .* are announced"),
    (lambda r: r + b"x", "bytes where .* are announced"),
    (lambda r: r[:20] + b"\xff" + r[21:], "its header is damaged"),
    (lambda r: r[:12], "its header is damaged"),
  ],
)
def test_damaged_records_are_named(damage, message):
  record = array_record.encode_record(Sample("7", 0, (), TURNS), [b"abc"])
  with pytest.raises(DataError, match=f"^shard, sample 4: .*{message}.*;"):
    array_record.decode_record(damage(record), 4, "shard")


def test_shards_by_folder_pattern_and_name(tmp_path):
  for number, (count, first) in enumerate([(3, 0), (2, 3), (4, 5)]):
    write_shard(tmp_path / f"data-{number}.arrayrecord", count, first)
  for path in (tmp_path, tmp_path / "data-*.arrayrecord"):
    records = Records.load(str(path), "")
    assert [sample.id for sample in records] == [str(i) for i in range(9)]
    assert records[-1].id == "8"
    with pytest.raises(IndexError):
      records[9]
  assert [int(np.asarray(images.load(sample.images[0]))[0, 0, 0]) for sample in records] == list(range(9))
  assert [sample.id for sample in pickle.loads(pickle.dumps(records))] == [str(i) for i in range(9)]
  assert len(Records.load(str(tmp_path / "data-1.arrayrecord"), "")) == 2
  assert check(records, max_images=1) == []


def test_shards_that_cannot_be_read(tmp_path):
  for path, message in (
    (tmp_path, "a folder without .arrayrecord files"),
    (tmp_path / "x-*.arrayrecord", "no file matches"),
  ):
    with pytest.raises(DataError, match=message):
      Records.load(str(path), "")
  whole = tmp_path / "whole.arrayrecord"
  write_shard(whole, 40)
  for name, content in (("empty", b""), ("html", b"<html>" * 100), ("cut", whole.read_bytes()[:3000])):
    (tmp_path / f"{name}.arrayrecord").write_bytes(content)
    with pytest.raises(DataError, match=f"{name}.arrayrecord: is no ArrayRecord file, or was cut"):
      Records.load(str(tmp_path / f"{name}.arrayrecord"), "")


TINY = """
import io, sys
import numpy as np, tensorflow_datasets as tfds
from PIL import Image
features = tfds.features.FeaturesDict({"image": tfds.features.Image(), "image/id": np.int64,
  "captions": tfds.features.Sequence({"text": tfds.features.Text(), "id": np.int64})})
class Tiny(tfds.core.GeneratorBasedBuilder):
  VERSION = tfds.core.Version("1.0.0")
  def _info(self): return tfds.core.DatasetInfo(builder=self, features=features)
  def _split_generators(self, manager): return {"train": self._generate_examples()}
  def _generate_examples(self):
    for i in range(5):
      file = io.BytesIO(); Image.new("RGB", (4, 4), (i, 0, 0)).save(file, "png"); file.seek(0)
      texts = [{"text": f"caption {i} {j} \\u00e9", "id": j} for j in range(i)]
      yield i, {"image": file, "image/id": i, "captions": texts}
Tiny(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
"""


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tfds")
  # A process of its own: writing registers the class, and a run that only reads has none.
  subprocess.run([sys.executable, "-c", TINY, str(folder)], check=True, capture_output=True)
  return str(folder)


def captioned(records, numbers):
  """The samples that have a caption."""
  for i in numbers:
    try:
      yield records[i]
    except DataError:
      continue


def test_a_tensorflow_dataset_without_tensorflow(tfds_folder):
  code = (
    "import sys\nfrom mllm_jax.data.records import Records\n"
    f"print(len(Records.load('tfds:tiny:train', {tfds_folder!r})), 'tensorflow' in sys.modules)"
  )
  assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "5 False\n"
  records = Records.load("tfds:tiny:train", tfds_folder)
  by_id = {}
  for i in range(len(records)):
    try:
      by_id[int(records[i].id)] = records[i]
    except DataError as error:
      assert "has no 'text'; the mapping 'captions' needs it" in str(error)  # example 0 has no caption
  assert sorted(by_id) == [1, 2, 3, 4]
  for i, sample in by_id.items():
    assert sample.turns == (Turn("human", "<image>"), Turn("gpt", f"caption {i} 0 é"))
    assert int(np.asarray(images.load(sample.images[0]))[0, 0, 0]) == i
  again = pickle.loads(pickle.dumps(records))
  assert len(again) == 5
  several = pickle.loads(pickle.dumps(Records.load("tfds:tiny:train:captions3", tfds_folder)))
  assert len(several) == 15
  texts = [sample.turns[1].text for i in range(5) for sample in captioned(several, range(3 * i, 3 * i + 3))]
  assert sorted(texts) == [f"caption {i} {j % i} é" for i in range(1, 5) for j in sorted(range(3), key=lambda j: j % i)]
  pictures = Records.load("tfds:tiny:train[1:4]:images", tfds_folder)
  assert len(pictures) == 3 and all(sample.turns == () and len(sample.images) == 1 for sample in pictures)


@pytest.mark.parametrize(
  "path,message",
  [
    ("tfds:tiny:test", "Unknown split 'test'.*tfds build tiny --file_format=array_record"),
    ("tfds:none/2014:train", "cannot be opened in .*tfds build none/2014"),
    ("tfds:tiny", "write tfds:NAME:SPLIT"),
    ("tfds:tiny:train:boxes", "MAPPING captions, captionsN or images"),
  ],
)
def test_tensorflow_datasets_that_are_not_there(tfds_folder, path, message):
  with pytest.raises(DataError, match=f"(?s)^{path}: .*{message}"):
    Records.load(path, tfds_folder)


@pytest.mark.parametrize(
  "share,expected", [("1", range(10)), (2, sorted([*range(10)] * 2)), ("first:3", range(3)), ("1e0", range(10))]
)
def test_shares(share, expected):
  assert mix.choose(10, share, (0, 0)).tolist() == list(expected)


def test_random_shares_are_a_function_of_the_seed():
  for share, size in (("0.25", 250), ("random:70", 70), ("random:1_000", 1000)):
    taken = mix.choose(1000, share, (3, 1))
    assert len(taken) == len(set(taken)) == size and sorted(taken) == taken.tolist()
    np.testing.assert_array_equal(taken, mix.choose(1000, share, (3, 1)))
  assert mix.choose(1000, "0.25", (3, 1)).tolist() != mix.choose(1000, "0.25", (4, 1)).tolist()
  assert mix.choose(1000, "0.25", (3, 1)).tolist() != mix.choose(1000, "0.25", (3, 2)).tolist()
  counts = np.bincount(mix.choose(1000, "2.3", (0, 0)), minlength=1000)
  assert set(counts) == {2, 3} and counts.sum() == 2300


@pytest.mark.parametrize("share", ["0", "-1", "nan", "inf", "first", "last:3", "first:11", "random:0", "half"])
def test_shares_that_make_no_sense(share):
  with pytest.raises(ConfigError, match=f"the share '{share}'"):
    mix.choose(10, share, (0, 0))


def test_a_mix_of_sources(tmp_path, write_data):
  path, folder = write_data([{"id": f"json {i}", "conversations": []} for i in range(4)])
  write_shard(tmp_path / "s.arrayrecord", 6)
  rows = ((str(tmp_path / "s.arrayrecord"), "", "first:2"), (path, folder, "random:3"))
  records = mix.open_data(DataConfig(path=path, image_folder=folder, mix=rows), seed=1)
  ids = [sample.id for sample in records]
  assert ids[:6] == ["json 0", "json 1", "json 2", "json 3", "0", "1"] and len(ids) == 9
  assert records[5].name == f"{tmp_path / 's.arrayrecord'}, sample 1 ('1')"
  assert [sample.id for sample in pickle.loads(pickle.dumps(records))] == ids
  assert [sample.id for sample in mix.open_data(DataConfig(mix=rows), seed=1)][:2] == ["0", "1"]
  with pytest.raises(ConfigError, match=r"data.mix: \('a', 'b'\) is not"):
    mix.open_data(DataConfig(mix=(("a", "b"),)), 0)
  with pytest.raises(ConfigError, match="s.arrayrecord: the share 'first:7' asks for 7 of 6"):
    mix.open_data(DataConfig(mix=((str(tmp_path / "s.arrayrecord"), "", "first:7"),)), 0)
  with pytest.raises(DataError, match="set data.path, or data.mix"):
    mix.open_data(DataConfig(), 0)


def test_siblings_with_another_extension_are_taken(tmp_path):
  Image.new("RGB", (4, 4), (9, 0, 0)).save(tmp_path / "a.gif")
  for name in ("a.jpg", "a.JPG", "a.png"):
    path = str(tmp_path / name)
    assert image_files.locate(path) == str(tmp_path / "a.gif")
    assert np.asarray(images.load(path)).tolist() == np.asarray(images.load(str(tmp_path / "a.gif"))).tolist()
  assert image_files.locate(str(tmp_path / "a.tiff")) is None and image_files.locate(str(tmp_path / "b.jpg")) is None
  (tmp_path / "a.jpg").write_bytes(b"damaged")  # a file that is there is not replaced
  with pytest.raises(DataError, match="cannot be decoded"):
    images.load(str(tmp_path / "a.jpg"))


def test_images_in_a_bucket():
  with fsspec.open("memory://images/folder/a.png", "wb") as file:
    file.write(png(5))
  for name in ("a.png", "a.jpg"):
    assert np.asarray(images.load(f"memory://images/folder/{name}"))[0, 0].tolist() == [5, 0, 0]
    assert image_files.locate(f"memory://images/folder/{name}") == "memory://images/folder/a.png"
  assert image_files.locate("memory://images/folder/b.png") is None
  with pytest.raises(DataError, match="^s: image memory://images/folder/b.png is missing; restore"):
    images.load("memory://images/folder/b.png", sample_name="s")
  with pytest.raises(DataError, match="nothing is known that reads nonsense://"):
    images.load("nonsense://a.png")


def test_manifests_are_held_to(tmp_path):
  write_shard(tmp_path / "a.arrayrecord", 2)
  (tmp_path / "plan.json").write_text("{}")
  with pytest.raises(DataError, match="is not finished; start the same"):
    Records.load(str(tmp_path), "")
  shards = [{"name": "a.arrayrecord", "samples": 2}, {"name": "b.arrayrecord", "samples": 1}]
  (tmp_path / "manifest.json").write_text(json.dumps({"format": 1, "shards": shards}))
  with pytest.raises(DataError, match="1 shards are not what manifest.json says, such as b.arrayrecord: 0 sam"):
    Records.load(str(tmp_path), "")
  (tmp_path / "manifest.json").write_text("{")
  with pytest.raises(DataError, match="manifest.json: is damaged"):
    Records.load(str(tmp_path), "")
  (tmp_path / "manifest.json").write_text(json.dumps({"format": 1, "shards": shards[:1]}))
  assert len(Records.load(str(tmp_path), "")) == 2
