"""The benchmark of a training step: that both sides take the same step, and how they are asked; how fast they were is
not."""

import dataclasses
import runpy
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from mllm_jax import build, parameters, sharding
from mllm_jax.bench import train, train_case
from mllm_jax.bench.train_case import make_batch, make_case
from mllm_jax.compilation import abstract_step
from mllm_jax.config import LoraConfig, MeshConfig
from mllm_jax.models import attention
from mllm_jax.models.mllm import abstract
from mllm_jax.weights import clip, llama, peft, spatial
from mllm_jax.weights.mapping import export

CONFIGS = Path(__file__).parents[2] / "configs"
FACTS = dict(model="7b", rows=4, length=10, dtype="bfloat16", remat="full", steps=3, tokens=40, flops=3e12)
FACTS |= dict(device="H100", device_flops=1e13, attention="cudnn", loss=10.4, platform="gpu")


def recipe(variant: str):
  return runpy.run_path(str(CONFIGS / "sp_cropping.py"))["get_config"](variant)


def small_case(remat: str = "", accelerator: bool = False) -> train_case.Case:
  """The demo's stage on towers of a few thousand parameters, with grouped-query attention."""
  case = make_case("demo", 2, 110, remat, accelerator)
  parts = dict(
    vision=tiny.VISION, decoder=tiny.DECODER, projector=tiny.PROJECTOR, lora=LoraConfig(rank=2, alpha=4.0, dropout=0.1)
  )
  model = dataclasses.replace(case.model, **parts)
  shapes = parameters.flatten(abstract(model))[1]
  rates = parameters.match(case.stage.parameters, list(shapes), "parameters")
  return dataclasses.replace(case, model=model, shapes=shapes, rates=rates)


@pytest.mark.parametrize("name, variant, accelerator", [("demo", "demo", False), ("7b", "", True)])
def test_the_case_is_the_recipes_second_stage(name, variant, accelerator):
  config, case = recipe(variant), make_case("", 0, 0, "", accelerator)
  assert case.name == name and case.recipe == config.model
  assert case.stage == dataclasses.replace(config.finetune, batch_size=16)
  assert (case.model.packed, case.model.lora) == (False, config.finetune.lora)
  expected = jax.tree.map(lambda x: (x.shape, x.dtype), abstract_step.batch(case.model, case.stage))
  batch = make_batch(case)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), batch) == expected
  assert batch.segment_ids.min() == 1  # no padding
  assert case.facts(batch, "NVIDIA H100 80GB HBM3")["device_flops"] == 989e12
  assert case.facts(batch, "cpu")["device_flops"] == 0


