"""ConvNeXt's weights out of a file, as a run reads them."""

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from mllm_jax import build, parameters, sharding
from mllm_jax.config import LoraConfig
from mllm_jax.models.mllm import abstract
from mllm_jax.weights import convnext
from mllm_jax.weights.known import WeightsError
from mllm_jax.weights.mapping import export

CONFIG = Path(__file__).parents[2] / "configs" / "uhd_convnext.py"


@pytest.fixture
def recipe():
  spec = importlib.util.spec_from_file_location("uhd_convnext", CONFIG)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config("demo")


@pytest.mark.parametrize("names", [convnext.TIMM, convnext.TRANSFORMERS], ids=["timm", "transformers"])
def test_a_run_starts_from_a_file(names, recipe, tmp_path):
  model = build.architecture(recipe.model, LoraConfig())
  shapes = parameters.flatten(abstract(model))[1]
  random = np.random.default_rng(0)
  expected = {
    path: random.standard_normal(x.shape).astype(np.float32)
    for path, x in shapes.items()
    if path.startswith(convnext.PATH)
  }
  tensors = export(expected, convnext.table(names))
  save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, tmp_path / "model.safetensors")
  recipe.model.convnext_weights = str(tmp_path)
  rates = parameters.match(recipe.pretrain.parameters, list(shapes), "pretrain")
  others = {
    path: np.zeros(x.shape, np.float32)
    for path, x in shapes.items()
    if path.startswith("projector/") and path not in expected
  }
  mesh = sharding.make_mesh(recipe.mesh, jax.devices()[:2])
  flat = build.load_parameters(model, recipe.model, rates, 0, mesh, others)
  assert flat.keys() == shapes.keys()
  for path, x in expected.items():
    np.testing.assert_array_equal(flat[path], x, err_msg=path, strict=True)
  first = build.fingerprints(recipe.model)["convnext_weights"]
  save_file({name: np.ascontiguousarray(x + 1) for name, x in tensors.items()}, tmp_path / "model.safetensors")
  assert build.fingerprints(recipe.model)["convnext_weights"] != first

  recipe.model.projector.convnext_depths = (1, 1, 1, 1)
  model = build.architecture(recipe.model, LoraConfig())
  with pytest.raises(WeightsError, match=r"unexpected: (encoder\.)?stages\.2\.(layers|blocks)\.1"):
    build.load_parameters(model, recipe.model, rates, 0, mesh, others)
