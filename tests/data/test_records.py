import json

import pytest

from mllm_jax.data.records import DataError, Records, Turn, check


def conversation(*values, roles=("human", "gpt")):
  return [{"from": roles[i % 2], "value": value} for i, value in enumerate(values)]


def load(write_data, *samples):
  path, folder = write_data(list(samples))
  return Records.load(path, folder)


def test_reads_a_sample_with_its_paths_joined(write_data):
  records = load(
    write_data, {"id": 7, "image": "a.png", "category": "ocr", "conversations": conversation("<image>\nQ", "A")}
  )
  sample = records[0]
  assert (len(records), sample.id, sample.index, sample.category, sample.system) == (1, "7", 0, "ocr", None)
  assert sample.images == (f"{records.image_folder}/a.png",)
  assert sample.turns == (Turn("human", "<image>\nQ"), Turn("gpt", "A"))
  assert sample.name == f"{records.source}, sample 0 ('7')"
  assert records[-1] == sample
  with pytest.raises(IndexError):
    records[1]


@pytest.mark.parametrize(
  "image,expected",
  [
    ("a.png", ["a.png"]),
    (["a.png", "b.png"], ["a.png", "b.png"]),
    ("", []),
    ([], []),
    (None, []),
    ("/elsewhere/a.png", ["/elsewhere/a.png"]),
  ],
)
def test_image_is_a_path_a_list_or_nothing(tmp_path, image, expected):
  path = tmp_path / "train.json"
  path.write_text(json.dumps([{"id": "x", "image": image, "conversations": conversation("Q", "A")}]))
  expected = tuple(name if name.startswith("/") else f"folder/{name}" for name in expected)
  assert Records.load(str(path), "folder")[0].images == expected


def test_role_content_keys_system_and_leading_answers(write_data):
  turns = [
    {"role": "system", "content": "Be brief."},
    {"role": "assistant", "content": "dropped"},
    {"role": "user", "content": "Q"},
    {"role": "assistant", "content": "A", "category": "colour"},
  ]
  sample = load(write_data, {"conversations": turns})[0]
  assert sample.id == "0"  # the file gives none
  assert sample.system == "Be brief."
  assert sample.turns == (Turn("human", "Q"), Turn("gpt", "A", "colour"))


def test_json_lines_and_byte_order_mark(tmp_path):
  path = tmp_path / "train.jsonl"
  lines = [json.dumps({"id": i, "conversations": conversation("Q", f"A{i}")}) for i in range(3)]
  path.write_text("\ufeff" + "\n".join(lines[:2]) + "\n\n" + lines[2] + "\n", encoding="utf-8")
  records = Records.load(str(path), "")
  assert [sample.turns[1].text for sample in records] == ["A0", "A1", "A2"]


@pytest.mark.parametrize(
  "name,content,message",
  [
    ("a.json", "", "not JSON"),
    ("a.json", "<html>", "not JSON"),
    ("a.json", '{"id": 1}\n{"id": 2}', "must be named .jsonl"),
    ("a.json", "[]", "no samples"),
    ("a.jsonl", "\n", "no samples"),
    ("a.json", '{"id": 1}', "a JSON dict where a list"),
    ("a.jsonl", '{"id": 1}\n{"id"', "line 2 is not JSON"),
  ],
)
def test_bad_files(tmp_path, name, content, message):
  path = tmp_path / name
  path.write_text(content)
  with pytest.raises(DataError, match=message) as error:
    Records.load(str(path), "")
  assert str(error.value).startswith(str(path))


def test_missing_file_folder_and_encoding(tmp_path):
  with pytest.raises(DataError, match="no such file; set data.path"):
    Records.load(str(tmp_path / "none.json"), "")
  with pytest.raises(DataError, match="cannot be read"):
    Records.load(str(tmp_path), "")
  (tmp_path / "latin.json").write_bytes('["é"]'.encode("latin-1"))
  with pytest.raises(DataError, match="not UTF-8"):
    Records.load(str(tmp_path / "latin.json"), "")


