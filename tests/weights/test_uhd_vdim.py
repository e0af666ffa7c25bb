"""VDIM alone, out of everything that may hold one, and Lightning's checkpoints."""

import json
import pickle
import re

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from mllm_jax import convert
from mllm_jax.config import DecoderConfig, ProjectorConfig, VisionConfig
from mllm_jax.weights import assemble, hiwin, mapping, vdim
from mllm_jax.weights.folder import Manifest, write
from mllm_jax.weights.io import WeightsError, open_weights
from mllm_jax.weights.tensors import InMemory

torch = pytest.importorskip("torch")
VISION, DECODER = VisionConfig(width=16, layers=2, image_size=56), DecoderConfig(width=128)


def config(levels=(0, 2)) -> ProjectorConfig:
  return ProjectorConfig(kind="hiwin", levels=levels, query_grid=8)


def projector_arrays(levels=(0, 2), dtype=np.float32) -> dict[str, np.ndarray]:
  parts = {"vision": VISION, "decoder": DECODER, "projector": config(levels)}
  draw = np.random.default_rng(len(levels))
  shapes = assemble.part_shapes("projector", parts)
  return {path: np.asarray(draw.normal(size=shape), dtype) for path, shape in shapes.items()}


def pyramid(arrays) -> dict[str, np.ndarray]:
  return {path: x for path, x in arrays.items() if path.startswith("projector/pyramid/")}


def lightning(levels=(0, 2)) -> dict[str, np.ndarray]:
  """The weights that the released training saves: those of VDIM, its down-samplers, its scale nets, two towers."""
  table = vdim.table(max(levels))
  found = mapping.export(pyramid(projector_arrays(levels)), table)
  others = ("model.0.vision_tower.vision_model.pre_layrnorm.weight", "validation_model.1.norm.weight", "downsampler.w")
  others += ("downsampler_2x.attention_net.1.weight", "scale_net.net.weight", "scale_net_2x.net.bias")
  if max(levels) == 3:
    found |= {"upsampler.fixup_proj.1.weight": np.zeros((16, 16, 1, 1), np.float32)}
  return found | {name: np.zeros((3,), np.float32) for name in others}


def save_lightning(path, tensors, **entries) -> None:
  """As Lightning does: the weights among counters, callbacks and the optimizer's state."""
  state = {name: torch.from_numpy(np.array(x)) for name, x in tensors.items()}
  moment = torch.ones(3)
  torch.save(
    {
      "epoch": 0,
      "global_step": 2000,
      "pytorch-lightning_version": "2.4.0",
      "state_dict": state,
      "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 1}}}},
      "callbacks": {
        "ModelCheckpoint{'monitor': None}": {"best_model_score": None, "kth_value": moment, "dirpath": "x"}
      },
      "optimizer_states": [{"state": {0: {"step": moment[0], "exp_avg": moment}}, "param_groups": [{"lr": 1e-3}]}],
      "lr_schedulers": [],
      "hparams_name": "kwargs",
      "hyper_parameters": {"lr": 1e-3, "n_jitters": 2, "norm": True, "betas": (0.9, 0.999)},
    }
    | entries,
    path,
  )


def released(tensors_of, prefix: str) -> dict[str, np.ndarray]:
  """A projector in the released names."""
  names = mapping.export(tensors_of, hiwin.table(config()))
  return {prefix + name.removeprefix("model."): x for name, x in names.items()}


def holders(folder) -> dict[str, object]:
  """Paths that hold the VDIM of `projector_arrays`, by what they are."""
  arrays = projector_arrays()
  save_lightning(folder / "vdim.ckpt", lightning())
  torch.save({name: torch.from_numpy(np.array(x)) for name, x in lightning().items()}, folder / "flat.ckpt")
  wrapped = {re.sub(r"^upsampler\.", "upsampler.upsampler.", name): x for name, x in lightning().items()}
  save_lightning(folder / "wrapped.ckpt", wrapped)
  for name, prefix in (("stage 1", "model."), ("lora", "base_model.model.model.")):
    (folder / name).mkdir()
    tensors = {key: torch.from_numpy(np.array(x)) for key, x in released(arrays, prefix).items()}
    torch.save(tensors, folder / name / "mm_projector.bin")
  model = folder / "whole"
  model.mkdir()
  save_file(released(arrays, "model.") | {"lm_head.weight": np.zeros((3, 4), np.float32)}, model / "model.safetensors")
  content = {"model_type": "llava_llama", "mm_projector_type": "adapt_spatial_resampler_v2_64", "feature_scale_mask": 5}
  (model / "config.json").write_text(json.dumps(content))
  parts = {"vision": VISION, "projector": config()}
  for name in ("ours", "run/model"):
    write(folder / name, Manifest(parts, "plain"), InMemory(arrays), "")
  (folder / "run" / "config.json").write_text(json.dumps({"pretrain": {}, "finetune": {}}))
  save_file(pyramid(arrays), folder / "pyramid.safetensors")
  names = [
    "vdim.ckpt",
    "flat.ckpt",
    "wrapped.ckpt",
    "stage 1",
    "stage 1/mm_projector.bin",
    "lora",
    "whole",
    "ours",
    "run",
  ]
  return {name: folder / name for name in [*names, "pyramid.safetensors"]}


