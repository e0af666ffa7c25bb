"""A server that most tests share."""

import pytest
import serving
from fake_engine import FakeEngine


@pytest.fixture(scope="session")
def processor(tmp_path_factory):
  return serving.make_processor(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def url(processor):
  with serving.running(processor, FakeEngine(rows=4), max_body=2**20, max_pixels=200_000) as url:
    yield url
