"""Which checkpoints a run goes on from."""

import copy
import json

import pytest

from mllm_jax.config import ConfigError, DataConfig, ModelConfig, ProjectorConfig, StageConfig
from mllm_jax.continuation import check_identity, model_identity, recipe_identity


def identity(**projector) -> dict:
  """As a checkpoint keeps it."""
  model, stage = ModelConfig(projector=ProjectorConfig(**projector)), StageConfig(data=DataConfig())
  content = {"stage": "pretrain", "model": model_identity(model), "recipe": recipe_identity(stage)}
  return json.loads(json.dumps(content))


def test_fields_that_are_younger_than_a_checkpoint_count_as_their_defaults(tmp_path):
  old = copy.deepcopy(identity())
  del old["model"]["projector"]["sfe"], old["recipe"]["data"]["max_slices"]
  check_identity(old, identity(), tmp_path)
  with pytest.raises(ConfigError, match="model.projector.sfe: convolution in the checkpoint, windows now"):
    check_identity(old, identity(sfe="windows"), tmp_path)
  with pytest.raises(ConfigError, match="model.projector.stride: 1 in the checkpoint, 2 now"):
    check_identity(identity(stride=1), identity(), tmp_path)


def test_how_a_model_is_computed_may_change(tmp_path):
  """A stage that does not fit a chip's memory goes on from what the one before was trained with."""
  models = [ModelConfig(remat=remat, attention=kind) for remat, kind in (("none", "auto"), ("full", "xla"))]
  assert model_identity(models[0]) == model_identity(models[1])
  old = identity()
  old["model"] |= {"remat": "none"}  # as older checkpoints have it
  check_identity(old, identity(), tmp_path)
