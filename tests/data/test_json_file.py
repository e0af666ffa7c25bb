"""The scan of JSON files against the standard library's parser, and what it says of broken ones."""

import io
import json
import pickle
import string

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm_jax.data.records import DataError, Records
from mllm_jax.data.sources import scan

NASTY = st.text(alphabet=string.ascii_letters + '"\\{}[],: \n\té😀\ufeff', max_size=12)
VALUES = st.recursive(
  st.none() | st.booleans() | st.integers() | NASTY,
  lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NASTY, inner, max_size=3),
  max_leaves=8,
)


def elements(data: bytes, found: scan.Elements) -> list:
  return [json.loads(data[a:b].removeprefix(scan.BOM)) for a, b in zip(found.starts, found.stops, strict=True)]


@pytest.fixture
def small_chunks(monkeypatch):
  """Every boundary falls somewhere else."""
  return lambda size: monkeypatch.setattr(scan, "CHUNK_BYTES", size)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 2**20])
def test_lists_come_apart_as_the_parser_takes_them_apart(chunk, small_chunks):
  small_chunks(chunk)

  @settings(max_examples=150, deadline=None)
  @given(st.lists(VALUES, max_size=5), st.sampled_from([None, 0, 1]), st.booleans(), st.sampled_from(["", "\ufeff"]))
  def check(values, indent, ascii_only, mark):
    data = (mark + " " + json.dumps(values, indent=indent, ensure_ascii=ascii_only) + "\n").encode()
    found = scan.json_list(io.BytesIO(data))
    assert elements(data, found) == values
    surely = set(range(len(values))) - set(found.odd.tolist())
    assert surely == {i for i, value in enumerate(values) if isinstance(value, list | dict)}

  check()


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 2**20])
def test_lines_come_apart_too(chunk, small_chunks):
  small_chunks(chunk)

  @settings(max_examples=150, deadline=None)
  @given(
    st.lists(VALUES, max_size=5),
    st.sampled_from(["\n", "\r\n", "\n\n", "\n  \t\n"]),
    st.booleans(),
    st.sampled_from(["", "\ufeff"]),
  )
  def check(values, newline, last, mark):
    data = (mark + newline.join(json.dumps(v, ensure_ascii=False) for v in values) + newline * last).encode()
    found = scan.json_lines(io.BytesIO(data))
    assert elements(data, found) == values
    surely = set(range(len(values))) - set(found.odd.tolist())
    assert all(isinstance(values[i], dict) for i in surely)
    if not mark:
      assert surely == {i for i, value in enumerate(values) if isinstance(value, dict)}

  check()


@pytest.mark.parametrize("chunk", [3, 2**20])
@given(st.text(alphabet='[]{}",\\1a \n', max_size=14))
@settings(max_examples=400, deadline=None)
def test_no_broken_file_passes_and_every_good_one_does(tmp_path_factory, chunk, text):
  path = tmp_path_factory.mktemp("broken") / "a.json"
  path.write_text(text)
  try:
    values = json.loads(text)
  except ValueError:
    values = None
  before, scan.CHUNK_BYTES = scan.CHUNK_BYTES, chunk
  try:
    records = Records.load(str(path), "")
    for i in range(len(records)):
      try:
        records[i]
      except DataError as error:
        if "not JSON" in str(error):  # inside an element: found by what looks at every sample
          assert values is None
    assert values is None or isinstance(values, list) and len(records) == len(values)
  except DataError:
    assert not isinstance(values, list) or values == []
  finally:
    scan.CHUNK_BYTES = before


GOOD = '{"id": 1, "conversations": []}'


@pytest.mark.parametrize(
  "name,content,message",
  [
    ("a.json", f"[{GOOD},\n{GOOD}", "line 2: the list does not end; was the file cut"),
    ("a.json", f"[{GOOD},\n{GOOD[:12]}", "line 2: Unterminated string.*, and the list does not end.*if it was cut"),
    ("a.json", f'[{GOOD},\n{{"id: 1}},\n{GOOD}]', "line 2: Invalid control character at, and the list does not end"),
    ("a.json", f"[{GOOD}]\n[{GOOD}]", "line 1: Extra data behind the list.*must be named .jsonl"),
    ("a.json", f"[{GOOD},]", "line 1: Expecting value"),
    ("a.json", f"[{GOOD},\n\nnul]", "line 3: Expecting value"),
    ("a.json", f"[{GOOD}}}", "not JSON"),
    ("a.json", f"x[{GOOD}]", "line 1: Expecting value"),
    ("a.json", "3", "a JSON int where a list"),
    ("a.json", "[" * 100_000 + "]" * 100_000, "nested too deeply"),
    ("a.jsonl", f"{GOOD}\n\n{GOOD}}}\n[", "line 4 is not JSON"),
  ],
)
def test_broken_files_are_named_with_the_line(tmp_path, name, content, message):
  path = tmp_path / name
  path.write_text(content)
  with pytest.raises(DataError, match=message) as error:
    records = Records.load(str(path), "")
    [records[i] for i in range(len(records))]
  assert str(error.value).startswith(str(path)) and ";" in str(error.value)


def test_a_broken_sample_is_named_with_its_bytes(tmp_path):
  (tmp_path / "a.json").write_text(f'[{GOOD}, {{"id" 1}}]')
  records = Records.load(str(tmp_path / "a.json"), "")
  assert len(records) == 2 and records[0].id == "1"
  with pytest.raises(DataError, match=r"a.json, sample 1 \(bytes 32 to 41\): not JSON \(Expecting ':' delimiter\);"):
    records[1]


@pytest.mark.parametrize("chunk", [4, 2**20])
def test_the_first_byte_that_is_not_utf8_is_named(tmp_path, chunk, small_chunks):
  small_chunks(chunk)
  (tmp_path / "a.json").write_bytes('["éé'.encode() + b'\xff"]')
  with pytest.raises(DataError, match=r"not UTF-8 text \(byte 6\)"):
    Records.load(str(tmp_path / "a.json"), "")


def test_pickles_hold_places_and_not_samples(tmp_path):
  samples = [{"id": i, "conversations": [{"from": "human", "value": "word " * 500}]} for i in range(50)]
  (tmp_path / "a.json").write_text(json.dumps(samples))
  records = Records.load(str(tmp_path / "a.json"), "")
  pickled = pickle.dumps(records)
  assert len(pickled) < 2000
  assert list(pickle.loads(pickled)) == list(records)


def test_remote_files(tmp_path):
  samples = [{"id": i, "image": f"{i}.jpg", "conversations": []} for i in range(3)]
  with fsspec.open("memory://bucket/train.json", "w") as file:
    file.write(json.dumps(samples))
  records = Records.load("memory://bucket/train.json", "memory://bucket/images")
  assert [sample.images for sample in records] == [(f"memory://bucket/images/{i}.jpg",) for i in range(3)]
  assert pickle.loads(pickle.dumps(records))[2].id == "2"
  assert records[0].name == "memory://bucket/train.json, sample 0 ('0')"
  with pytest.raises(DataError, match="memory://bucket/none.json: no such file; set data.path"):
    Records.load("memory://bucket/none.json", "")
  with pytest.raises(DataError, match="nothing is known that reads nonsense://"):
    Records.load("nonsense://bucket/a.json", "")
