"""Headers of .safetensors files with one thing wrong."""

import json

import ml_dtypes
import numpy as np
import pytest

from mllm_jax.weights.io import WeightsError, open_weights


def entry(shape=(2,), offsets=(0, 8), dtype="F32"):
  return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def file_of(header, data=8, length=None):
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  return (len(text) if length is None else length).to_bytes(8, "little") + text + bytes(data)


@pytest.mark.parametrize(
  "content, message",
  [
    (b"", "it has 0 bytes, too few for a header"),
    (b"\x10\0\0\0\0\0\0", "it has 7 bytes"),
    (file_of({"a": entry()}, length=2**63), "should have 9223372036854775808 bytes; the file has"),
    (file_of({"a": entry()}, length=100), "should have 100 bytes; the file has"),
    (file_of({"a": entry()})[:-1], "its tensors need .* bytes with the header, and the file has"),
    (file_of({"a": entry()}) + b"\0", "its tensors need .* bytes with the header, and the file has"),
    (file_of(b"\xff{}"), "not JSON: 'utf-8' codec"),
    (file_of(b"[]"), r"its header is \(\) instead of an object"),
    (file_of(b"[" * 100_000), "nested too deeply"),
    (file_of(b'{"a":' + b"9" * 5000 + b"}"), "not JSON: Exceeds the limit"),
    (file_of(b'{"a":{},"a":{}}'), "'a' stands there twice"),
    (file_of(b'{"a":{"dtype":"F32","dtype":"F16","shape":[2],"data_offsets":[0,8]}}'), "'dtype' stands there twice"),
    (file_of(b'{"a\\ud800":' + json.dumps(entry()).encode() + b"}"), "is not valid text"),
    (file_of({"a": entry() | {"more": 1}}), "entry 'a' has not exactly dtype, shape and data_offsets"),
    (file_of({"a": 5}), "entry 'a' has not exactly"),
    (file_of({"__metadata__": {"a": 1}}, 0), "__metadata__ is not an object of texts"),
    (file_of({"__metadata__": "pt"}, 0), "__metadata__ is not an object of texts"),
    (file_of({"a": entry(dtype="F4")}), "'a' is stored as 'F4', which is not read here.*float16, bfloat16 or float32"),
    (file_of({"a": entry(dtype=["F32"])}), "'a' is stored as a list of 1"),
    (file_of({"a": entry((-2,))}), r"'a' has the shape \(-2\)"),
    (file_of({"a": entry((2.0,))}), "'a' has the shape a list of 1"),
    (file_of({"a": entry((True, 2))}), "'a' has the shape a list of 2"),
    (file_of({"a": entry((2**32, 2**32), (0, 0))}), "'a' has the shape"),  # 2**64 is 0 in 64 bits
    (file_of({"a": entry((0, 2**62, 2**62), (0, 0))}, 0), "'a' has the shape"),
    (file_of({"a": entry((1,) * 65)}), "'a' has the shape a list of 65"),
    (file_of({"a": entry((2**40,), (0, 2**42))}), "its tensors need 4398046511.* bytes"),
    (
      file_of({"a": entry(offsets=(0, 4))}),
      r"'a' of shape \(2\) in F32 needs 8 bytes, and its data_offsets are \(0, 4\)",
    ),
    (file_of({"a": entry(offsets=(8, 0))}), r"needs 8 bytes, and its data_offsets are \(8, 0\)"),
    (file_of({"a": entry(offsets=(0, 8, 8))}), r"'a' has the data_offsets \(0, 8, 8\)"),
    (file_of({"a": entry(offsets=(-8, 0))}), r"'a' has the data_offsets \(-8, 0\)"),
    (file_of({"a": entry(offsets=(4, 12))}, 12), "'a' starts at byte 4 of the data and leaves a gap after the header"),
    (file_of({"a": entry(), "b": entry(offsets=(4, 12))}, 12), "'b' starts at byte 4 .* overlaps 'a', which ends at 8"),
    (file_of({"a": entry(), "b": entry()}), "'b' starts at byte 0 .* overlaps 'a'"),
    (file_of({"a": entry(), "b": entry(offsets=(12, 20))}, 20), "'b' starts at byte 12 .* leaves a gap after 'a'"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS pointer: .*git lfs pull"),
  ],
)
def test_what_the_format_does_not_allow(tmp_path, content, message):
  (tmp_path / "model.safetensors").write_bytes(content)
  with pytest.raises(WeightsError, match=f"model.safetensors cannot be read as safetensors .*{message}"):
    open_weights(tmp_path)


def test_what_it_allows(tmp_path):
  """Tensors out of order, empty ones anywhere, a header that leaves bfloat16 unaligned, a single number."""
  header = {"b": entry((3,), (4, 10), "BF16"), "a": entry((), (0, 4)), "__metadata__": {"format": "pt"}}
  header |= {
    "none": entry((0, 5), (4, 4), "I64"),
    "end": entry((2, 0), (11, 11)),
    "f": entry((1,), (10, 11), "F8_E5M2"),
  }
  numbers = np.array([1, -2, 3], ml_dtypes.bfloat16)
  for padding in (0, 1):
    content = json.dumps(header).encode()
    content += b" " * (padding - len(content) % 2 + 2)
    data = np.float32(7).tobytes() + numbers.tobytes() + np.array([0.5], ml_dtypes.float8_e5m2).tobytes()
    (tmp_path / "model.safetensors").write_bytes(file_of(content, 0) + data)
    weights = open_weights(tmp_path)
    assert weights.names() == ["a", "b", "end", "f", "none"] and weights.shape("none") == (0, 5)
    assert weights.read("a") == 7 and weights.read("none").shape == (0, 5) and weights.read("end").dtype == np.float32
    np.testing.assert_array_equal(weights.read("b"), numbers, strict=True)
    np.testing.assert_array_equal(weights.read("b", (slice(1, 3),)).astype(np.float32), [-2, 3])
    assert weights.read("f").dtype == ml_dtypes.float8_e5m2 and float(weights.read("f")[0]) == 0.5