@pytest.mark.parametrize(
  "sample,message",
  [
    (5, "is a int where an object"),
    ({"id": 1.5, "conversations": conversation("Q", "A")}, "id is a float"),
    ({"id": "x"}, "conversations is a NoneType"),
    ({"id": "x", "conversations": ["Q", "A"]}, "not a list of objects"),
    ({"id": "x", "image": {"path": "a"}, "conversations": conversation("Q", "A")}, "image is {'path'"),
    (
      {"id": "x", "conversations": conversation("Q", "A", roles=("human", "function_call"))},
      "turn 1: unknown role 'function_call'",
    ),
    ({"id": "x", "conversations": conversation("Q", "R", roles=("human", "human"))}, "turn 1: two human turns"),
    (
      {"id": "x", "conversations": conversation("Q", "A", "S", roles=("human", "system"))},
      "turn 1: a system turn must be",
    ),
    ({"id": "x", "conversations": [{"from": "human"}]}, "turn 0: has no 'value'"),
    ({"id": "x", "conversations": conversation("Q", 3)}, "value is a int"),
    ({"id": "x", "conversations": conversation("Q", "\ud83d")}, "half a character"),
    ({"id": "x", "category": 3, "conversations": conversation("Q", "A")}, "category is a int"),
  ],
)
def test_bad_structure_is_named_and_checked(tmp_path, sample, message):
  path = tmp_path / "train.json"
  path.write_text(json.dumps([{"id": "good", "conversations": conversation("Q", "A")}, sample]))
  records = Records.load(str(path), "")
  with pytest.raises(DataError, match=message) as error:
    records[1]
  assert str(error.value).startswith(f"{path}, sample 1")
  assert check(records, max_images=1) == [(1, str(error.value))]


@pytest.mark.parametrize(
  "sample,problems",
  [
    ({"image": "a.png", "conversations": conversation("<image>\nQ", "A")}, []),
    ({"conversations": conversation("Q", "A with <image> in it")}, []),
    ({"image": ["a.png", "b.png"], "conversations": conversation("<image> and <image>", "A")}, []),
    ({"image": "a.png", "conversations": conversation("Q", "<image>")}, ["0 <image> in the human turns but 1 images"]),
    (
      {"conversations": conversation("what does <image> do in HTML", "A")},
      ["1 <image> in the human turns but 0 images"],
    ),
    (
      {"image": "a.png", "conversations": conversation("<image>", "A", "<image>", "B")},
      ["2 <image> in the human turns but 1"],
    ),
    (
      {"image": ["a.png"] * 3, "conversations": conversation("<image>" * 3, "A")},
      ["has 3 images, and a row has room for 2"],
    ),
    ({"conversations": conversation("Q", "")}, ["has no answer"]),
    ({"conversations": conversation("Q")}, ["has no answer"]),
    ({"conversations": []}, ["has no human turn", "has no answer"]),
    ({"conversations": conversation("A", roles=("gpt", "human"))}, ["has no human turn", "has no answer"]),
  ],
)
def test_check(write_data, sample, problems):
  records = load(write_data, sample)
  found = [line for _, line in check(records, max_images=2)]
  assert len(found) == len(problems)
  for line, problem in zip(found, problems, strict=True):
    assert line.startswith(f"{records.source}, sample 0 ('0'): {problem}")
    assert ";" in line and "\n" not in line  # the remedy follows


def test_check_finds_missing_images_in_file_order(tmp_path):
  path = tmp_path / "train.json"
  sample = {"image": "none.jpg", "conversations": conversation("<image>", "A")}
  path.write_text(json.dumps([{"id": "a", **sample}, {"id": "b", "conversations": 1}, {"id": "c", **sample}]))
  found = [line for _, line in check(Records.load(str(path), "pictures"), max_images=1)]
  assert [line.split(":")[0][-3:-1] for line in found] == ["a'", "b'", "c'"]
  assert "image pictures/none.jpg is missing" in found[0]
