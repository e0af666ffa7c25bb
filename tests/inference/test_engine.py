"""The engine against the released answers, against itself without a cache, and against what it must not depend on."""

import dataclasses
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import free_port
from tiny_models import GOLDENS, RELEASED, TINY, Plain, prompt, random_model

from mllm_jax import parameters
from mllm_jax.config import LoraConfig
from mllm_jax.inference import decoding as decoding_lib
from mllm_jax.inference import programs
from mllm_jax.inference.engine import Engine
from mllm_jax.inference.features import FeatureCache
from mllm_jax.inference.requests import Request
from mllm_jax.inference.settings import Sampling
from mllm_jax.models.mllm import abstract

WARM = Sampling(temperature=0.8, top_p=0.95, top_k=50)


def noise(seed, size=TINY.vision.image_size):
  return np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)


@pytest.fixture(scope="module")
def requests():
  """Of different lengths and settings, with and without a picture."""
  draw = np.random.default_rng(0)
  text = lambda count: draw.integers(3, 320, count).tolist()
  return [
    Request(prompt([1, *text(5), -200, *text(4)], noise(1)), 8),
    Request(prompt([1, *text(27)]), 5),
    Request(prompt([1, 7]), 11),
    Request(prompt([1, 9, -200, 8], noise(2)), 8, WARM, seed=3),
    Request(prompt([1, 9, -200, 8], noise(2)), 8, WARM, seed=4),
    Request(prompt([1, 9]), 4, Sampling(1.5), seed=3),
  ]


@pytest.fixture(scope="module")
def alone(tiny, requests):
  return [Engine(tiny, Plain(), rows=1).answer([request])[0] for request in requests]


def test_greedy_answer_is_the_released_one(released):
  model, golden = released
  pixels = np.load(GOLDENS / "img_wide640x360.npz")["clip.resized_uint8"]
  expected = golden["gen.out"][0][1:].tolist()  # the first id is a beginning-of-sequence token that was never generated
  request = Request(prompt(golden["gen.prompt"][0], pixels, RELEASED), len(expected))
  answer = Engine(model, Plain(2), rows=1).answer([request])[0]
  assert list(answer.ids) == expected and answer.text == Plain().decode(expected)


def test_greedy_equals_a_loop_without_cache(tiny, requests, alone):
  row, count = requests[0].row, requests[0].max_new_tokens
  length = len(row.tokens)
  tokens = np.pad(row.tokens, (0, count))[None]
  index = np.pad(row.visual_index, (0, count), constant_values=-1)[None]
  positions = np.arange(length + count, dtype=np.int32)[None]
  forward = jax.jit(
    lambda model, tokens: model.decoder.logits(
      model.decoder(
        model.embed(tokens, index, model.visual_tokens(row.patches[None], row.grids[None])),
        positions,
        jnp.ones_like(positions),
      )
    )
  )
  for step in range(count):
    tokens[0, length + step] = np.argmax(forward(tiny, tokens)[0, length + step - 1])
  assert list(alone[0].ids) == tokens[0, length:].tolist()
  assert len(set(alone[0].ids)) > 2  # not one token over and over


def test_answers_are_the_same_in_any_company(tiny, requests, alone):
  assert len({answer.ids for answer in alone}) == len(alone)
  told = []
  engine = Engine(tiny, Plain(), rows=8)
  assert engine.answer(requests, lambda *counts: told.append(counts)) == alone
  assert told[-1] == (6, 6)
  assert engine.answer(requests[::-1]) == alone[::-1]
  # More than there are rows: they come and go, and the cache shrinks and grows.
  assert Engine(tiny, Plain(), rows=4).answer(requests * 3) == alone * 3


def test_events_join_to_the_answer_while_others_come_and_go(tiny, requests, alone):
  engine, texts, answers = Engine(tiny, Plain(), rows=2), {}, {}
  tickets = [engine.submit(request) for request in requests[:2]]
  late = dict(zip(range(1, 9), requests[2:]))
  gone = engine.submit(requests[0])
  for step in range(40):
    for event in engine.step():
      texts[event.ticket] = texts.get(event.ticket, "") + event.text
      if event.answer is not None:
        answers[event.ticket] = event.answer
    assert engine.running <= 2
    if step == 0:
      assert (engine.running, engine.waiting) == (2, 1)
      engine.cancel(gone)
    if step in late:
      tickets.append(engine.submit(late[step]))
  assert (engine.running, engine.waiting) == (0, 0) and engine.step() == []
  assert [answers[ticket] for ticket in tickets] == alone
  assert all(texts[ticket] == answers[ticket].text for ticket in tickets)
  assert gone not in answers


