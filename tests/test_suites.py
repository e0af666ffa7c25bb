"""The suites of ablations: every row is a recipe that is there, and traces at its real size."""

import dataclasses
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from mllm_jax import build, parameters, preflight
from mllm_jax.ablation.plan import plan
from mllm_jax.config import Config, LoraConfig, check_types
from mllm_jax.models.mllm import abstract
from mllm_jax.suites import SUITES
from mllm_jax.training import vdim_step

CONFIGS = Path(__file__).parents[1] / "configs"
ROWS = [
  pytest.param(recipe, overrides, id=f"{suite}, {label}")
  for suite, rows in SUITES.items()
  for label, recipe, overrides, _ in rows
  if suite.startswith("uhd")
]


def load(recipe: str, overrides: dict, variant: str = "") -> Config:
  spec = importlib.util.spec_from_file_location(recipe, CONFIGS / f"{recipe}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config(variant)
  for path, value in overrides.items():
    *parents, name = path.split(".")
    part = config
    for parent in parents:
      part = getattr(part, parent)
    assert name in {field.name for field in dataclasses.fields(part)}, path
    setattr(part, name, value)
  check_types(config)
  return config


@pytest.mark.parametrize("recipe, overrides", ROWS)
def test_a_row_traces_at_full_size(recipe, overrides):
  for variant in ("demo", ""):
    config = load(recipe, overrides, variant)
    model_config = build.architecture(config.model, LoraConfig())
    model = abstract(model_config)
    paths = list(parameters.flatten(model)[1])
    for name in preflight.stage_names(config):
      if name == "vdim":
        assert vdim_step.count_levels(config.model.projector) == max(config.model.projector.levels)
      else:
        parameters.match(getattr(config, name).parameters, paths, name)
  vision = model_config.vision
  patches = jax.ShapeDtypeStruct((2, 7, vision.grid**2, vision.patch_values), jnp.uint8)
  grids = jax.ShapeDtypeStruct((2, 7, 2), jnp.int32)
  tokens = jax.eval_shape(lambda model, *images: model.visual_tokens(*images), model, patches, grids)
  assert (tokens.shape, tokens.dtype) == ((2, 7 * 144, model_config.decoder.width), jnp.bfloat16)


def test_rows_differ_and_have_labels_of_their_own():
  for rows in SUITES.values():
    assert len({row.label for row in rows}) == len({repr(row[1:]) for row in rows}) == len(rows) > 1


@pytest.mark.parametrize("suite", SUITES)
def test_no_two_runs_of_a_suite_share_a_folder(suite, tmp_path):
  folders = [run.folder for run in plan(suite, 2, tmp_path)]
  assert len({str(folder).lower() for folder in folders}) == len(folders) >= 2 * len(SUITES[suite])
