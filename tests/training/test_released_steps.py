"""Six optimizer steps of the released trainer, both stages, with and without weight decay."""

import json

import jax
import numpy as np
import pytest
import released

from mllm_jax import parameters, sharding
from mllm_jax.batch import Batch
from mllm_jax.config import (
  DecoderConfig,
  LoraConfig,
  MeshConfig,
  ModelConfig,
  ProjectorConfig,
  StageConfig,
  VisionConfig,
)
from mllm_jax.data import layout
from mllm_jax.data.chat import Encoded
from mllm_jax.data.patches import patchify
from mllm_jax.models import mllm
from mllm_jax.training import optimizer as optimizer_lib
from mllm_jax.training import step as step_lib
from mllm_jax.weights import clip, llama, mapping, peft, spatial

STEPS = json.loads((released.FOLDER / "train_steps.json").read_text())
GRID = 24


def golden_batch(golden) -> Batch:
  """Three rows: a wide picture, a tall one, and text alone."""
  pictures = [released.read(name)["clip.resized_uint8"] for name in ("img_wide640x360", "img_tall300x500")]
  rows = []
  for ids, labels, mask in zip(golden["input_ids"], golden["labels"], golden["attention_mask"]):
    encoded = Encoded(ids[: mask.sum()], labels[: mask.sum()] != -100)
    rows.append(layout.pad(layout.expand(encoded, [6 + GRID**2] * int((encoded.ids == -200).sum())), 612))
  pixels = np.stack([*pictures, np.zeros_like(pictures[0])])[:, None]
  grids = np.array([[[GRID, GRID]], [[GRID, GRID]], [[0, 0]]], np.int32)
  return Batch(*(np.stack(field) for field in zip(*rows)), patches=patchify(pixels, 14), grids=grids)


@pytest.mark.parametrize("case", ["stage1_wd0.0", pytest.param("stage2_wd0.0", marks=pytest.mark.long), "stage2_wd0.1"])
def test_losses_gradient_norms_and_parameters_of_six_steps(case):
  expected, golden, adapters = (
    STEPS[case],
    released.read("e2e_crop_dfi"),
    released.group(released.read("lora_mha"), "w."),
  )
  second_stage = case.startswith("stage2")
  lora = LoraConfig(rank=4, alpha=8.0, dropout=0.0) if second_stage else LoraConfig()
  config = ModelConfig(
    vision=VisionConfig(width=16, layers=3, heads=2, mlp_width=32),
    decoder=DecoderConfig(vocab_size=320, width=64, layers=4, heads=4, kv_heads=4, head_width=16, mlp_width=160),
    projector=ProjectorConfig(conv_width=8),
    lora=lora,
    dtype="float32",
    remat="none",
  )
  rules = (
    (r"vision/.*", 0.0),
    (r"decoder/(?!.*/lora/).*", 0.0),
    (r"projector/.*", expected["mm_projector_lr"] or expected["lr"]),
  )
  rules += ((r"decoder/.*/lora/[ab]", expected["lr"]),) if second_stage else ()
  stage = StageConfig(
    lora=lora,
    parameters=rules,
    batch_size=3,
    weight_decay=expected["wd"],
    warmup_ratio=expected["warmup_steps"] / expected["total_steps"],
  )

  graphdef, shapes = parameters.flatten(mllm.abstract(config))
  tables = [
    ("vision/", clip.table(config.vision), released.group(golden, "clip.")),
    ("projector/", spatial.table(config.projector, GRID), released.group(golden, "w.")),
    ("decoder/", llama.table(config.decoder), released.group(released.read("llama_mha"), "w.")),
  ]
  flat = {}
  for prefix, table, arrays in tables:
    targets = {path: shape for path, shape in shapes.items() if path.startswith(prefix) and "/lora/" not in path}
    flat |= mapping.load(released.weights(arrays), table, targets)
  targets = {path: shape for path, shape in shapes.items() if "/lora/" in path}
  if targets:
    flat |= mapping.load(released.weights(adapters), peft.table(lora), targets)

  rates = parameters.match(rules, list(flat), "parameters")
  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  trainable = {path: value for path, value in flat.items() if rates[path]}
  frozen = {path: value for path, value in flat.items() if not rates[path]}
  optimizer = optimizer_lib.make(stage, trainable)
  state = step_lib.initial_state(optimizer, trainable, mesh)
  step = step_lib.make_step(
    graphdef,
    stage,
    {path: rates[path] for path in trainable},
    expected["total_steps"],
    0,
    mesh,
    optimizer,
    step_lib.state_shardings(optimizer, trainable, mesh),
  )
  batch = jax.tree.map(lambda x: x[None], golden_batch(golden))
  losses, norms = [], []
  for _ in range(expected["total_steps"]):
    state, metrics = step(state, frozen, batch)
    losses.append(float(metrics["loss"]))
    norms.append(float(metrics["grad_norm"]))
  np.testing.assert_allclose(losses, expected["losses"], rtol=1e-4)
  np.testing.assert_allclose(norms, expected["grad_norms_unclipped"], rtol=1e-4)

  check_parameter_sums(state.trainable, expected["param_sums_after"], config)


def check_parameter_sums(trainable: dict, expected: dict, config: ModelConfig) -> None:
  """The sum over each parameter after the last step, by its released name."""
  foreign = mapping.export(
    {path: np.asarray(value) for path, value in trainable.items() if "/lora/" not in path},
    spatial.table(config.projector, GRID),
  )
  if config.lora.rank:
    foreign |= mapping.export(
      {path: np.asarray(value) for path, value in trainable.items() if "/lora/" in path}, peft.table(config.lora)
    )
  compared = 0
  for name, total in expected.items():
    ours = {key.removeprefix("base_model.model."): value for key, value in foreign.items()}
    key = name.replace(".default.", ".").removeprefix("base_model.model.")
    if key.startswith("model.key_projector") and key.endswith("bias"):
      continue  # its gradient is zero in exact arithmetic, and Adam turns the rounding noise into steps
    # A sum over n elements of n steps of up to the learning rate each; the noise of single elements adds up.
    np.testing.assert_allclose(
      ours[key].astype(np.float64).sum(), total, atol=2e-3 + 1e-6 * ours[key].size, err_msg=name
    )
    compared += 1
  assert compared >= len(expected) - 2


def test_schedule_equals_hugging_faces_cosine():
  factors = [float(optimizer_lib.schedule(100, 0.03)(step)) for step in range(100)]
  expected = STEPS["cosine_factors_total100_warm3"]
  np.testing.assert_allclose(factors, expected[:100], atol=1e-6)  # float32 schedule


def test_warmup_steps_are_rounded_up():
  # ceil(0.03 * 34) = 2: the factor of step 1 is 1/2
  assert float(optimizer_lib.schedule(34, 0.03)(1)) == 0.5
  assert float(optimizer_lib.schedule(10, 0.0)(0)) == 1.0
  assert float(optimizer_lib.schedule(1, 0.03)(0)) == 0.0