def test_a_batch_of_conversations_about_pictures():
  case = small_case()
  batch = make_batch(case, np.array([110, 70]))
  start, end = train_case.BEFORE, train_case.BEFORE + 18  # 4 x 4 patches and two spatial tokens
  np.testing.assert_array_equal(batch.visual_index[0, :, start:end], np.tile(np.arange(18), (2, 1)))
  assert (np.delete(batch.visual_index[0], np.arange(start, end), axis=1) == -1).all()
  assert (batch.segment_ids[0].sum(axis=1) == [110, 70]).all() and not batch.segment_ids[0, 1, 70:].any()
  assert (batch.loss_weights[0].sum(axis=1) == [110 - (53 + 110) // 2, 70 - (53 + 70) // 2]).all()
  trained = batch.loss_weights[0] > 0
  np.testing.assert_array_equal(batch.targets[0, :, :-1][trained[:, :-1]], batch.tokens[0, :, 1:][trained[:, :-1]])
  assert not trained[:, -1].any() and (batch.targets[0][trained] >= 3).all() and not batch.targets[0][~trained].any()


def test_rows_without_room_for_a_picture():
  with pytest.raises(SystemExit, match="a picture and an answer take 105 at least"):
    make_case("demo", 2, 104, "", False)


def test_on_a_gpu_the_7b_step_attends_by_cudnn(monkeypatch):
  """Lowered for one that is not there, with what jax would ask it."""
  from jax._src.cudnn import fused_attention_stablehlo as cudnn

  monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91300)
  for name in ("check_compute_capability", "is_cuda_compute_capability_equal"):
    monkeypatch.setattr(cudnn, name, lambda capability: capability == "9.0")
  monkeypatch.setattr(attention, "_device", lambda: "gpu")
  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  step = abstract_step.make(recipe(""), "finetune", mesh)
  with jax.set_mesh(mesh):
    assert train_case.attention_of(make_case("7b", 1, 0, "", True).model) == "cudnn"
    text = step.step.trace(*step.arguments).lower(lowering_platforms=("cuda",)).as_text()
  calls = [line for line in text.splitlines() if "custom_call @__cudnn" in line]
  kinds = Counter((line.partition("@")[2].partition("(")[0], "PADDING_CAUSAL" in line) for line in calls)
  forward, backward = "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"
  # The tower's layers, which see all of their places; the decoder's, which are computed again on the way back.
  assert kinds == {(forward, False): 1, (forward, True): 2, (backward, True): 1}


def test_our_side_takes_the_trainers_steps():
  case = small_case()
  side = train_case.Ours(case, make_batch(case))
  assert abs(side.facts["loss"] - np.log(tiny.DECODER.vocab_size)) < 0.05  # random weights know nothing
  assert side.turn() > 0 and int(side.state.step) == 1 + train_case.TURN
  held = sum(x.nbytes for x in jax.tree.leaves((side.state, side.frozen, side.batch)))
  size, known = side.peak()
  assert size > held and known == "as the step is compiled"
  # Of the flops' counter, whose own tests say what it counts: all of the rows' places, half of the answers trained.
  assert side.facts["tokens"] == 2 * 110 and side.facts["flops"] > 0
  bad = jax.tree.map(lambda x: x * np.nan, side.state.trainable)
  side.state = dataclasses.replace(side.state, trainable=bad)
  with pytest.raises(RuntimeError, match="not finite"):
    side.step()


def test_random_parameters_are_made_in_their_place_and_type():
  mesh = sharding.make_mesh(MeshConfig())
  case = small_case()
  dtypes = dict.fromkeys(case.shapes, "bfloat16")
  flat = train_case.random_parameters(build.placed({p: (x.shape, dtypes[p]) for p, x in case.shapes.items()}, mesh))
  assert {path: x.shape for path, x in flat.items()} == {path: x.shape for path, x in case.shapes.items()}
  kernel = flat["projector/sfe/kernels/0"]
  assert kernel.dtype == "bfloat16" and kernel.addressable_shards[0].data.size == kernel.size // mesh.size
  embedding = np.asarray(flat["decoder/embedding"], np.float32)
  assert abs(embedding.std() / 0.02 - 1) < 0.05 and abs(embedding.mean()) < 1e-3
  assert (np.asarray(flat["decoder/norm/scale"]) == 1).all()
  assert not np.asarray(flat["decoder/layers/q_proj/lora/b"]).any()
  assert (np.asarray(flat["decoder/layers/q_proj/kernel"]) != np.asarray(flat["decoder/layers/o_proj/kernel"])).any()


# ---- how the sides are asked -----------------------------------------------------------------------------------------


class Fake:
  """A side that writes down what it is asked for."""

  def __init__(self, log: list[str], whose: str, platform: str, beside: bool, seconds: float):
    self.log, self.whose, self.seconds, self.facts = log, whose, seconds, FACTS
    log.append(f"start {whose} {platform} {beside}".replace("  ", " "))

  def turn(self) -> float:
    self.log.append(self.whose)
    return self.seconds

  def finish(self) -> tuple[int, str]:
    self.log.append(f"finish {self.whose}")
    return 2**30, "of the device"


def measured(room: int, only: str = ""):
  """What `measure` does on a device with room for so many PyTorch sides: 2: beside ours, 1: alone."""
  log = []

  def start(whose, platform, beside):
    if whose == "torch" and room < 1 + beside:
      raise train.NoRoom("CUDA out of memory")
    return Fake(log, whose, platform, beside, {"ours": 1.0, "torch": 1.5}[whose])

  return *train.measure(start, only, 2), log


def test_the_sides_take_turns_where_both_fit():
  found, how, log = measured(room=2)
  assert log[:2] == ["start ours True", "start torch gpu True"] and log[2:6] == ["ours", "torch"] * 2
  assert how == "in turns" and found["torch"].seconds == [1.5, 1.5]
  lines = train.report(found, how)
  # 4 rows of 10 tokens and 3e12 operations a step, three of which took a second, of at most 1e13 a second.
  assert "12.00 samples/s" in lines[1] and "120 tokens/s" in lines[1] and "MFU 90.0%" in lines[1]
  assert "8.00 samples/s" in lines[3] and "MFU 60.0%" in lines[3] and "peak 1.00 GiB (of the device)" in lines[3]
  assert lines[-1].startswith("ratio    1.50 times") and lines[-1].endswith("(1.50 to 1.50), in turns")


def test_where_only_one_fits_they_run_one_after_the_other():
  found, how, log = measured(room=1)
  assert log[1:] == ["ours"] * 2 + ["finish ours", "start torch gpu False"] + ["torch"] * 2 + ["finish torch"]
  assert list(found) == ["ours", "torch"] and how == "one side after the other"
  found, how, log = measured(room=0)
  assert list(found) == ["ours"] and train.report(found, how)[-1] == (
    "PyTorch's step does not fit on the device: CUDA out of memory"
  )
  found, how, log = measured(room=0, only="ours")
  assert log[0] == "start ours False" and len(train.report(found, how)) == 3


def test_without_pytorch_one_line_says_so(monkeypatch, capsys):
  monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None)
  assert train.main([]) == 2
  error = capsys.readouterr().err
  assert error == "torch and peft not installed: pip install 'mllm_jax[torch]', or --only=ours\n"


