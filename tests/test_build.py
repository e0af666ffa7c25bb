"""Towers and projectors for a run out of any checkpoint, local or in a bucket."""

import dataclasses
import json
import sys

import fsspec
import layouts
import numpy as np
import pytest
import tiny
from buckets import Bucket

import mllm_jax
from mllm_jax import build, convert, sharding
from mllm_jax.config import DataConfig, LoraConfig, MeshConfig, ModelRecipe, ProjectorConfig
from mllm_jax.data.chat import load_tokenizer
from mllm_jax.weights.errors import WeightsError
from mllm_jax.weights.folder import Manifest, images_of, write
from mllm_jax.weights.tensors import InMemory

MODEL = layouts.model(tiny.PROJECTOR)


@pytest.fixture
def bucket():
  """Registers gs://, empty."""
  fsspec.register_implementation("gs", Bucket, clobber=True)
  system = fsspec.filesystem("gs")
  yield system
  for name in system.ls("/", detail=False):
    system.rm(name, recursive=True)
  del sys.modules["fsspec.registry"]._registry["gs"]


def upload(bucket, folder, to: str) -> str:
  for file in folder.rglob("*"):
    if file.is_file():
      bucket.pipe_file(f"/{to}/{file.relative_to(folder)}", file.read_bytes())
  return f"gs://{to}"


def loaded(vision: str, llm: str, projector: str = "") -> dict:
  """What the trainer loads for a stage that trains the projector."""
  recipe = ModelRecipe(
    vision=vision,
    llm=llm,
    projector_weights=projector,
    projector=dataclasses.replace(tiny.PROJECTOR),
    dtype="float32",
    frozen_dtype="float32",
  )
  config = build.architecture(recipe, LoraConfig())
  rates = {path: 1e-3 if path.startswith("projector/") else 0.0 for path in expected()}
  mesh = sharding.make_mesh(MeshConfig(fsdp=4, tensor=2))
  load_tokenizer(build.tokenizer_folder(llm))
  assert len(build.fingerprints(recipe)["llm"]) == 16
  return build.load_parameters(config, recipe, rates, 0, mesh)


def expected() -> dict:
  found = {}
  for part in ("vision", "decoder", "projector"):
    found |= layouts.arrays(MODEL, part, layers=MODEL.vision.layers if part == "vision" else None)
  used = MODEL.vision.layers_used
  return {path: x[:used] if path.startswith("vision/layers/") else x for path, x in found.items()}


def check(found: dict, parts: tuple[str, ...]) -> None:
  for path, array in expected().items():
    if path.startswith(parts):
      np.testing.assert_array_equal(np.asarray(found[path]), array)


def test_towers_of_a_llava_checkpoint_and_of_ours(tmp_path):
  """model.vision and model.llm may be whole models, of others' or our own making."""
  hf = layouts.llava_hf_folder(tmp_path / "hf", layouts.model())
  check(loaded(str(hf), str(hf)), ("vision/", "decoder/"))
  clip = layouts.vision_folder(tmp_path / "clip", MODEL)
  official = layouts.official_folder(tmp_path / "official", MODEL, str(clip))
  check(loaded(str(clip), str(official), str(official)), ("vision/", "decoder/", "projector/"))
  ours = tmp_path / "ours"
  assert convert.main(["import", f"--model={official}", f"--out={ours}"]) == 0
  check(loaded(str(ours), str(ours), str(ours)), ("vision/", "decoder/", "projector/"))
  with pytest.raises(WeightsError, match="holds no vision; it has decoder, projector"):
    loaded(str(official), str(official))


def test_everything_from_a_bucket(tmp_path, bucket):
  clip = upload(bucket, layouts.vision_folder(tmp_path / "clip", MODEL), "weights/clip")
  llm = upload(bucket, layouts.decoder_folder(tmp_path / "vicuna", MODEL, "pytorch_model.bin"), "weights/vicuna")
  projector = layouts.save(tmp_path / "p", layouts.projector_names(MODEL, ""), name="model.bin")
  projector = upload(bucket, projector, "weights/projector") + "/model.bin"
  check(loaded(clip, llm, projector), ("vision/", "decoder/", "projector/"))
  # Imported from the bucket, put there again, and loaded in one step.
  ours = tmp_path / "ours"
  command = ["import", f"--vision={clip}", f"--llm={llm}", f"--projector={projector}", f"--out={ours}"]
  assert convert.main(command) == 0
  remote = upload(bucket, ours, "models/ours")
  assert convert.main(["verify", str(ours), remote]) == 0
  assert convert.main(["inspect", remote]) == 0
  model, processor = mllm_jax.load(remote)
  local, _ = mllm_jax.load(str(ours))
  batch = processor(["Hm?"])
  np.testing.assert_array_equal(model.logits(batch), local.logits(batch))


def test_writing_to_a_bucket_is_refused(tmp_path, bucket, capsys):
  clip = layouts.vision_folder(tmp_path / "clip", MODEL)
  assert convert.main(["import", f"--vision={clip}", "--out=gs://models/clip"]) == 2
  assert "write to a local folder" in capsys.readouterr().err


def test_a_model_with_an_adapter_is_no_language_model_for_a_run(tmp_path):
  model = layouts.model(tiny.PROJECTOR, layouts.LORA)
  clip = layouts.vision_folder(tmp_path / "clip", model)
  llm = layouts.decoder_folder(tmp_path / "vicuna", model)
  run = layouts.lora_folder(tmp_path / "lora", model, str(clip), str(llm))
  assert convert.main(["import", f"--model={run}", f"--llm={llm}", f"--out={tmp_path / 'ours'}"]) == 0
  with pytest.raises(WeightsError, match="--merge"):
    loaded(str(clip), str(tmp_path / "ours"))


def test_a_folder_keeps_how_images_became_crops(tmp_path):
  model = layouts.model(ProjectorConfig(kind="uhd_v1", pyramid="none", levels=(0,), query_grid=2, head_width=8))
  parts = {name: getattr(model, name) for name in ("vision", "decoder", "projector")}
  arrays = {path: value for name in parts for path, value in layouts.arrays(model, name).items()}
  images = images_of(DataConfig(image_aspect="slices", max_slices=4))
  write(tmp_path / "m", Manifest(parts, "vicuna_v1", images=images), InMemory(arrays), str(layouts.tokenizer(tmp_path)))
  crops = lambda **options: mllm_jax.load(str(tmp_path / "m"), **options)[1].aspect.crops_of(500, 500)
  assert crops() == 5 and crops(max_slices=9) == 10

  manifest = tmp_path / "m" / "mllm_jax.json"
  whole = json.loads(manifest.read_text())
  manifest.write_text(json.dumps(whole | {"images": {"max_slices": "4"}}))
  with pytest.raises(WeightsError, match="images.max_slices"):
    mllm_jax.load(str(tmp_path / "m"))
  del whole["images"]  # as older versions wrote it
  manifest.write_text(json.dumps(whole))
  assert crops() == 7
