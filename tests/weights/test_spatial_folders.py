"""LLaVA-SP's ablations in whole released checkpoints, and those that have no place there."""

import dataclasses

import layouts
import numpy as np
import pytest

from mllm_jax import convert
from mllm_jax.config import ProjectorConfig
from mllm_jax.weights import assemble, folder
from mllm_jax.weights.known import WeightsError
from mllm_jax.weights.tensors import InMemory

BLOCKS = ProjectorConfig(sfe="transformer", token_order="released", stride=1, dfi_kernel=0)
PROJECTORS = {
  "windows": ProjectorConfig(sfe="windows", window=2, window_strides=(2, 2), dfi_kernel=0, conv_width=8),
  "cropping": BLOCKS,
  "pooling": dataclasses.replace(BLOCKS, maps="pooling"),
}


@pytest.mark.parametrize("name", PROJECTORS)
def test_a_released_model_is_read(name, tmp_path):
  model = layouts.model(PROJECTORS[name])
  tower = layouts.vision_folder(tmp_path / "clip", model)
  released = layouts.official_folder(tmp_path / "model", model, str(tower))
  stored = assemble.open_model(str(released), maps="" if name == "windows" else name)
  assert stored.manifest.parts["projector"] == PROJECTORS[name]
  for path, expected in layouts.arrays(model, "projector").items():
    np.testing.assert_array_equal(stored.tensors.read(path), expected)
  if name != "windows":
    with pytest.raises(WeightsError, match="pytorch_model.bin has transformer blocks.*--maps=cropping"):
      assemble.open_model(str(released))


def ours(path, projector):
  """A folder of ours."""
  model = layouts.model(projector)
  parts = {name: getattr(model, name) for name in ("vision", "decoder", "projector")}
  arrays = {}
  for name in parts:
    arrays |= layouts.arrays(model, name)
  folder.write(path, folder.Manifest(parts, "vicuna_v1"), InMemory(arrays), str(layouts.tokenizer(path / "../words")))
  return path


def test_there_and_back_by_the_command_line(tmp_path):
  source = ours(tmp_path / "ours", PROJECTORS["pooling"])
  tower = layouts.vision_folder(tmp_path / "clip", layouts.model(PROJECTORS["pooling"]))
  exported, back = tmp_path / "llava-sp", tmp_path / "back"
  named = ["--format=official", f"--vision_tower={tower}", f"--out={exported}"]
  assert convert.main(["export", f"--checkpoint={source}", *named]) == 0
  assert convert.main(["import", f"--model={exported}", "--maps=pooling", f"--out={back}"]) == 0
  stored = assemble.open_model(str(back))
  assert stored.manifest.parts["projector"] == PROJECTORS["pooling"]
  for path, expected in layouts.arrays(layouts.model(PROJECTORS["pooling"]), "projector").items():
    np.testing.assert_array_equal(stored.tensors.read(path), expected)


def test_what_has_no_released_names_is_not_exported(tmp_path, capsys):
  light = ProjectorConfig(sfe="factorised", stride=1, dfi_kernel=0, conv_width=8)
  source, out = ours(tmp_path / "ours", light), tmp_path / "llava-sp"
  named = ["--format=official", "--vision_tower=weights/clip", f"--out={out}"]
  assert convert.main(["export", f"--checkpoint={source}", *named]) != 0
  assert "projector.sfe=factorised is none of the released code's" in capsys.readouterr().err
  assert not out.exists()