def test_a_cancelled_request_frees_its_row(tiny, requests, alone):
  engine = Engine(tiny, Plain(), rows=1)
  first, second = engine.submit(requests[2]), engine.submit(requests[0])
  engine.step()
  engine.cancel(first)
  engine.cancel(first), engine.cancel(99)
  events = [event for _ in range(8) for event in engine.step()]
  assert {event.ticket for event in events} == {second} and events[-1].answer == alone[0]


def test_an_interrupted_step_leaves_an_engine_that_answers(tiny, requests, alone, monkeypatch):
  """As Ctrl-C does where it comes between a compiled function, which was given the cache, and what it gives back."""
  engine = Engine(tiny, Plain(), rows=1)
  stream, decode = engine.stream(requests[0]), engine._programs.decode

  def interrupted(*args, **kwargs):
    decode(*args, **kwargs)
    raise KeyboardInterrupt

  next(stream)
  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(engine._programs, "decode", interrupted)
    list(stream)
  assert engine.answer(requests[:1]) == alone[:1]


def test_a_stream_is_the_answer_and_can_be_closed(tiny, requests, alone):
  engine = Engine(tiny, Plain(), rows=1)
  events = list(engine.stream(requests[3]))
  assert events[-1].answer == alone[3] and len(events) == 8
  assert "".join(event.text for event in events) == alone[3].text
  stream = engine.stream(requests[0])
  next(stream)
  with pytest.raises(RuntimeError, match="under way"):
    engine.answer(requests)
  stream.close()
  assert engine.running == 0 and engine.answer(requests[:1]) == alone[:1]


def test_answers_end_before_the_end_token_each_for_itself(tiny, requests, alone):
  end = alone[0].ids[3]  # becomes the end in row 0, wherever else it comes up too
  for answer, free in zip(Engine(tiny, Plain(end), rows=8).answer(requests), alone):
    ended = end in free.ids
    assert answer.ids == (free.ids[: free.ids.index(end)] if ended else free.ids)
    assert answer.finish_reason == ("stop" if ended else "length")
  both = Plain(10_000)
  both.end_ids = (20_000, end)  # the language model's own ends count beside the template's
  assert Engine(tiny, both, rows=8).answer(requests[:1])[0].ids == alone[0].ids[:3]


def test_stop_texts_end_answers_across_tokens(tiny, requests, alone):
  third, fourth = alone[0].ids[2:4]
  stop = f"{str(third)[-1]}][{str(fourth)[0]}"  # the end of one token and the beginning of the next
  request = dataclasses.replace(requests[0], stop=("[nothing]", stop))
  events = list(Engine(tiny, Plain(), rows=8).stream(request))
  answer = events[-1].answer
  assert answer.text == alone[0].text.partition(stop)[0] == "".join(event.text for event in events)
  assert (answer.finish_reason, answer.ids) == ("stop", alone[0].ids[:4])
  assert stop[0] not in events[2].text[-1:]  # what may become a stop is held back


def test_pictures_are_looked_at_once(tiny, requests, alone):
  engine, seen = Engine(tiny, Plain(), rows=8), []
  encode = engine._programs.encode
  engine._programs = FakePrograms(engine._programs, lambda *args: seen.append(len(args[1])) or encode(*args))
  assert engine.answer(requests) == alone
  assert sum(seen) == 2  # of three requests with pictures two have the same one
  assert engine.answer(requests[3:5]) == alone[3:5]
  assert sum(seen) == 2


class FakePrograms:
  def __init__(self, programs, encode):
    self._programs, self.encode = programs, encode

  def __getattr__(self, name):
    return getattr(self._programs, name)


