"""Writes the digits data set as a LLaVA user's data set would look: PNG files and LLaVA JSON.

python -m mllm_jax.demo.write runs/demo/data

pretrain.json   captions of training pictures, for stage 1
finetune.json   conversations of several turns about training pictures, for stage 2
heldout.json    questions about pictures of held-out scans, each answer with its "category"
pictures/       train-00000.png ..., heldout-00000.png ...
dataset.json    what it was made with; written last
"""

import argparse
import collections
import dataclasses
import io
import json
import os
import pathlib
import shutil

import numpy as np
from PIL import Image

from mllm_jax.demo import scenes, texts

STAMP = "dataset.json"
VERSION = 1  # of what the code below writes for given sizes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
  """How much of everything. Captions and conversations go through the same training pictures, again and again."""

  pictures: int = 4000
  captions: int = 4000
  conversations: int = 8000
  turns: int = 5
  heldout_pictures: int = 250
  heldout_questions: int = 4  # of different kinds, about each picture
  shapes: bool = False  # wide, tall and large pictures too, in equal parts, but for the captions


def write(folder: str | os.PathLike, *, seed: int = 0, sizes: Sizes = Sizes()) -> pathlib.Path:
  """Writes the data set into `folder` and returns it. What is finished already, with the same seed and sizes, is kept.

  Everything is written beside the folder and renamed at the end, so that an interrupted run leaves no half of a data
  set. Raises FileExistsError where the folder holds something that was not written here.
  """
  folder = pathlib.Path(folder)
  stamp = {"version": VERSION, "seed": seed, **dataclasses.asdict(sizes)}
  if folder.exists() and any(folder.iterdir()):
    if not (folder / STAMP).is_file():
      raise FileExistsError(f"{folder} is not empty and holds no {STAMP}: it was not written here; name another folder")
    if json.loads((folder / STAMP).read_text()) == stamp:
      return folder
  folder.parent.mkdir(parents=True, exist_ok=True)
  partial = folder.with_name(f".{folder.name}.partial")
  shutil.rmtree(partial, ignore_errors=True)
  (partial / "pictures").mkdir(parents=True)
  _write_train(partial, np.random.default_rng([seed, 0]), sizes)
  _write_heldout(partial, np.random.default_rng([seed, 1]), sizes)
  _write_json(partial / STAMP, stamp)
  if folder.exists():  # empty, or an older data set of this kind
    shutil.rmtree(folder)
  partial.rename(folder)
  return folder


def _write_train(folder: pathlib.Path, rng: np.random.Generator, sizes: Sizes) -> None:
  scans = scenes.load_digits().train_indices
  pictures = [scenes.sample_scene(rng, scans) for _ in range(sizes.pictures)]
  images = [_write_picture(folder, f"train-{i:05d}", scene) for i, scene in enumerate(pictures)]
  captions, conversations = [], []
  for i in range(sizes.captions):
    turns = [("Describe the picture.", texts.caption(rng, pictures[i % sizes.pictures]), None)]
    captions.append(_sample(f"caption-{i:05d}", images[i % sizes.pictures], turns))
  if sizes.shapes:
    pictures = [scenes.sample_scene(rng, scans, shape=_shape(i)) for i in range(sizes.pictures)]
    images = [_write_picture(folder, f"train-shapes-{i:05d}", scene) for i, scene in enumerate(pictures)]
  for i in range(sizes.conversations):
    questions = texts.converse(rng, pictures[i % sizes.pictures], sizes.turns)
    turns = [(question.text, question.answer, None) for question in questions]
    conversations.append(_sample(f"conversation-{i:05d}", images[i % sizes.pictures], turns))
  _write_json(folder / "pretrain.json", captions)
  _write_json(folder / "finetune.json", conversations)


def _write_heldout(folder: pathlib.Path, rng: np.random.Generator, sizes: Sizes) -> None:
  """Every picture gets questions of the kinds that were asked least so far, so that the kinds are balanced."""
  samples, asked = [], collections.Counter({kind: 0 for kind in texts.KINDS})
  scans = scenes.load_digits().held_out_indices
  for i in range(sizes.heldout_pictures):
    scene = scenes.sample_scene(rng, scans, shape=_shape(i) if sizes.shapes else (1, 1))
    turns = []
    order = sorted(rng.permutation(list(texts.KINDS)), key=asked.__getitem__)
    for kind in order:
      question = texts.ask(rng, scene, str(kind)) if len(turns) < sizes.heldout_questions else None
      if question is not None:
        turns.append((question.text, question.answer, question.kind))
        asked[question.kind] += 1
    samples.append(_sample(f"heldout-{i:05d}", _write_picture(folder, f"heldout-{i:05d}", scene), turns))
  _write_json(folder / "heldout.json", samples)


def _shape(number: int) -> tuple[int, int]:
  return scenes.SHAPES[number % len(scenes.SHAPES)]


def _write_picture(folder: pathlib.Path, name: str, scene: scenes.Scene) -> str:
  path = f"pictures/{name}.png"
  encoded = io.BytesIO()
  Image.fromarray(scenes.render(scene)).save(encoded, "PNG", compress_level=1)
  (folder / path).write_bytes(encoded.getvalue())
  return path


def _sample(name: str, image: str, turns: list[tuple[str, str, str | None]]) -> dict:
  """One sample of LLaVA JSON from (question, answer, category or None)."""
  conversations = []
  for i, (question, answer, category) in enumerate(turns):
    conversations.append({"from": "human", "value": question if i else f"<image>\n{question}"})
    conversations.append({"from": "gpt", "value": answer} | ({"category": category} if category else {}))
  return {"id": name, "image": image, "conversations": conversations}


def _write_json(path: pathlib.Path, content: object) -> None:
  path.write_text(json.dumps(content, indent=1 if isinstance(content, dict) else None))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
  parser.add_argument("folder")
  parser.add_argument("--seed", type=int, default=0)
  arguments = parser.parse_args()
  print(write(arguments.folder, seed=arguments.seed))


if __name__ == "__main__":
  main()
