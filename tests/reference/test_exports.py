"""Exported folders in transformers itself, versions 4 and 5: the same ids, pixels, logits and answers as ours.

Version 4 lies in a folder of its own, which MLLM_JAX_TRANSFORMERS4 names; where it names none, one is made with pip.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE, STDOUT

import ask_transformers
import jax
import numpy as np
import pytest
from export_cases import CONVERSATIONS, MODELS, TEMPLATES, pictures, write_tokenizers
from flax import nnx

import mllm_jax
from mllm_jax import convert, parameters
from mllm_jax.data import chat, images
from mllm_jax.data.aspects import Square
from mllm_jax.data.patches import unpatchify
from mllm_jax.data.processor import Processor, collate
from mllm_jax.inference.engine import Engine
from mllm_jax.inference.requests import Request
from mllm_jax.models import projectors
from mllm_jax.models.mllm import Mllm
from mllm_jax.weights import folder
from mllm_jax.weights.tensors import InMemory

pytestmark = pytest.mark.torch
# Without their dependencies, which version 5 has brought along.
TRANSFORMERS4 = ("transformers==4.57.6", "huggingface_hub>=0.34,<1", "tokenizers>=0.22,<0.23")
PLACES = 384
EVERY = pytest.mark.parametrize("version", ["4", "5"])
KINDS = pytest.mark.parametrize("kind", list(MODELS))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
  return tmp_path_factory.mktemp("exports")


@pytest.fixture(scope="module")
def tokenizer_folders(workspace):
  return write_tokenizers(workspace / "tokenizers")


@pytest.fixture(scope="module")
def exported(workspace, tokenizer_folders):
  """{kind: (folder, our model)}: whole folders, with weights."""
  made = {}
  for kind, config in MODELS.items():
    made[kind] = workspace / "exported" / kind, random_model(config)
    parts = {"vision": config.vision, "decoder": config.decoder, "projector": config.projector}
    arrays = {path: np.asarray(value) for path, value in parameters.flatten(made[kind][1])[1].items()}
    stored = workspace / "stored" / kind
    folder.write(stored, folder.Manifest(parts, TEMPLATES[kind]), InMemory(arrays), str(tokenizer_folders[kind]))
    assert convert.main(["export", f"--checkpoint={stored}", "--format=hf", f"--out={made[kind][0]}"]) == 0
  return made


@pytest.fixture(scope="module")
def ours(exported, tokenizer_folders):
  """{kind: [(row, logits, answers by BEAMS, end-of-sequence id) of each question]}."""
  files, results = pictures(), {}
  forward = jax.jit(lambda model, batch: model.logits(batch))
  for kind, (path, model) in exported.items():
    config, tokenizer = MODELS[kind], chat.load_tokenizer(str(tokenizer_folders[kind]))
    fit = Square(config.vision, projectors.tokens_per_crop(config))
    processor = Processor(tokenizer, fit, TEMPLATES[kind], PLACES, 2)
    # The rows for <image> and <pad>, a tenth of so small a vocabulary, take part in the softmax and so in how beams
    # compare: answers are those of the exported model, read again.
    asked, _ = mllm_jax.load(str(path), dtype="float32", template=TEMPLATES[kind])
    engine, results[kind] = Engine(asked, processor, rows=max(ask_transformers.BEAMS)), []
    for turns, names, system in CONVERSATIONS.values():
      pictures_of_row = [files[name] for name in names]
      row = processor.prompt(turns, pictures_of_row, system=system)
      # of one length, so that there is one compilation for all
      batch = collate([processor.prompt(turns, pictures_of_row, PLACES, system)])
      requests = [Request(row, ask_transformers.NEW_TOKENS, beams=beams) for beams in ask_transformers.BEAMS]
      answer = [list(engine.answer([request])[0].ids) for request in requests]
      logits = np.asarray(forward(model, batch))[0, : len(row.tokens)]
      results[kind].append((row, logits, answer, tokenizer.eos_id))
  return results


@pytest.fixture(scope="module")
def theirs(workspace, exported):
  """{version: what `ask_transformers` wrote}; version 5 is asked by the same script as version 4."""
  for name, picture in pictures().items():
    picture.save(workspace / f"{name}.png")
  questions = [
    {"messages": messages(turns, system), "pictures": [str(workspace / f"{name}.png") for name in names]}
    for turns, names, system in CONVERSATIONS.values()
  ]
  (workspace / "questions.json").write_text(json.dumps(questions))
  folders = [str(path) for path, _ in exported.values()]
  paths = str(workspace / "questions.json"), str(workspace / "answers5.npz")
  command = [sys.executable, ask_transformers.__file__, paths[0], str(workspace / "answers4.npz"), *folders]
  environment = os.environ | {"PYTHONPATH": str(transformers4(workspace)), "OMP_NUM_THREADS": "1"}
  with subprocess.Popen(command, env=environment, stdout=PIPE, stderr=STDOUT, text=True) as process:
    ask_transformers.main(*paths, *folders)  # at the same time
    output, _ = process.communicate()
  assert process.returncode == 0, output
  return {version: np.load(workspace / f"answers{version}.npz") for version in ("4", "5")}


def transformers4(workspace: Path) -> Path:
  """A folder with version 4, for PYTHONPATH."""
  if given := os.environ.get("MLLM_JAX_TRANSFORMERS4"):
    assert (Path(given) / "transformers").is_dir(), f"MLLM_JAX_TRANSFORMERS4={given} holds no transformers"
    return Path(given)
  made = workspace / "transformers4"
  command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(made), *TRANSFORMERS4]
  subprocess.run(command, check=True)
  return made


def random_model(config) -> Mllm:
  """With biases and norms that differ from what they are before training, so that a forgotten one shows."""
  draw = np.random.default_rng(0)
  graphdef, flat = parameters.flatten(Mllm(config, rngs=nnx.Rngs(0)))
  arrays = {
    path: (draw.normal(size=x.shape) * 0.3 + path.endswith("scale")).astype(np.float32) for path, x in flat.items()
  }
  return parameters.unflatten(graphdef, arrays)


def messages(turns, system) -> list[dict]:
  """A conversation as transformers wants it."""
  result = [] if system is None else [{"role": "system", "content": [{"type": "text", "text": system}]}]
  for turn in turns:
    n_images = turn.text.count("<image>")
    text = turn.text.replace("<image>", "").strip() if n_images else turn.text
    content = [{"type": "image"}] * n_images + [{"type": "text", "text": text}] * bool(text)
    result.append({"role": "user" if turn.role == "human" else "assistant", "content": content})
  return result


@EVERY
def test_the_version_is_the_one_meant(theirs, version):
  assert str(theirs[version]["version"]).startswith(f"{version}.")


@EVERY
@KINDS
def test_no_weight_is_missing_left_over_or_of_another_shape(theirs, version, kind):
  assert theirs[version][f"{kind}/problems"].tolist() == []


@EVERY
@KINDS
def test_prompts_have_our_ids(theirs, ours, exported, version, kind):
  image_id = json.loads((exported[kind][0] / "config.json").read_text())["image_token_id"]
  for number, (name, (row, *_)) in enumerate(zip(CONVERSATIONS, ours[kind])):
    expected = np.where(row.visual_index >= 0, image_id, row.tokens).tolist()
    assert theirs[version][f"{kind}/{number}/ids"].tolist() == expected, name
    assert theirs[version][f"{kind}/{number}/ids_in_one_call"].tolist() == expected, name


@EVERY
@KINDS
def test_pictures_have_our_pixel_values(theirs, ours, version, kind):
  vision = MODELS[kind].vision
  for number, (_, names, _) in enumerate(CONVERSATIONS.values()):
    if names:
      row = ours[kind][number][0]
      pictures = [unpatchify(patches, grid, vision.patch_size) for patches, grid in zip(row.patches, row.grids)]
      pixels = images.normalise(np.stack(pictures[: len(names)]), vision.mean, vision.std)
      # a product with 1/255 against a quotient, in float32
      height, width = pixels.shape[1:3]  # whole patches; what fills none belongs to no feature
      found = theirs[version][f"{kind}/{number}/pixels"][:, :height, :width]
      np.testing.assert_allclose(found, pixels, atol=1e-6)


@EVERY
@KINDS
def test_logits_and_answers_are_ours(theirs, ours, version, kind):
  for number, (name, (_, logits, answers, eos_id)) in enumerate(zip(CONVERSATIONS, ours[kind])):
    get = lambda key: theirs[version][f"{kind}/{number}/{key}"]
    # float32 sums in another order
    np.testing.assert_allclose(get("logits")[:, : logits.shape[1]], logits, atol=1e-4 * np.abs(logits).max())
    assert get("logits").argmax(1).max() < logits.shape[1], name
    # transformers 4 repeats the pictures for its beams one by one, so that of two pictures each beam gets other ones.
    mixed_up = version == "4" and len(CONVERSATIONS[name][1]) > 1
    for beams, answer in zip(ask_transformers.BEAMS[: 1 if mixed_up else None], answers):
      generated = get(f"answer{beams}").tolist()
      assert (generated[: generated.index(eos_id)] if eos_id in generated else generated) == answer, (name, beams)
  greedy, *searched = zip(*(answers for _, _, answers, _ in ours[kind]))
  assert len(set(map(tuple, greedy))) > 1  # not the same to every question
  assert any(found != greedy for found in searched)


def test_the_template_takes_contents_of_every_kind(exported):
  from transformers import AutoProcessor

  render = lambda content, role="user": processor.apply_chat_template(
    [{"role": role, "content": content}], add_generation_prompt=True
  )
  processor = AutoProcessor.from_pretrained(exported["spm_legacy"][0])
  picture, text = {"type": "image"}, lambda text: {"type": "text", "text": text}
  expected = render([picture, text("What is it?")])
  assert expected == f"{chat.VICUNA_SYSTEM} USER: <image>\nWhat is it? ASSISTANT:"
  # the picture comes first wherever it stands, as in our turns
  assert render([text("What is it?"), picture]) == render("What is it?\n<image>") == expected
  assert render([text("a"), text("b")]) == f"{chat.VICUNA_SYSTEM} USER: a\nb ASSISTANT:"
  assert render("Hello.", "system") == "Hello. ASSISTANT:"
  with pytest.raises(Exception, match="role tool is unknown"):
    render("x", "tool")