def test_vdim_out_of_everything_that_holds_one(tmp_path):
  wanted = pyramid(projector_arrays())
  for name, path in holders(tmp_path).items():
    tensors = vdim.open_vdim(path, config(), VISION.width)
    assert set(tensors.names()) == wanted.keys(), name
    for key, array in wanted.items():
      assert tensors.shape(key) == array.shape and tensors.read(key).tobytes() == array.tobytes(), (name, key)


@pytest.mark.parametrize("levels", [(0, 1), (0, 1, 2, 3)])
def test_stacks_of_other_heights(tmp_path, levels):
  save_lightning(tmp_path / "vdim.ckpt", lightning(levels))
  tensors, wanted = vdim.open_vdim(tmp_path / "vdim.ckpt", config(levels)), pyramid(projector_arrays(levels))
  assert set(tensors.names()) == wanted.keys()
  for key, array in wanted.items():
    np.testing.assert_array_equal(tensors.read(key), array)


def test_types_are_kept(tmp_path):
  arrays = pyramid(projector_arrays(dtype=ml_dtypes.bfloat16))
  save_file(mapping.export(arrays, vdim.table(2)), tmp_path / "x.safetensors")
  tensors = vdim.open_vdim(tmp_path / "x.safetensors", config())
  assert all(tensors.dtype(path) == ml_dtypes.bfloat16 for path in tensors.names())


def refused(path, words, projector=None, width=0):
  with pytest.raises(WeightsError, match=words):
    vdim.open_vdim(path, projector or config(), width)


def test_what_does_not_fit_is_told(tmp_path):
  paths = holders(tmp_path)
  for name in ("vdim.ckpt", "whole", "ours", "run"):
    refused(
      paths[name], r"a VDIM of 2 levels above the tower's, and projector.levels=\(0, 3\) need one of 3", config((0, 3))
    )
    refused(paths[name], "width 16, and the tower's have 1024", width=1024)
  refused(paths["ours"], "projector.pyramid='deconv' has none", ProjectorConfig(kind="hiwin", pyramid="deconv"))
  tensors = lightning()
  del tensors["upsampler.up2.sigma_spatial"]
  tensors["upsampler.up1.extra"] = np.zeros(2, np.float32)
  tensors["upsampler.up1.range_proj.0.weight"] = np.zeros((32, 4, 1, 1), np.float32)
  save_lightning(tmp_path / "damaged.ckpt", tensors)
  with pytest.raises(WeightsError) as raised:
    vdim.open_vdim(tmp_path / "damaged.ckpt", config())
  for words in (
    "missing: upsampler.up2.sigma_spatial, for projector/pyramid/stages/1/sigma_spatial ()",
    "unexpected: upsampler.up1.extra (2,)",
    "(32, 4, 1, 1) in the file, and projector/pyramid/stages/0/range_proj/0/kernel needs (3, 32)",
  ):
    assert words in str(raised.value), raised.value
  save_file({"lm_head.weight": np.zeros(3, np.float32)}, tmp_path / "other.safetensors")
  refused(tmp_path / "other.safetensors", "holds no VDIM; its 1 tensors begin with lm_head.weight")
  (tmp_path / "run" / "model" / "mllm_jax.json").unlink()
  refused(paths["run"], "a training run without its finished model")
  refused(tmp_path / "nowhere", "does not exist")


class Evil:
  def __reduce__(self):
    return print, ("run",)


def test_lightning_checkpoints_run_nothing(tmp_path, capsys):
  save_lightning(tmp_path / "evil.ckpt", lightning(), hyper_parameters=Evil())
  with pytest.raises(WeightsError, match=r"__builtin__.print.*save it again"):
    open_weights(tmp_path / "evil.ckpt")
  assert "run" not in capsys.readouterr().out.split()
  save_lightning(tmp_path / "nested.ckpt", {}, state_dict={"a": {"b": torch.ones(2)}})
  with pytest.raises(WeightsError, match="the entry 'a' is a dict, not a tensor"):
    open_weights(tmp_path / "nested.ckpt")
  (tmp_path / "list.ckpt").write_bytes(pickle.dumps([1], 2))
  with pytest.raises(WeightsError, match="list.ckpt is a pickle, but not one of torch.save"):
    open_weights(tmp_path / "list.ckpt")


def test_vdim_alone_is_recognised_and_is_no_model(tmp_path, capsys):
  save_lightning(tmp_path / "vdim.ckpt", lightning())
  assert convert.main(["inspect", str(tmp_path / "vdim.ckpt")]) == 0
  out = capsys.readouterr().out
  assert "VDIM of LLaVA-UHD v2" in out and "upsampler.up2.fixup_proj.3.weight" in out
  assert convert.main(["import", f"--model={tmp_path / 'vdim.ckpt'}", f"--out={tmp_path / 'out'}"]) == 2
  assert "is a VDIM of LLaVA-UHD v2, which is no model" in capsys.readouterr().err
