"""LLaVA-SP's ablations in whole released checkpoints, and those that have no place there."""

import dataclasses

import layouts
import numpy as np
import pytest

from mllm_jax import convert
from mllm_jax.config import ProjectorConfig
from mllm_jax.weights import assemble, folder, mapping, peft
from mllm_jax.weights.known import WeightsError
from mllm_jax.weights.tensors import InMemory

BLOCKS = ProjectorConfig(sfe="transformer", token_order="released", stride=1, dfi_kernel=0)
PROJECTORS = {
  "windows": ProjectorConfig(sfe="windows", window=2, window_strides=(2, 2), dfi_kernel=0, conv_width=8),
  "cropping": BLOCKS,
  "pooling": dataclasses.replace(BLOCKS, maps="pooling"),
}


FOLDERS = {"clip": layouts.vision_folder, "vicuna": layouts.decoder_folder}


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


@pytest.mark.parametrize("adapted", ["linear2.weight", "linear2.base_layer.weight"])  # PEFT before 0.7, and since
def test_adapters_of_transformer_blocks_are_folded_in(adapted, tmp_path):
  """The released list of what shall have no adapter means to hold these blocks and does not."""
  model = layouts.model(PROJECTORS["cropping"], lora=layouts.LORA)
  tower, base = (make(tmp_path / name, model) for name, make in FOLDERS.items())
  run = layouts.lora_folder(tmp_path / "run", model, str(tower), str(base))
  prefix, expected = "base_model.model.model.", layouts.arrays(model, "projector")
  trained = layouts.projector_names(model, prefix)
  adapter = mapping.export(layouts.arrays(model, "lora"), peft.table(model.lora))
  random, scale = np.random.default_rng(0), layouts.LORA.alpha / layouts.LORA.rank
  for layer, (part, place) in enumerate((("encoder", 1), ("decoder", 0))):
    block = f"tfm_{2 * place + 2}.{part}.layers.{layer}."
    for module, path in (("linear2", "fc2"), ("self_attn.out_proj", "self_attention/out_proj")):
      weight = trained[f"{prefix}{block}{module}.weight"]
      a, b = (
        random.standard_normal(shape).astype(np.float32) for shape in ((2, weight.shape[1]), (weight.shape[0], 2))
      )
      adapter |= {f"{prefix}{block}{module}.lora_{side}.weight": array for side, array in (("A", a), ("B", b))}
      expected[f"projector/sfe/{part}s/{place}/layers/{path}/kernel"][layer] = weight.T + scale * (b @ a).T
  layouts.save(run, adapter, name="adapter_model.bin")
  trained = {name.replace("linear2.weight", adapted): array for name, array in trained.items()}
  layouts.save(run, trained, name="non_lora_trainables.bin")
  stored = assemble.open_model(str(run), maps="cropping")
  for path, array in expected.items():
    np.testing.assert_allclose(stored.tensors.read(path), array, rtol=1e-6, atol=1e-6, err_msg=path)
  with pytest.raises(WeightsError, match="of no tensor in .*both must be of one run"):
    layouts.save(run, {name: x for name, x in trained.items() if "linear2" not in name}, name="non_lora_trainables.bin")
    assemble.open_model(str(run), maps="cropping")
  (run / "non_lora_trainables.bin").unlink()
  with pytest.raises(WeightsError, match="adapts .*tfm_.* of a projector; copy the run's non_lora_trainables.bin"):
    assemble.open_model(str(run))


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
