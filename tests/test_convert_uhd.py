"""LLaVA-UHD v2 in and out by the command line: as released, whole and in stages, there and back to the last bit."""

import dataclasses
import json
import re

import layouts
import ml_dtypes
import numpy as np
import pytest
import tiny

from mllm_jax import convert
from mllm_jax.config import ProjectorConfig
from mllm_jax.weights import assemble, clip, folder, hiwin, mapping, peft
from mllm_jax.weights.io import open_weights

PROJECTOR = ProjectorConfig(
  kind="hiwin", levels=(0, 2), query_grid=8, head_width=128, organisation="slices", separators="released"
)
# One head as released is 128 wide.
WIDE = dict(width=128, heads=4, kv_heads=2, head_width=32)
VICUNA = layouts.model(PROJECTOR, decoder=dataclasses.replace(tiny.DECODER, **WIDE))
QWEN2 = layouts.model(
  dataclasses.replace(PROJECTOR, levels=(0, 1, 2)), decoder=dataclasses.replace(layouts.QWEN2, **WIDE)
)
V1 = dataclasses.replace(PROJECTOR, kind="uhd_v1", pyramid="none", levels=(0,))
MODELS = {"vicuna": VICUNA, "qwen2": QWEN2, "v1": dataclasses.replace(VICUNA, projector=V1)}
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


WIDER = layouts.model(decoder=dataclasses.replace(layouts.QWEN2, **WIDE | {"width": 256, "head_width": 64}))


def run(*arguments) -> int:
  return convert.main([str(argument) for argument in arguments])


def tensors_of(path) -> dict[str, np.ndarray]:
  weights = open_weights(path)
  return {name: np.array(weights.read(name)) for name in weights.names()}


def check_same(found: dict, wanted: dict) -> None:
  assert found.keys() == wanted.keys()
  for path in wanted:
    assert found[path].dtype == wanted[path].dtype and found[path].tobytes() == wanted[path].tobytes(), path


def expected(model, dtype=np.float32) -> dict[str, np.ndarray]:
  found = {}
  for part in ("vision", "decoder", "projector"):
    found |= layouts.arrays(model, part, dtype=dtype, layers=model.vision.layers if part == "vision" else None)
  used = model.vision.layers_used
  return {path: x[:used] if path.startswith("vision/layers/") else x for path, x in found.items()}


def projector_names(model, prefix: str, dtype=np.float32) -> dict[str, np.ndarray]:
  """The projector as the released class saves it."""
  tensors = layouts.projector_names(model, prefix, dtype=dtype)
  extra = hiwin.placeholders(model.projector, model.vision.width, model.decoder.width)
  tensors |= {prefix + name: array.astype(dtype) for name, array in extra.items()}
  copy = "mm_projector.upsampler.model.0.vision_tower.vision_model.pre_layrnorm.weight"
  return tensors if model.projector.kind == "uhd_v1" else tensors | {prefix + copy: np.zeros(16, dtype)}


def sizes(model) -> dict[str, int]:
  """What config.json says of the decoder's width."""
  decoder = model.decoder
  return {"hidden_size": decoder.width, "num_attention_heads": decoder.heads, "head_dim": decoder.head_width}


def decoder_folder(at, model, **options):
  family, content = layouts.decoder(model)
  tensors = mapping.export(layouts.arrays(model, "decoder", **options), family.table(model.decoder))
  return layouts.tokenizer(layouts.save(at, tensors, content | sizes(model)))


def released_folder(at, model, vision_path, mask: int, dtype=np.float32, **changes):
  """A whole model as the released code saves it: the tower was trained, so it is inside."""
  family, content = layouts.decoder(model)
  tensors = mapping.export(layouts.arrays(model, "decoder", dtype=dtype), family.table(model.decoder))
  tensors |= projector_names(model, "model.", dtype)
  whole = dataclasses.replace(model.vision, select_layer=-1)
  arrays = layouts.arrays(model, "vision", layers=whole.layers, dtype=dtype)
  tensors |= mapping.export(arrays, clip.table(whole, "model.vision_tower.vision_tower.vision_model."))
  fields = {
    "model_type": "llava_qwen" if model.decoder.attention_bias else "llava_llama",
    "mm_projector_type": hiwin.types(model.projector)[model.projector.query_grid],
    "feature_scale_mask": mask,
    "mm_vision_tower": str(vision_path),
    "image_aspect_ratio": "square",
  }
  fields = content | sizes(model) | layouts.OFFICIAL_FIELDS | fields | changes
  return layouts.tokenizer(layouts.save(at, tensors, {name: x for name, x in fields.items() if x is not None}))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name, mask", [("vicuna", 5), ("qwen2", 7), ("v1", None)])
