"""What is counted of a real batch, and what the trainer logs of it."""

import dataclasses

import numpy as np
import pytest

from mllm_jax import chips, flops, parameters, recipes
from mllm_jax.batch import Batch
from mllm_jax.config import LoraConfig, ModelConfig, VisionConfig
from mllm_jax.models.mllm import abstract
from mllm_jax.training import loop
from mllm_jax.weights.known import PUBLISHED

VISION = VisionConfig(image_size=56, patch_size=14)


def packed_batch() -> Batch:
  """One micro-batch of two rows of 8 places: samples of 3 and 2 tokens, and of 5; one crop of 4 x 4, one of 2 x 3."""
  zeros = np.zeros((1, 2, 8), np.int32)
  segments, positions, weights = zeros.copy(), zeros.copy(), zeros.astype(np.float32)
  segments[0, 0, :5], positions[0, 0, :5] = [1, 1, 1, 2, 2], [0, 1, 2, 0, 1]
  segments[0, 1, :5], positions[0, 1, :5] = 1, range(5)
  weights[0, 0, 2] = weights[0, 1, 3:5] = 1
  grids = np.array([[[[4, 4], [0, 0]], [[2, 3], [0, 0]]]], np.int32)
  return Batch(zeros, zeros, weights, segments, positions, zeros, np.zeros((1, 2, 2, 16, 588), np.uint8), grids)


def test_padding_does_not_count_and_samples_see_only_themselves():
  work = flops.work_of(packed_batch(), VISION)
  assert work == flops.Work(
    tokens=10, pairs=6 + 3 + 15, trained=3, crops=2, patches=16 + 6, patch_pairs=17**2 + 7**2, passes=1
  )


def test_full_rows_are_as_long_as_their_shapes():
  work = flops.full_work(packed_batch(), VISION)
  assert (work.tokens, work.pairs, work.trained, work.crops, work.patches) == (16, 2 * 36, 16, 4, 64)


@pytest.mark.parametrize("lora", [0, 128])
def test_a_frozen_decoder_costs_4n_a_token_and_an_adapter_6n(lora):
  model = ModelConfig(decoder=PUBLISHED["vicuna-7b-v1.5"].config, lora=LoraConfig(rank=lora))
  shapes = parameters.flatten(abstract(model))[1]
  table = recipes.parameter_table(1e-3, 2e-4 if lora else 0.0)
  rates = parameters.match(table, list(shapes), "test")
  work = dataclasses.replace(flops.work_of(packed_batch(), model.vision), trained=0)
  more = dataclasses.replace(work, tokens=work.tokens + 1)
  one_token = flops.step_flops(model, shapes, rates, more) - flops.step_flops(model, shapes, rates, work)
  layers = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
  adapters = 319_815_680 if lora else 0
  assert one_token == 4 * layers + 6 * adapters
  trained = dataclasses.replace(work, trained=1)
  head = flops.step_flops(model, shapes, rates, trained) - flops.step_flops(model, shapes, rates, work)
  assert head == pytest.approx(4 * 4096 * 32000)


def test_the_counter_of_the_trainer_is_the_formula():
  model = ModelConfig(vision=VISION, projector=dataclasses.replace(ModelConfig().projector, stride=1, dfi_kernel=2))
  shapes = parameters.flatten(abstract(model))[1]
  rates = parameters.match(recipes.parameter_table(1e-3), list(shapes), "test")
  batch = packed_batch()
  expected = flops.step_flops(model, shapes, rates, flops.work_of(batch, VISION))
  count = flops.counter(model, shapes, rates)
  assert count(batch) == pytest.approx(expected, rel=1e-9)
  assert count((batch, batch)) == pytest.approx(2 * expected, rel=1e-9)


def test_utilisation_is_logged_where_the_chip_is_known(monkeypatch):
  times = iter([0.0, 2.0, 2.0])
  monkeypatch.setattr(loop.time, "perf_counter", lambda: next(times))
  monkeypatch.setattr(loop.jax, "device_count", lambda: 4)
  clock = loop.Clock()
  clock.peak = chips.V5E.flops
  clock.tick(16, 100.0, 400e12)
  rates = clock.rates()
  assert rates == {"samples_per_s": 8.0, "tokens_per_s": 50.0, "tflops_per_s": 50.0, "mfu": pytest.approx(50 / 197)}


def test_chips_are_found_by_the_longest_name():
  names = {"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v4": "v4", "TPU v6 lite": "v6e"}
  names |= {"NVIDIA H100 80GB HBM3": "H100", "NVIDIA H100 PCIe": "H100 PCIe", "NVIDIA A100-SXM4-80GB": "A100 80 GB"}
  names |= {"NVIDIA A100-SXM4-40GB": "A100 40 GB", "NVIDIA H200": "H200"}
  assert {kind: chips.lookup(kind).name for kind in names} == names
  assert chips.lookup("cpu") is None
