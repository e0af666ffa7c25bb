"""A small data set with pictures and without, and what is made of it: fixtures of several tests (conftest.py)."""

import numpy as np
import pytest

from mllm_jax.config import VisionConfig
from mllm_jax.data import lengths
from mllm_jax.data.aspects import Square
from mllm_jax.data.pipeline import TrainingBatches
from mllm_jax.data.processor import Processor, Row
from mllm_jax.data.records import Records

N = 23
T = 3  # visual tokens of an image
WORDS = "the answer has some more words of different length".split()


@pytest.fixture
def records(write_data):
  samples = []
  for i in range(N):
    question = {"from": "human", "value": ("<image>" if i % 4 else "") + f"What is {i}?"}
    samples.append(
      {
        "id": i,
        "image": f"{i}.png" if i % 4 else [],
        "conversations": [question, {"from": "gpt", "value": " ".join((WORDS * 5)[: 1 + (7 * i) % 31])}],
      }
    )
  return Records.load(*write_data(samples))


@pytest.fixture
def processor(tokenizers):
  return Processor(tokenizers[False], Square(VisionConfig(image_size=28), T), "vicuna_v1", 230, 3)


@pytest.fixture
def table(records, processor):
  return lengths.measure(records, processor)


@pytest.fixture(params=["fixed", "group", "pack"])
def make(request, records, processor, table):
  """TrainingBatches(**options) of each batching."""
  options = {"lengths": table, "batching": request.param}
  options |= {"row_length": 460} if request.param == "pack" else {}
  options |= {"buckets": (150, 190, 230)} if request.param == "group" else {}

  def make(**more):
    return TrainingBatches(records, processor, **options | {"batch_size": 4, "threads": 0, "seed": 3} | more)

  make.batching = request.param
  return make


def arrays(batch) -> list[np.ndarray]:
  """All arrays of a Batch or a tuple of them."""
  return [getattr(part, name) for part in (batch if isinstance(batch, tuple) else (batch,)) for name in Row._fields]


def assert_same(found, expected):
  assert [ids for ids, _ in found] == [ids for ids, _ in expected]
  for (_, a), (_, b) in zip(found, expected, strict=True):
    for x, y in zip(arrays(a), arrays(b), strict=True):
      np.testing.assert_array_equal(x, y)