def test_a_released_model_in_and_out_and_in_again(tmp_path, capsys, name, mask, dtype):
  model, kind = MODELS[name], DTYPES[dtype]
  vision = layouts.vision_folder(tmp_path / "clip-tower", model, seed=9)
  source = released_folder(tmp_path / "m", model, vision, mask, kind)
  first, exported, again = tmp_path / "first", tmp_path / "exported", tmp_path / "again"
  assert run("import", f"--model={source}", f"--out={first}") == 0
  said = capsys.readouterr().err
  assert f"LLaVA-UHD {'v1' if name == 'v1' else 'v2'} as released" in said
  assert ("note: left out: kv_proj.weight, query" in said) == (name != "v1")
  check_same(tensors_of(first), expected(model, kind))
  manifest = folder.read(first)
  assert manifest.parts["projector"] == model.projector
  assert manifest.template == ("chatml_released" if name == "qwen2" else "vicuna_v1")
  options = ["--format=official", f"--vision_tower={vision}"]
  assert run("export", f"--checkpoint={first}", *options, f"--out={exported}") == 0
  # All that the released class has, and nothing else but the towers.
  wanted, found = tensors_of(source), tensors_of(exported)
  released = lambda tensors: {key: x.shape for key, x in tensors.items() if "upsampler.model.0" not in key}
  unused = re.compile(r".*vision_tower.*(encoder\.layers\.2\.|post_layernorm)")
  assert released(found) == {key: x for key, x in released(wanted).items() if not unused.match(key)}
  assert all(x.dtype == kind for x in found.values())
  content = json.loads((exported / "config.json").read_text())
  kind = "uhd_v1_query64" if name == "v1" else "adapt_spatial_resampler_v2_64"
  assert content.get("feature_scale_mask") == mask and content["mm_projector_type"] == kind
  assert ("## Placeholders" in (exported / "README.md").read_text()) == (name != "v1")
  assert content["model_type"] == ("llava_qwen" if name == "qwen2" else "llava_llama")
  assert run("import", f"--model={exported}", f"--out={again}") == 0
  check_same(tensors_of(again), tensors_of(first))
  assert folder.read(again).parts == manifest.parts


@pytest.mark.long
def test_logits_are_the_same_after_a_round_trip(tmp_path, capsys):
  vision = layouts.vision_folder(tmp_path / "clip-tower", VICUNA)
  source = released_folder(tmp_path / "m", VICUNA, vision, 5)
  assert run("import", f"--model={source}", f"--out={tmp_path / 'first'}") == 0
  assert run("verify", source, tmp_path / "first") == 0
  assert "logits: 0.000e+00 absolute" in capsys.readouterr().out


@pytest.fixture(scope="module")
def stage1(tmp_path_factory):
  """(import arguments without the projector, the projector's file) of a first stage."""
  at = tmp_path_factory.mktemp("stage1")
  names = projector_names(QWEN2, "model.")
  file = layouts.save(at / "p", names, name="mm_projector.bin") / "mm_projector.bin"
  vision, llm = layouts.vision_folder(at / "clip-tower", QWEN2), decoder_folder(at / "llm", QWEN2)
  return [f"--vision={vision}", f"--llm={llm}"], file


@pytest.mark.parametrize("options, levels", [([], (0, 1, 2)), (["--levels=0,2"], (0, 2))])
def test_a_first_stage(stage1, tmp_path, options, levels):
  parts, file = stage1
  assert run("import", *parts, f"--projector={file}", *options, f"--out={tmp_path / 'out'}") == 0
  assert folder.read(tmp_path / "out").parts["projector"] == dataclasses.replace(QWEN2.projector, levels=levels)
  found, wanted = tensors_of(tmp_path / "out"), expected(QWEN2)
  if levels == (0, 1, 2):
    check_same(found, wanted)
  else:
    path = "projector/resampler/attention/level_"
    np.testing.assert_array_equal(found[path + "embeddings"], wanted[path + "embeddings"][[0, 2]])
    np.testing.assert_array_equal(found[path + "projectors/1/kernel"], wanted[path + "projectors/2/kernel"])


def test_what_a_recipe_says_of_the_levels_counts(stage1):
  """A run names its projector's configuration itself: the file is read by that."""
  _, file = stage1
  part = assemble.recognise(str(file)).parts["projector"]
  configs = {"vision": QWEN2.vision, "decoder": QWEN2.decoder, "projector": PROJECTOR}
  tensors = assemble.part_tensors("projector", part, configs)
  assert tensors.shape("projector/resampler/attention/level_embeddings") == (2, 128)