def test_the_feature_cache_forgets_what_was_not_used_for_longest():
  cache, tokens = FeatureCache(room=800), jnp.zeros((10, 10))  # 400 bytes each
  for name in (b"a", b"b"):
    cache.put(name, tokens)
  assert cache.get(b"a") is tokens
  cache.put(b"c", tokens)
  assert cache.get(b"b") is None and cache.get(b"a") is not None and cache.bytes == 800
  cache.put(b"large", jnp.zeros(201))
  assert cache.bytes <= 800 and cache.get(b"large") is None


def test_folded_adapters_answer_as_those_beside_their_kernels(tiny, requests, monkeypatch):
  """And the stacked decoder, which reads those, as the one that is taken apart."""
  config = dataclasses.replace(TINY, lora=LoraConfig(rank=4, alpha=8.0))
  graphdef, shapes = parameters.flatten(abstract(config))
  known, draw = parameters.flatten(tiny)[1], np.random.default_rng(1)
  flat = {
    path: known[path] if path in known else jnp.asarray(draw.normal(0, 0.1, x.shape), jnp.float32)
    for path, x in shapes.items()
  }
  model = parameters.unflatten(graphdef, flat)
  merged = Engine(model, Plain(), rows=8)
  assert not any("lora" in path for path in merged._flat)
  with monkeypatch.context() as patch:
    patch.setattr("mllm_jax.models.lora.merge", lambda model: model)
    beside = Engine(model, Plain(), rows=8)
  assert any("lora" in path for path in beside._flat)
  answers = merged.answer(requests)
  assert answers == beside.answer(requests)
  assert answers != Engine(tiny, Plain(), rows=8).answer(requests)  # the adapters do something


def test_a_token_copies_no_cache(tiny, monkeypatch):
  """Neither of a stacked decoder, where one layer's is read at a time, nor of one that is taken apart."""
  whole = lambda cache: sum(x.nbytes for x in jax.tree.leaves(cache))
  for decoding_of in (decoding_lib.decoding_of, stacked):
    monkeypatch.setattr(programs, "decoding_of", decoding_of)
    made, _, decoding = programs.parameters_of(tiny, None)
    cache = made.resize(made.empty(), rows=4, places=4096)
    draws = programs.Draws.of([(Sampling(), 0, 0)] * 4)
    args = decoding, np.zeros((4, 2), np.int32), draws, np.zeros(4, np.int32), cache
    memory = made.decode.lower(*args, candidates=0, count=made.at_once).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= whole(cache)
    assert memory.temp_size_in_bytes < whole(cache) * 0.6  # TINY has two layers; a copy of all would be 1


def stacked(model, mesh):
  del mesh
  return decoding_lib.Stacked(parameters.flatten(model.decoder)[0], model.config.decoder, "float32")


@pytest.mark.parametrize("bias, tied, window, int8", [(True, True, 0, False), (False, False, 6, True)])
def test_one_cpus_arrangement_is_the_decoder(bias, tied, window, int8):
  """Logits and cache after three tokens, beside those of the stacked layers, to rounding."""
  decoder = dataclasses.replace(
    TINY.decoder, attention_bias=bias, tied_embeddings=tied, sliding_window=window, kv_heads=TINY.decoder.heads // 2
  )
  model = random_model(dataclasses.replace(TINY, decoder=decoder, int8_decoder=int8))
  got = []
  for decoding in (decoding_lib.decoding_of(model, None), stacked(model, None)):
    step, weights = jax.jit(decoding.step), decoding.weights(model)
    cache = jax.tree.map(lambda x: jnp.pad(x, [(0, 0)] * 3 + [(0, 8), (0, 0)]), decoding.empty(2))
    for t, tokens in enumerate(([5, 6], [7, 8], [9, 3])):
      logits, cache = step(weights, jnp.array(tokens), jnp.array([t, t + 4]), cache)
    got.append((logits, cache))
  (ours, ours_cache), (theirs, theirs_cache) = got
  assert isinstance(ours_cache, list) and np.abs(theirs).max() > 0.1
  np.testing.assert_allclose(ours, theirs, atol=2e-5)
  keys = np.concatenate([layer.keys for layer in ours_cache])
  np.testing.assert_allclose(keys, theirs_cache.keys, atol=1e-5)


