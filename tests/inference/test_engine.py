"""The engine against the released answers, against itself without a cache, and against what it must not depend on."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import GOLDENS, RELEASED, TINY, prompt, stack

from mllm_jax.inference import engine as engine_lib
from mllm_jax.inference.engine import Engine
from mllm_jax.inference.settings import Sampling

NO_EOS = 10_000  # no token of these vocabularies
WARM = Sampling(temperature=0.8, top_p=0.95, top_k=50)


def noise(seed, size=TINY.vision.image_size):
  return np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)


@pytest.fixture(scope="module")
def prompts():
  """Prompts of different lengths, with and without a picture."""
  draw = np.random.default_rng(0)
  text = lambda count: draw.integers(3, 320, count).tolist()
  return [prompt([1, *text(5), -200, *text(4)], noise(1)), prompt([1, *text(27)]), prompt([1, 7])]


def test_greedy_answer_is_the_released_one(released):
  model, golden = released
  pixels = np.load(GOLDENS / "img_wide640x360.npz")["clip.resized_uint8"]
  batch = prompt(golden["gen.prompt"][0], pixels, config=RELEASED)
  expected = golden["gen.out"][0][1:].tolist()  # the first id is a beginning-of-sequence token that was never generated
  assert Engine(model, eos_id=2).generate(batch, len(expected)) == [expected]
  logits, _ = jax.jit(engine_lib.prefill, static_argnums=2)(model, batch, batch.tokens.shape[1])
  np.testing.assert_allclose(logits[0], golden["gen.first_logits"], atol=2e-5)  # float32 sums in another order


def test_greedy_equals_a_loop_without_cache(tiny, prompts):
  batch, answer = prompts[0], Engine(tiny, NO_EOS).generate(prompts[0], 8)[0]
  length = batch.tokens.shape[1]
  tokens = np.pad(batch.tokens, ((0, 0), (0, 8)))
  index = np.pad(batch.visual_index, ((0, 0), (0, 8)), constant_values=-1)
  positions = np.arange(length + 8, dtype=np.int32)[None]
  forward = jax.jit(
    lambda model, tokens: model.decoder.logits(
      model.decoder(
        model.embed(tokens, index, model.visual_tokens(batch.patches, batch.grids)), positions, jnp.ones_like(positions)
      )
    )
  )
  for step in range(8):
    tokens[0, length + step] = np.argmax(forward(tiny, tokens)[0, length + step - 1])
  assert answer == tokens[0, length:].tolist()
  assert len(set(answer)) > 2  # not one token over and over


@pytest.mark.parametrize("sampling", [Sampling(), WARM])
def test_stream_equals_generate(tiny, prompts, sampling):
  engine = Engine(tiny, NO_EOS)
  assert [list(engine.stream(prompts[0], 8, sampling, seed=4))] == engine.generate(prompts[0], 8, sampling, seed=4)


def test_rows_depend_neither_on_padding_nor_on_each_other(tiny, prompts):
  engine = Engine(tiny, NO_EOS)
  alone = [engine.generate(batch, 8)[0] for batch in prompts]
  assert engine.generate(stack(prompts, 40), 8) == alone
  assert engine.generate(stack(prompts[::-1], 40), 8) == alone[::-1]
  assert len({tuple(answer) for answer in alone}) == len(alone)


def test_a_drawn_row_depends_on_its_place_and_seed_only(tiny, prompts):
  engine = Engine(tiny, NO_EOS)
  alone = engine.generate(prompts[0], 8, WARM, seed=1)
  assert engine.generate(stack(prompts, 40), 8, WARM, seed=1)[:1] == alone
  assert engine.generate(prompts[0], 8, WARM, seed=2) != alone


def test_answers_end_before_eos_each_for_itself(tiny, prompts):
  batch = stack(prompts, 40)
  free = Engine(tiny, NO_EOS).generate(batch, 8)
  eos = free[0][3]  # becomes the end in row 0, wherever else it comes up too
  expected = [answer[: answer.index(eos)] if eos in answer else answer for answer in free]
  assert len({len(answer) for answer in expected}) > 1
  assert Engine(tiny, eos).generate(batch, 8) == expected
  assert list(Engine(tiny, eos).stream(prompts[0], 8)) == expected[0]


def test_loop_stops_when_all_rows_have_ended(tiny, prompts, monkeypatch):
  """Counts decode steps on the device: rows that all end with their first token need none."""
  steps = []
  whole = engine_lib.decode

  def counted(*args):
    jax.debug.callback(lambda: steps.append(1))
    return whole(*args)

  monkeypatch.setattr(engine_lib, "decode", counted)
  first = next(Engine(tiny, NO_EOS).stream(prompts[2], 8))
  assert Engine(tiny, first).generate(prompts[2], 34) == [[]]
  jax.effects_barrier()
  assert not steps
  Engine(tiny, NO_EOS).generate(prompts[2], 34)
  jax.effects_barrier()
  assert len(steps) == 33


def test_compiles_once_for_a_shape(tiny, prompts):
  engine = Engine(tiny, NO_EOS)
  engine.generate(stack(prompts, 40), 8)
  before = engine_lib._generate._cache_size()
  engine.generate(stack(prompts[::-1], 40), 8, seed=1)
  assert engine_lib._generate._cache_size() == before


def test_weights_are_arguments_not_constants(tiny, prompts):
  text = engine_lib._generate.lower(
    tiny, prompts[2], jax.random.key(0), np.int32(2), max_new_tokens=8, sampling=Sampling(), mesh=None
  ).as_text()
  assert len(text) < 400_000  # the weights alone would be millions of characters


def test_refuses_what_it_cannot_answer(tiny, prompts):
  engine = Engine(tiny, NO_EOS)
  with pytest.raises(ValueError, match="max_new_tokens is 0"):
    engine.generate(prompts[0], 0)
  with pytest.raises(ValueError, match="one row, and the batch has 2"):
    engine.stream(stack(prompts[:2], 40), 3)
  empty = stack(prompts[:2], 40)
  empty.segment_ids[1] = 0
  with pytest.raises(ValueError, match="all padding"):
    engine.generate(empty, 3)


ON_A_MESH = """
import sys
sys.path.insert(0, {folder!r})
import jax, numpy as np
from flax import nnx
from tiny_models import TINY, prompt, stack
from mllm_jax import parameters, sharding
from mllm_jax.config import MeshConfig
from mllm_jax.inference.engine import Engine
from mllm_jax.models.mllm import Mllm

model = Mllm(TINY, rngs=nnx.Rngs(3))
batch = stack([prompt([1, -200, *range(5, 5 + n)], np.full((56, 56, 3), 20 * n, np.uint8)) for n in range(1, 9)], 32)
alone = Engine(model, 10_000).generate(batch, 4)
mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
graphdef, flat = parameters.flatten(model)
spread = parameters.unflatten(graphdef, jax.device_put(flat, sharding.parameter_shardings(flat, mesh)))
assert Engine(spread, 10_000, mesh=mesh).generate(batch, 4) == alone
try:
  Engine(spread, 10_000, mesh=mesh).generate(stack([prompt([1, 5])] * 3, 32), 4)
except ValueError as error:
  assert "multiple of 4" in str(error), error
else:
  raise AssertionError("3 rows on 4 groups of devices")
"""


def test_same_answers_on_eight_devices():
  env = os.environ | {
    "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    "JAX_PLATFORMS": "cpu",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
  }  # a third of the time to compile
  code = ON_A_MESH.format(folder=os.path.dirname(__file__))
  done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-3000:]