class Pipe(list):
  """What a side sends; it is asked for a turn and for the peak."""

  asked = ("turn", "peak")

  def send(self, message):
    self.append(message)

  def recv(self):
    return self.asked[len(self) - 1]


def test_a_side_answers_what_it_is_asked(monkeypatch):
  monkeypatch.setattr(
    train, "our_side", lambda *_: type("", (), dict(facts=FACTS, turn=lambda _: 2.0, peak=lambda _: 3))()
  )
  monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "true")
  monkeypatch.delenv("MLLM_JAX_UNSET", raising=False)
  pipe = Pipe()
  train.serve(pipe, "ours", (), "", {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"})
  assert pipe == [(FACTS, ""), (2.0, ""), (3, "")]
  assert train.os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] == "true"  # the user's

  def full(*_):
    raise ValueError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 bytes")

  monkeypatch.setattr(train, "our_side", full)
  pipe = Pipe()
  train.serve(pipe, "ours", (), "", {})
  ((answer, problem),) = pipe
  assert answer is None and any(text in problem.lower() for text in train.FULL)


def test_a_side_is_a_process_of_its_own():
  with pytest.raises(SystemExit, match="ours: --length=10: a prompt, a picture and an answer take 105 at least"):
    train.Side("ours", ("demo", 2, 10, ""), "", True)


# ---- against PyTorch -------------------------------------------------------------------------------------------------


def by_torch_names(case: train_case.Case, flat: dict) -> dict[str, dict[str, np.ndarray]]:
  """{part of PyTorch's side: {name there: array}} of all parameters by path."""
  arrays = {path: np.asarray(x) for path, x in flat.items()}
  of = lambda *parts: {p: x for p, x in arrays.items() if p.split("/")[0] == parts[0] and ("/lora/" in p) == parts[1]}
  model = case.model
  adapted = lambda name: (
    name.replace(".weight", ".base_layer.weight") if name.split(".")[-2] in model.lora.targets else name
  )
  decoder = {adapted(name): x for name, x in export(of("decoder", False), llama.table(model.decoder)).items()}
  lora = export(of("decoder", True), peft.table(model.lora, "model."))
  decoder |= {name.replace(".weight", ".default.weight"): x for name, x in lora.items()}
  projector = export(of("projector", False), spatial.table(model.projector, model.vision.grid))
  return {
    "tower": export(of("vision", False), clip.table(model.vision, "")),
    "decoder": decoder,
    "projector": {name.removeprefix("model."): x for name, x in projector.items()},
  }


def parts(side) -> dict:
  return {"tower": side.tower, "decoder": side.decoder.base_model.model, "projector": side.projector}


def with_weights(case: train_case.Case, batch, flat: dict):
  """PyTorch's side on the CPU with these weights."""
  import torch

  from mllm_jax.bench.train_torch import Torch

  side = Torch(case, batch, "cpu")
  for name, arrays in by_torch_names(case, flat).items():
    tensors = {name: torch.tensor(np.ascontiguousarray(x)) for name, x in arrays.items()}
    told = parts(side)[name].load_state_dict(tensors, strict=False)
    assert not told.unexpected_keys
    assert all(name.startswith("post_layernorm.") for name in told.missing_keys), told.missing_keys
  return side


def random_flat(case: train_case.Case) -> dict[str, np.ndarray]:
  """Weights with which everything matters: adapters and biases are not zero, scales not one."""
  draw = np.random.default_rng(0)
  center = lambda path: float(path.endswith("/scale"))
  deviation = lambda path, x: 0.05 if len(x.shape) < 2 or "/lora/b" in path else np.prod(x.shape[-2:-1]) ** -0.5
  return {
    path: (center(path) + deviation(path, x) * draw.standard_normal(x.shape)).astype(np.float32)
    for path, x in case.shapes.items()
  }


@pytest.mark.torch
def test_pytorch_takes_the_same_steps():
  """With the same weights, at the demo's size, on rows with padding: losses, all gradients and updated parameters."""
  case = make_case("demo", 2, 0, "", False)
  batch, flat = make_batch(case, np.array([192, 150])), random_flat(case)
  theirs = with_weights(case, batch, flat)
  losses, moments = [], {}
  for _ in range(4):
    losses.append(theirs.step().item())
    for name, module in parts(theirs).items():
      for path, parameter in module.named_parameters():
        if parameter.requires_grad and name != "tower":
          moments.setdefault((name, path), theirs.optimizer.state[parameter]["exp_avg"].numpy().copy())
  ours = train_case.Ours(case, batch, jax.tree.map(jax.numpy.array, flat))
  rest = {path: x for path, x in flat.items() if not case.rates[path]}
  gradients = by_torch_names(case, rest | jax.device_get(ours.state.optimizer[0].mu))
  assert len(moments) == 2 * 7 * 4 + 4 + 1 + 12 + 2 + 4  # adapters; kernels, DFI's, its layers, head, patches' MLP
  scale = max(np.abs(x).max() for x in moments.values())
  for (name, path), expected in moments.items():
    # Sums in float32 in another order. Keys' biases have no gradient at all but rounding's.
    allowed = 5e-5 * np.abs(expected).max() + 1e-8 * scale
    np.testing.assert_allclose(gradients[name][path], expected, rtol=0, atol=allowed, err_msg=path)
  found = [ours.facts["loss"]] + [ours.step() for _ in range(3)]
  np.testing.assert_allclose(found, losses, rtol=1e-5)
  updated = by_torch_names(case, rest | jax.device_get(ours.state.trainable))
  for name, path in moments:
    parameter = dict(parts(theirs)[name].named_parameters())[path].detach().numpy()
    # Adam's steps are as large as the rate wherever there is a gradient, be it rounding's; four of at most 1.5e-4.
    different = np.abs(updated[name][path] - parameter) > 1e-5
    assert different.mean() < 1e-3 or "key_projector" in path, path


@pytest.mark.torch
@pytest.mark.parametrize("remat, accelerator", [("full", False), ("none", True), ("full", True)])
def test_pytorch_in_16_bits_and_with_layers_computed_again(remat, accelerator):
  """As it runs on a GPU, against the whole step in float32."""
  found = []
  for case in (small_case("none"), small_case(remat, accelerator)):
    # Without dropout, whose draws differ from run to run.
    case = dataclasses.replace(
      case, model=dataclasses.replace(case.model, lora=LoraConfig(rank=2, alpha=4.0, dropout=0.0))
    )
    side = with_weights(case, make_batch(case), random_flat(case))
    loss = side.step().item()
    trained = [p for module in (side.projector, side.decoder) for p in module.parameters() if p.requires_grad]
    found.append((loss, [side.optimizer.state[p]["exp_avg"] for p in trained]))
    assert all(p.dtype.itemsize == 4 for p in trained)
    frozen = [
      p for module in (side.tower, side.decoder) for p in module.parameters() if not any(p is t for t in trained)
    ]
    assert {p.dtype.itemsize for p in frozen} == {2 if side.mixed else 4}
  (expected, gradients), (loss, others) = found
  # With layers computed again the same sums are taken; bfloat16 has 8 bits, which narrow layers do not average out.
  tolerance = 0.2 if accelerator else 1e-5
  np.testing.assert_allclose(loss, expected, rtol=0.05 * tolerance)
  norm = lambda tensors: np.sqrt(sum(float(t.square().sum()) for t in tensors))
  assert norm([a - b for a, b in zip(gradients, others, strict=True)]) < tolerance * norm(gradients)


@pytest.mark.torch
def test_pytorch_has_the_7b_models_parameters():
  import torch

  from mllm_jax.bench.train_torch import modules

  case = make_case("7b", 2, 0, "", True)
  tower, decoder, projector = modules(case.model, torch.device("meta"))
  ours = Counter()
  for path, x in case.shapes.items():
    ours["lora" if "/lora/" in path else path.partition("/")[0]] += int(np.prod(x.shape))
  count = lambda module, trained=True: sum(p.numel() for p in module.parameters() if p.requires_grad == trained)
  post_layernorm = 2 * case.model.vision.width
  assert (count(tower) - post_layernorm, count(projector)) == (ours["vision"], ours["projector"])
  assert (count(decoder, False), count(decoder)) == (ours["decoder"], ours["lora"]) == (6_738_415_616, 319_815_680)
  types = {(p.dtype, p.requires_grad) for p in decoder.parameters()} | {(p.dtype, True) for p in projector.parameters()}
  assert types == {(torch.bfloat16, False), (torch.float32, True)}