def test_compiles_once_and_nothing_after_warm_up(tiny, requests, alone):
  engine = Engine(tiny, Plain(), rows=4, max_length=128)
  engine.processor.aspect = FakeAspect()
  later = engine.warm_up()
  compiled = engine._programs
  count = lambda: [getattr(compiled, name)._cache_size() for name in ("encode", "prefill", "write", "decode")]
  before = count()
  assert engine.answer(requests) == alone
  assert engine.answer(requests[::-1]) == alone[::-1]
  assert count() == before
  assert engine._sizes.groups == [1]
  for each in later:
    each()
  assert engine._sizes.groups == [1, 4]
  before = count()
  assert engine.answer(requests) == alone
  assert count() == before


class FakeAspect:
  vision, patches, most_crops = TINY.vision, TINY.vision.grid**2, 1


def test_weights_are_arguments_not_constants(tiny):
  made, _, decoding = programs.parameters_of(tiny, None)
  cache = made.resize(made.empty(), rows=1, places=128)
  draws = programs.Draws.of([(Sampling(), 0, 0)])
  args = decoding, np.zeros((1, 2), np.int32), draws, np.zeros(1, np.int32), cache
  text = made.decode.lower(*args, candidates=0, count=made.at_once).as_text()
  assert len(text) < 400_000  # the weights alone would be millions of characters


def test_refuses_what_it_cannot_answer(tiny, requests):
  engine = Engine(tiny, Plain(), rows=2, max_length=40)
  with pytest.raises(ValueError, match="takes 28 places and max_new_tokens is 13, together 41; there are 40"):
    engine.submit(dataclasses.replace(requests[1], max_new_tokens=13))
  assert engine.submit(dataclasses.replace(requests[1], max_new_tokens=12)) == 0
  with pytest.raises(ValueError, match="beams is 3, and there are 2 rows"):
    engine.submit(dataclasses.replace(requests[2], beams=3))
  with pytest.raises(ValueError, match="prompt is empty"):
    engine.submit(Request(prompt([])))
  with pytest.raises(ValueError, match="rows is 0"):
    Engine(tiny, Plain(), rows=0)


ON_A_MESH = """
import sys
sys.path.insert(0, {folder!r})
import jax, numpy as np
from flax import nnx
from tiny_models import TINY, Plain, answered, prompt
from mllm_jax import parameters, sharding
from mllm_jax.config import MeshConfig
from mllm_jax.inference.engine import Engine
from mllm_jax.inference.requests import Request
from mllm_jax.models.mllm import Mllm

model = Mllm(TINY, rngs=nnx.Rngs(3))
picture = lambda n: np.full((56, 56, 3), 20 * n, np.uint8)
requests = [Request(prompt([1, -200, *range(5, 5 + n)], picture(n)), 3) for n in range(1, 4)]
requests.append(Request(prompt([1, -200, 8], picture(1)), 3, beams=2))
alone = Engine(model, Plain(), rows=8).answer(requests)
mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
graphdef, flat = parameters.flatten(model)
spread = parameters.unflatten(graphdef, jax.device_put(flat, sharding.parameter_shardings(flat, mesh)))
engine = Engine(spread, Plain(), rows=5, mesh=mesh)
assert engine.rows == 8
assert engine.answer(requests) == alone
given = [answered([1, -200, 8], range(5, 5 + n), picture(n)) for n in range(1, 4)]
one, eight = (np.array(each.likelihoods(given)) for each in (Engine(model, Plain(), rows=8), engine))
np.testing.assert_allclose(eight, one, rtol=1e-5)
engine.submit(requests[0])
engine.step()
assert engine._cache.keys.sharding.spec[1] == sharding.BATCH_AXES, engine._cache.keys.sharding
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


@pytest.mark.long
def test_same_answers_in_two_processes():
  port, folder = free_port(), os.path.dirname(__file__)
  env = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
  command = [sys.executable, f"{folder}/two_processes.py"]
  pair = [
    subprocess.Popen(
      [*command, str(index), str(port)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for index in range(2)
  ]
  for process in pair:
    output, error = process.communicate(timeout=300)
    assert process.returncode == 0 and "the same" in output, error[-3000:]
