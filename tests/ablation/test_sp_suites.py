"""LLaVA-SP's suites: each row has the tokens, details and parameters of the paper's, and what is compared is fair."""

import importlib.util
import math
from pathlib import Path

import pytest

from mllm_jax import build, parameters, preflight
from mllm_jax.ablation import plan
from mllm_jax.config import Config, LoraConfig, check_types
from mllm_jax.models.mllm import abstract
from mllm_jax.models.projectors.maps import spatial_tokens
from mllm_jax.suites import SUITES, Row

# By row: spatial tokens at full size and on the demo, and the projector's MiB in bfloat16 at full size where the
# released code's layers make it up: a kernel of k x k is k^2 MiB, and head, MLP, queries, keys and values are 44.02
# without DFI and 49.53 with it.
SFE, DFI = 44.02, 49.53
MAPS = sum(k**2 for k in range(4, 25, 4))
ROWS = {
  "sp_tokens": (
    (3, 1, 8**2 + 16**2 + 24**2 + SFE),
    (6, 2, MAPS + SFE),
    (12, 4, sum(k**2 for k in range(2, 25, 2)) + SFE),
    (6, 6, 12**2 + SFE),
    (49, 9, 12**2 + SFE),
  ),
  "sp_sfe": ((6, 4, 1500.0), (6, 4, 816.3), (6, 4, None), (6, 4, 1500.0), (6, 4, 816.3), (6, 4, None)),
  "sp_dfi": ((6, 4, 1500.0), *((6, 4, MAPS + k**2 + DFI) for k in (16, 12, 8, 4))),
  "sp_towers": ((0, 0, None), (6, 4, 1761.5), (6, 4, 1761.5), (0, 0, None), (8, 4, None), (8, 4, None)),
}
CASES = [
  pytest.param(row, *wanted, id=f"{suite}, {row.label}")
  for suite, all_wanted in ROWS.items()
  for row, wanted in zip(SUITES[suite], all_wanted, strict=True)
]


def full_size(row: Row) -> Config:
  spec = importlib.util.spec_from_file_location(row.recipe, plan.CONFIGS / f"{row.recipe}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config()
  for path, value in row.overrides.items():
    *parents, name = path.split(".")
    part = config
    for parent in parents:
      part = getattr(part, parent)
    setattr(part, name, value)
  check_types(config)
  return config


@pytest.mark.parametrize("row, tokens, demo_tokens, mib", CASES)
def test_a_row_is_the_papers(row, tokens, demo_tokens, mib):
  for config, wanted, wanted_mib in ((full_size(row), tokens, mib), (plan.settings(row, 0)[1], demo_tokens, None)):
    made = build.architecture(config.model, LoraConfig())
    found = spatial_tokens(made.projector, made.vision.grid) if made.projector.kind.startswith("spatial") else 0
    assert found == wanted
    shapes = parameters.flatten(abstract(made))[1]
    size = sum(math.prod(x.shape) for path, x in shapes.items() if path.startswith("projector/")) * 2 / 2**20
    if wanted_mib is not None:
      assert size == pytest.approx(wanted_mib, rel=1e-4)
    for name in preflight.stage_names(config):
      parameters.match(getattr(config, name).parameters[:3], list(shapes), name)


def test_kernels_of_dfi():
  details = lambda grid, kernel: ((grid - kernel) // 2 + 1) ** 2
  kernels = lambda configs: [config.model.projector.dfi_kernel for config in configs]
  rows = SUITES["sp_dfi"][1:]
  assert [details(24, k) for k in kernels(map(full_size, rows))] == [25, 49, 81, 121]
  assert [details(8, k) for k in kernels(plan.settings(row, 0)[1] for row in rows)] == [4, 9, 9, 16]


# What a suite's rows may differ in besides the projector. InternVL's are packed rows of tiles, and its layer norm wants
# another rate.
DIFFERENT = {
  "sp_towers": {
    *("pretrain.data.image_aspect", "finetune.data.image_aspect", "finetune.data.batching", "finetune.batch_size"),
    "pretrain.parameters",
  },
  "uhd_pyramids": {"finetune.parameters"},  # ConvNeXt takes the place of the tower, which stays as it is
}


@pytest.mark.parametrize("suite", SUITES)
def test_rows_have_the_same_budget(suite):
  runs = plan.plan(suite, 1, Path("runs"))
  equal, different = plan.budgets(runs)
  assert set(different) == DIFFERENT.get(suite, set())
  assert equal["demo_shapes"] == str(suite.startswith("uhd") or suite == "sp_towers")
  steps = {"sp_towers": ("440", "400")}.get(suite, ("600", "170") if suite.startswith("uhd") else ("220", "400"))
  assert (equal["pretrain.steps"], equal["finetune.steps"]) == steps
  for run in runs:
    assert run.config.seed == 0 and run.config.evaluation.stages == "finetune"


def test_a_vdim_is_shared_by_rows_that_would_train_the_same():
  shared = lambda suite: [run.vdim.label if run.vdim else "" for run in plan.plan(suite, 1, Path("runs"))]
  assert shared("uhd_modules") == ["", "", *["stage_vdim"] * 3]
  assert shared("uhd_pyramids") == ["", "", "", "", "stage_vdim"]
  first, second, third, fourth = ("stage_vdim", "stage_vdim_2", "stage_vdim_3", "stage_vdim_4")
  assert shared("uhd_levels") == ["", first, "", second, second, "", third, "", fourth]
  seeds = plan.plan("uhd_pooling", 2, Path("runs"))
  assert [run.vdim.folder.name for run in seeds if run.vdim] == ["seed-0"] * 3 + ["seed-1"] * 3
