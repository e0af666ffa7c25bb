"""The conversion CLI, command by command, over tiny checkpoints of every family."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import layouts
import numpy as np
import pytest
import tiny
from PIL import Image
from safetensors.numpy import save_file

import mllm_jax
from mllm_jax import build, convert, parameters, sharding
from mllm_jax.config import MeshConfig, ProjectorConfig
from mllm_jax.weights import folder, side_files
from mllm_jax.weights.io import open_weights

CROPPING = tiny.PROJECTOR
POOLING = ProjectorConfig(maps="pooling", stride=1, dfi_kernel=0, conv_width=8)


def run(*arguments) -> int:
  return convert.main([str(argument) for argument in arguments])


def imported(out: Path) -> dict[str, np.ndarray]:
  """Every tensor of a folder of ours."""
  weights = open_weights(out)
  return {name: np.array(weights.read(name)) for name in weights.names()}


def expected(model, dtype=np.float32, parts=("vision", "decoder", "projector")) -> dict[str, np.ndarray]:
  """The arrays that `layouts` wrote, as far as the model uses them."""
  found = {}
  for part in parts:
    layers = model.vision.layers if part == "vision" else None
    found |= layouts.arrays(model, part, dtype=dtype, layers=layers)
  used = model.vision.layers_used
  return {path: x[:used] if path.startswith("vision/layers/") else x for path, x in found.items()}


def check_same(found: dict, wanted: dict) -> None:
  """Equal to the last bit, types included."""
  assert found.keys() == wanted.keys()
  for path in wanted:
    assert found[path].dtype == wanted[path].dtype and found[path].tobytes() == wanted[path].tobytes(), path


SOURCES = {
  "clip and vicuna": lambda at, m: [
    f"--vision={layouts.vision_folder(at / 'clip', m)}",
    f"--llm={layouts.decoder_folder(at / 'l', m)}",
    f"--projector={layouts.save(at / 'p', layouts.projector_names(m, 'model.'), name='model.bin')}",
  ],
  "vision without prefix, llm as .bin": lambda at, m: [
    f"--vision={layouts.vision_folder(at / 'clip', m, prefix='')}",
    f"--llm={layouts.decoder_folder(at / 'l', m, 'pytorch_model.bin')}",
    f"--projector={layouts.save(at / 'p', layouts.projector_names(m, ''), name='mm_projector.bin')}",
  ],
  "official": lambda at, m: [
    f"--model={layouts.official_folder(at / 'm', m, str(layouts.vision_folder(at / 'clip', m)))}"
  ],
  "official, tower inside": lambda at, m: [
    f"--model={layouts.official_folder(at / 'm', m, str(layouts.vision_folder(at / 'clip', m, seed=9)), inside=True)}"
  ],
}
MODELS = {
  "mlp": layouts.model(),
  "cropping": layouts.model(CROPPING),
  "pooling": layouts.model(POOLING),
  "siglip and qwen2": layouts.model(CROPPING, vision=layouts.SIGLIP, decoder=layouts.QWEN2),
  "tied": layouts.model(decoder=dataclasses.replace(tiny.DECODER, tied_embeddings=True)),
}
CASES = [
  (source, model) for source in SOURCES for model in MODELS if (source, model) != ("official", "siglip and qwen2")
]
CASES = [case for case in CASES if not (case[0].startswith("official") and case[1] == "siglip and qwen2")]


@pytest.mark.parametrize("source, name", CASES)
def test_import_is_exact(tmp_path, source, name):
  model = MODELS[name]
  assert run("import", *SOURCES[source](tmp_path, model), f"--out={tmp_path / 'out'}") == 0
  check_same(imported(tmp_path / "out"), expected(model))
  manifest = folder.read(tmp_path / "out")
  select = model.vision.select_layer
  assert manifest.parts["vision"] == dataclasses.replace(model.vision, select_layer=select)
  assert manifest.parts["decoder"] == model.decoder and manifest.parts["projector"] == model.projector
  assert manifest.sources["decoder"]["path"].startswith(str(tmp_path))
  assert len(manifest.sources["vision"]["fingerprint"]) == 16 and manifest.versions["jax"] == jax.__version__
  assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("layout", layouts.HF_PREFIXES)
@pytest.mark.parametrize("name", ["mlp", "tied", "siglip and qwen2"])
def test_llava_hf_of_every_version(tmp_path, layout, name):
  model = dataclasses.replace(MODELS[name], projector=layouts.MLP)
  source = layouts.llava_hf_folder(tmp_path / "m", model, layout)
  assert run("import", f"--model={source}", f"--out={tmp_path / 'out'}") == 0
  check_same(imported(tmp_path / "out"), expected(model))


@pytest.fixture(scope="module")
def sp_lora(tmp_path_factory):
  """(import arguments, model, folder) of a LLaVA-SP LoRA run as released, in float16."""
  at, model = tmp_path_factory.mktemp("lora"), layouts.model(CROPPING, layouts.LORA)
  vision = layouts.vision_folder(at / "clip", model, dtype=np.float16)
  llm = layouts.decoder_folder(at / "l", model, dtype=np.float16)
  run_folder = layouts.lora_folder(at / "m", model, str(vision), str(llm), dtype=np.float16)
  return [f"--model={run_folder}", f"--vision={vision}", f"--llm={llm}"], model, at


def test_a_released_lora_run(sp_lora, tmp_path):
  arguments, model, _ = sp_lora
  assert run("import", *arguments, f"--out={tmp_path / 'apart'}") == 0
  wanted = expected(model, np.float16, ("vision", "decoder", "projector", "lora"))
  check_same(imported(tmp_path / "apart"), wanted)
  # The tower and the base model are where the checkpoint says, so naming them is not needed.
  assert run("import", arguments[0], f"--out={tmp_path / 'short'}") == 0
  check_same(imported(tmp_path / "short"), wanted)

  assert run("import", *arguments, "--merge", f"--out={tmp_path / 'merged'}") == 0
  merged = imported(tmp_path / "merged")
  assert "lora" not in folder.read(tmp_path / "merged").parts and not any("lora" in path for path in merged)
  path = "decoder/layers/up_proj/"
  a, b, kernel = (wanted[path + name].astype(np.float64) for name in ("lora/a", "lora/b", "kernel"))
  sums = kernel + a @ b * layouts.LORA.alpha / layouts.LORA.rank
  # float32 sums, rounded to float16: half a unit in the last place of numbers below 1
  np.testing.assert_allclose(merged[path + "kernel"].astype(np.float64), sums, atol=2**-11)
  # Merged or apart the logits are the same, up to that rounding.
  assert run("verify", tmp_path / "apart", tmp_path / "merged") == 0


ROUND_TRIPS = {
  "hf": (layouts.model(), []),
  "hf siglip qwen2": (layouts.model(vision=layouts.SIGLIP, decoder=layouts.QWEN2), []),
  "hf tied": (MODELS["tied"], []),
  "official": (layouts.model(CROPPING), []),
  "official pooling": (layouts.model(POOLING), []),
  "official mlp": (layouts.model(), []),
  "official lora": (layouts.model(CROPPING, layouts.LORA), ["--lora=apart"]),
  "peft": (layouts.model(CROPPING, layouts.LORA), []),
}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_export_and_import_again_is_exact(tmp_path, capsys, name, dtype):
  model, options = ROUND_TRIPS[name]
  layout = name.split()[0]
  vision = layouts.vision_folder(tmp_path / "clip", model)
  llm = layouts.decoder_folder(tmp_path / "l", model)
  parts = [f"--vision={vision}", f"--llm={llm}"]
  if model.lora.rank:
    parts.append(f"--model={layouts.lora_folder(tmp_path / 'm', model, str(vision), str(llm))}")
  else:
    parts.append(f"--projector={layouts.save(tmp_path / 'p', layouts.projector_names(model, ''), name='model.bin')}")
  tolerance = "--tolerance=1e-5" if layout == "hf" else "--tolerance=0"
  first, exported, again = tmp_path / "first", tmp_path / "exported", tmp_path / "again"
  assert run("import", *parts, f"--dtype={dtype}", f"--out={first}") == 0
  assert run("export", f"--checkpoint={first}", f"--format={layout}", *options, f"--out={exported}") == 0
  # The official and PEFT folders name their towers; what those hold is not in them.
  others = [] if layout == "hf" else [f"--vision={first}"]
  others += [f"--llm={llm}", f"--dtype={dtype}"] if model.lora.rank else []
  assert run("import", f"--model={exported}", *others, f"--out={again}") == 0
  wanted, found = imported(first), imported(again)
  if layout == "hf":  # which gets rows for <image> and <pad>
    for path, axis in (("decoder/embedding", 0), ("decoder/head", 1)):
      if path in found:
        rows = found[path].shape[axis]
        assert rows % 64 == 0 and rows > wanted[path].shape[axis]
        found[path] = found[path].take(range(wanted[path].shape[axis]), axis)
  check_same(found, wanted)
  capsys.readouterr()
  assert run("verify", first, again, tolerance) == 0
  out = capsys.readouterr().out
  assert "logits: 0.000e+00 absolute" in out or layout == "hf"  # whose wider head adds in another order
  assert ("the tokens of both are compared" in out) == (layout == "hf")


def test_inspect(sp_lora, tmp_path, capsys):
  arguments, model, at = sp_lora
  assert run("inspect", at / "m") == 0
  out = capsys.readouterr().out
  assert "LLaVA-SP with LoRA of rank 2, as the released code leaves it" in out
  assert "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight" in out
  assert "base_model.model.model.conv_2.weight " in out
  assert run("inspect", "--json", at / "l") == 0
  content = json.loads(capsys.readouterr().out)
  row = next(row for row in content["tensors"] if row["name"] == "lm_head.weight")
  assert row["shape"] == [520, 16] and row["dtype"] == "float16" and row["bytes"] == 520 * 16 * 2
  assert content["recognised"] == "llama language model" and content["parts"]["decoder"]["kv_heads"] == 2
  layouts.save(tmp_path / "odd", {"a": np.zeros((2, 3), np.int32)})
  assert run("inspect", tmp_path / "odd") == 0
  assert "nothing known" in (out := capsys.readouterr().out) and "a  2 x 3  int32  24" in out


def test_verify_finds_one_changed_number(sp_lora, tmp_path, capsys):
  arguments, model, at = sp_lora
  run("import", *arguments, f"--out={tmp_path / 'a'}")
  tensors = imported(tmp_path / "a")
  tensors["decoder/norm/scale"][3] += 0.5
  assert run("import", *arguments, f"--out={tmp_path / 'b'}") == 0
  save_file(tensors, tmp_path / "b" / "model.safetensors")
  capsys.readouterr()
  assert run("verify", tmp_path / "a", tmp_path / "b") == 1
  out = capsys.readouterr().out
  assert "decoder/norm/scale   4.999e-01" in out and "logits:" in out and "different" in out
  assert run("verify", tmp_path / "a", tmp_path / "b", "--tolerance=10") == 0
  # Parts alone are compared by the names in their files.
  assert run("verify", at / "l", at / "l") == 0
  assert "not compared" in capsys.readouterr().out


@pytest.mark.parametrize(
  "arguments, words",
  [
    (["import", "--out=x"], ["nothing to import", "--model"]),
    (["import", "--model=/no/such/folder", "--out=x"], ["/no/such/folder does not exist"]),
    (["import", "--vision={at}/l", "--llm={at}/l", "--out=x"], ["llama language model and holds no vision"]),
    (["import", "--model={at}/m/adapter_model.bin", "--out=x"], ["holds no projector"]),
    (["import", "--projector={at}/m/non_lora_trainables.bin", "--out=x"], ["--vision"]),
    (["import", "--llm={at}/l", "--template=nonsense", "--out=x"], ["--template=nonsense", "vicuna_v1"]),
    (["export", "--checkpoint={at}/l", "--format=hf", "--out=x"], ["vision, projector: not there"]),
    (["inspect", "/no/such/file.bin"], ["/no/such/file.bin does not exist"]),
    (["verify", "{at}/l", "{at}/l", "--tolerance=nan"], ["--tolerance=nan must be 0 or more"]),
  ],
)
def test_wrong_input_is_told_and_leaves_nothing(sp_lora, tmp_path, monkeypatch, capsys, arguments, words):
  monkeypatch.chdir(tmp_path)
  assert run(*(argument.format(at=sp_lora[2]) for argument in arguments)) == 2
  error = capsys.readouterr().err
  assert all(word in error for word in words), error
  assert not list(tmp_path.iterdir())


def test_hf_is_for_mlp_projectors_only(sp_lora, tmp_path, capsys):
  arguments, _, _ = sp_lora
  run("import", *arguments, f"--out={tmp_path / 'a'}")
  assert run("export", f"--checkpoint={tmp_path / 'a'}", "--format=hf", f"--out={tmp_path / 'b'}") == 2
  assert "transformers has no class for the projector 'spatial'" in capsys.readouterr().err
  assert sorted(os.listdir(tmp_path)) == ["a"]


def test_an_existing_folder_is_kept_unless_told(sp_lora, tmp_path, capsys):
  arguments, _, at = sp_lora
  out = tmp_path / "out"
  out.mkdir()
  (out / "precious.txt").write_text("mine")
  assert run("import", *arguments, f"--out={out}") == 2
  assert "exists already" in capsys.readouterr().err and (out / "precious.txt").exists()
  assert run("import", *arguments, f"--out={out}", "--overwrite") == 2
  assert "is no folder of weights" in capsys.readouterr().err and (out / "precious.txt").exists()
  assert run("import", *arguments, f"--out={out / 'precious.txt'}", "--overwrite") == 2
  assert run("import", *arguments, f"--out={out / 'precious.txt' / 'in'}") == 2
  assert "cannot be made (Not a directory)" in capsys.readouterr().err and os.listdir(out) == ["precious.txt"]
  (out / "model.safetensors").touch()
  assert run("import", *arguments, f"--out={out}", "--overwrite") == 0
  assert sorted(os.listdir(out)) == ["mllm_jax.json", "model.safetensors", "tokenizer"]


def test_an_export_that_fails_leaves_nothing(sp_lora, tmp_path, monkeypatch, capsys):
  """A disk that fills up after the weights are written; the same command then succeeds."""
  arguments, _, _ = sp_lora
  run("import", *arguments, f"--out={tmp_path / 'ours'}")
  command = ["export", f"--checkpoint={tmp_path / 'ours'}", "--format=official", f"--out={tmp_path / 'out'}"]

  def full(*args, **kwargs):
    raise OSError(28, "No space left on device", "README.md")

  with monkeypatch.context() as patched:
    patched.setattr(side_files, "write_official", full)
    assert run(*command) == 2
  assert "No space left" in capsys.readouterr().err and os.listdir(tmp_path) == ["ours"]
  assert run(*command) == 0
  assert sorted(os.listdir(tmp_path)) == ["ours", "out"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_import_leaves_nothing_that_looks_finished(sp_lora, tmp_path, number):
  """A write that never ends is interrupted; the same command then succeeds."""
  arguments, model, _ = sp_lora
  code = (
    "import sys, time\nfrom mllm_jax import convert\nfrom mllm_jax.weights import folder\n"
    "real = folder.copy_tokenizer\n"
    "def slow(*a):\n  real(*a)\n  print('here', flush=True)\n  time.sleep(60)\n"
    "folder.copy_tokenizer = slow\nsys.exit(convert.main(sys.argv[1:]))"
  )
  command = [sys.executable, "-c", code, "import", *arguments, f"--out={tmp_path / 'out'}"]
  process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=Path(__file__).parents[1])
  assert process.stdout.readline() == b"here\n"
  process.send_signal(number)
  process.wait(30)
  assert not (tmp_path / "out").exists()
  assert (tmp_path / "out.partial").exists() == (number == signal.SIGKILL)
  assert run("import", *arguments, f"--out={tmp_path / 'out'}") == 0
  assert os.listdir(tmp_path) == ["out"]
  check_same(imported(tmp_path / "out"), expected(model, np.float16, ("vision", "decoder", "projector", "lora")))


def test_load_and_ask_in_one_step(tmp_path):
  """From a foreign folder and from ours: the same logits; a batch from conversations; an answer."""
  model = layouts.model()
  source = layouts.llava_hf_folder(tmp_path / "m", model)
  assert run("import", f"--model={source}", f"--out={tmp_path / 'out'}") == 0
  picture = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
  picture = Image.fromarray(picture)
  outputs = []
  for path in (source, tmp_path / "out"):
    loaded, processor = mllm_jax.load(str(path))
    batch = processor(
      ["What is it?", [{"role": "user", "content": "Hm?"}, {"role": "assistant", "content": "Yes."}]], [[picture], []]
    )
    assert batch.tokens.shape[0] == 2 and batch.loss_weights[0].sum() == 0 and batch.loss_weights[1].sum() > 0
    outputs.append(np.asarray(loaded.logits(batch)))
    text = mllm_jax.generate(loaded, processor, "What is it?", [picture], max_new_tokens=4)
    assert isinstance(text, str)
    assert mllm_jax.generate(loaded, processor, ["What is it?"], [[picture]], max_new_tokens=4) == [text]
  np.testing.assert_array_equal(*outputs)
  # The arrays themselves, in float32 and in bfloat16 over eight devices.
  mesh = sharding.make_mesh(MeshConfig(fsdp=4, tensor=2))
  spread, _ = mllm_jax.load(str(tmp_path / "out"), mesh=mesh, dtype="bfloat16")
  flat = parameters.flatten(spread)[1]
  wanted = expected(model)
  assert flat.keys() == wanted.keys()
  for path, array in flat.items():
    assert array.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(array), wanted[path].astype(jnp.bfloat16))
  kernel = flat["decoder/layers/up_proj/kernel"]
  assert kernel.addressable_shards[0].data.shape == (2, 4, 16)


def test_damaged_folders_of_ours(sp_lora, tmp_path, capsys):
  arguments, _, _ = sp_lora
  out = tmp_path / "out"
  run("import", *arguments, f"--out={out}")
  manifest = json.loads((out / "mllm_jax.json").read_text())
  for change, words in (
    (dict(format=2), "format is 2"),
    (dict(parts={"vision": {"colour": 1}}), "is damaged"),
    (dict(parts=manifest["parts"] | {"decoder": manifest["parts"]["decoder"] | {"layers": 3}}), "does not hold what"),
  ):
    (out / "mllm_jax.json").write_text(json.dumps(manifest | change))
    capsys.readouterr()
    with pytest.raises(ValueError, match=words):
      build.open_any(str(out)).config()
    assert run("import", f"--model={out}", f"--out={tmp_path / 'again'}") == 2
    assert words in capsys.readouterr().err
