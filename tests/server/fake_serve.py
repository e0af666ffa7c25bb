"""`python -m mllm_jax.serve` with an engine without a model: python fake_serve.py PAUSE WORDS ARGUMENTS..."""

import functools
import sys
import tempfile
import types
from pathlib import Path

import serving
from fake_engine import FakeEngine

from mllm_jax import serve


def load(path):
  with tempfile.TemporaryDirectory() as folder:
    return None, serving.make_processor(Path(folder))


def make_engine(pause, words, model, processor, *, rows, max_length):
  return FakeEngine(rows, max_length or 4096, pause=pause, words=words)


if __name__ == "__main__":
  pause, words = float(sys.argv[1]), int(sys.argv[2])
  sys.modules["mllm_jax.build"] = types.SimpleNamespace(load=load)
  engine = functools.partial(make_engine, pause, words)
  sys.modules["mllm_jax.inference.engine"] = types.SimpleNamespace(Engine=engine)
  sys.exit(serve.main(sys.argv[3:]))