@pytest.mark.parametrize("options", [["--format=official", "--lora=apart"], ["--format=peft"]])
def test_an_adapter_apart(stage1, tmp_path, options):
  parts, file = stage1
  model = dataclasses.replace(QWEN2, lora=layouts.LORA)
  adapter = mapping.export(layouts.arrays(model, "lora"), peft.table(model.lora))
  at = layouts.save(tmp_path / "adapter", adapter, name="adapter_model.safetensors")
  (at / "adapter_config.json").write_text(json.dumps(peft.config_file(model.lora, "base")))
  first, out, again = tmp_path / "first", tmp_path / "exported", tmp_path / "again"
  assert run("import", *parts, f"--projector={file}", f"--adapter={at}", f"--out={first}") == 0
  assert run("export", f"--checkpoint={first}", *options, f"--out={out}") == 0
  names = open_weights(out / "non_lora_trainables.bin").names()
  assert {name.removeprefix("base_model.model.") for name in names} == {
    name for name in projector_names(QWEN2, "model.") if "upsampler.model.0" not in name
  }
  assert run("import", f"--model={out}", *parts, f"--out={again}") == 0
  check_same(tensors_of(again), tensors_of(first))
  assert folder.read(again).parts == folder.read(first).parts


def test_the_readme_says_what_the_code_must_say_and_what_are_placeholders(tmp_path):
  ours, vision = tmp_path / "ours", layouts.vision_folder(tmp_path / "clip-tower", VICUNA)
  changes = {"slice_organisation": "spatial", "slice_separators": "text"}
  source = released_folder(tmp_path / "m", VICUNA, vision, 5, **changes)
  assert run("import", f"--model={source}", f"--out={ours}") == 0
  assert folder.read(ours).parts["projector"].organisation == "spatial"
  out = tmp_path / "exported"
  assert run("export", f"--checkpoint={ours}", "--format=official", f"--vision_tower={vision}", f"--out={out}") == 0
  readme = (out / "README.md").read_text()
  for words in (
    "thunlp/LLaVA-UHD",
    "`UsePermute = True`",
    "the tokens after slices are",
    "`query`, `kv_proj.weight`, `feature_2x_embedding`, `features_2x_projector.weight`",
    "`upsampler.model.1.norm.weight`",
  ):
    assert words in readme, readme
  assert run("import", f"--model={out}", f"--out={tmp_path / 'again'}") == 0
  assert folder.read(tmp_path / "again").parts == folder.read(ours).parts


def test_what_cannot_be_is_refused(stage1, tmp_path, capsys):
  parts, file = stage1
  vision = layouts.vision_folder(tmp_path / "clip-tower", VICUNA)
  source = released_folder(tmp_path / "m", VICUNA, vision, 5)
  assert run("import", f"--model={source}", f"--out={tmp_path / 'ours'}") == 0
  bad_mask = released_folder(tmp_path / "mask", VICUNA, vision, 9)
  bad_type = released_folder(tmp_path / "type", VICUNA, vision, 5, mm_projector_type="mlp2x_gelu")
  plain = layouts.vision_folder(tmp_path / "tower", VICUNA)
  export, out = ("export", f"--checkpoint={tmp_path / 'ours'}"), f"--out={tmp_path / 'out'}"
  for arguments, words in (
    ([*export, "--format=hf"], "transformers has no class for the projector 'hiwin'"),
    ([*export, "--format=official"], "say with --vision_tower"),
    ([*export, "--format=official", "--vision_tower=google/siglip-so400m"], "give its folder a name with 'clip'"),
    (["import", f"--model={bad_mask}"], "its VDIM has 2 levels above the tower's, and levels (0, 3) need 3"),
    (["import", f"--model={bad_type}"], "mm_projector_type='mlp2x_gelu'"),
    (["import", *parts, f"--projector={file}", "--levels=0,3"], "its VDIM has 2 levels above"),
    (["import", *parts, f"--projector={file}", "--levels=2,0"], "levels (2, 0) must be some of 0 to 3, in order"),
    (["import", f"--model={tmp_path / 'ours'}", "--levels=0,2"], "are for a projector of LLaVA-UHD v2 as released"),
    (["import", f"--vision={plain}", "--levels=0,2"], "no projector is named"),
    (["import", f"--vision={plain}", f"--llm={decoder_folder(tmp_path / 'wide', WIDER)}",
      f"--projector={file}"], "to a decoder of width 128, and here the tower's are 16 wide and the decoder is 256"),
  ):  # fmt: skip
    capsys.readouterr()
    assert run(*arguments, out) == 2, arguments
    assert words in (error := capsys.readouterr().err), error
    assert not (tmp_path / "out").exists()
