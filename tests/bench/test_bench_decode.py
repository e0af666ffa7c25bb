"""The benchmark of answers: what it compares is the same; how fast it was is not asked."""

import numpy as np
import pytest

from mllm_jax.bench import decode
from mllm_jax.config import DecoderConfig


def test_six_tokens_cost_less_than_two_percent_of_an_answer():
  """Of LLaVA-1.5-7B's FLOPs, by another count: 2 for each weight that a place meets, and the pairs of attention."""
  text, tokens = 64, 64
  base, spatial = (decode.answer_flops(each, text, tokens) for each in (decode.MLP, decode.SPATIAL))
  tower = 577 * 2 * 23 * 12 * 1024**2 + 4 * 577**2 * 23 * 1024  # 23 of CLIP-L's 24 layers
  mlp = 576 * 2 * (1024 * 4096 + 4096**2)
  places = 576 + text + tokens - 1
  decoder = places * 2 * 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 2 * places * (places + 1) * 32 * 4096
  # Left out here: embedding the patches.
  np.testing.assert_allclose(base, tower + mlp + decoder + tokens * 2 * 4096 * 32000, rtol=1e-3)
  assert 1.005 < spatial / base < 1.02


@pytest.mark.torch
def test_tokens_are_those_of_transformers(monkeypatch):
  small = DecoderConfig(vocab_size=64, width=16, layers=2, heads=2, kv_heads=1, head_width=8, mlp_width=32)
  monkeypatch.setitem(decode.MODELS, "small", small)
  rates = decode.decode("small", batch=2, prompt=5, tokens=6, repeat=2)  # raises where they differ
  assert {whose: len(each) for whose, each in rates.items()} == {"ours": 2, "transformers": 2}
