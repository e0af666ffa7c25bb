"""python -m mllm_jax.probe as a user runs it: data sets made here in their published layouts, a tiny random tower."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from PIL import Image
from safetensors.numpy import load_file

from mllm_jax import build, parameters, probe
from mllm_jax.data.records import DataError
from mllm_jax.models.projectors.vdim import Vdim
from mllm_jax.probes import features, results, run, tasks
from mllm_jax.probes.examples import Data, Example
from mllm_jax.weights import vdim_file

RED, BLUE, BLACK = (220, 30, 30), (30, 30, 220), (0, 0, 0)


@pytest.fixture(scope="module")
def towers(tmp_path_factory) -> tuple[str, str]:
  """(vision folder, VDIM's file)."""
  folder = tmp_path_factory.mktemp("towers")
  vision, _ = tiny.write_towers(folder)
  flat = parameters.flatten(Vdim(2, tiny.VISION.width, rngs=nnx.Rngs(1)))[1]
  arrays = {vdim_file.PATH + name: np.asarray(value) for name, value in flat.items()}
  vdim_file.write(folder / "vdim.safetensors", arrays, {"levels": "2"})
  return vision, str(folder / "vdim.safetensors")


def block(rows: int, colours: list[tuple[int, int, int]], path: Path) -> Path:
  """A picture of upright stripes, 14 pixels wide each."""
  path.parent.mkdir(parents=True, exist_ok=True)
  stripes = np.repeat(np.asarray(colours, np.uint8)[None], 14 * rows, 0).repeat(14, 1)
  Image.fromarray(stripes).save(path)
  return path


def write_words(folder: Path) -> None:
  """Words of "a" and "b", which are red and blue stripes with black between them."""
  for half in ("train", "test"):
    lines = []
    for i, word in enumerate(["aa", "ab", "ba", "bb"] * 2):
      one, other = (RED if letter == "a" else BLUE for letter in word)
      name = f"{half}/{i}_{word}_0.png"
      block(2, [BLACK, one, one, BLACK, BLACK, other, other, BLACK], folder / name)
      lines.append(f"./{name} 0\n")
    (folder / f"annotation_{half}.txt").write_text("".join(lines))


def write_label_maps(folder: Path) -> None:
  """Persons are red and skies blue: the values 0 and 105."""
  for split in ("train2017", "val2017"):
    for i in range(6):
      kinds = np.random.default_rng(i).integers(0, 2, 4)
      block(4, [(RED, BLUE)[kind] for kind in kinds], folder / "images" / split / f"{i}.jpg")
      (folder / "annotations" / split).mkdir(parents=True, exist_ok=True)
      labels = np.repeat((kinds * 105).astype(np.uint8)[None], 56, 0).repeat(14, 1)
      Image.fromarray(labels).save(folder / "annotations" / split / f"{i}.png")


def write_birds(folder: Path) -> None:
  """Red birds and blue ones in boxes on the other colour."""
  lines = {"images": [], "image_class_labels": [], "train_test_split": [], "bounding_boxes": []}
  for i in range(8):
    kind = i % 2
    own, other = (RED, BLUE)[kind], (BLUE, RED)[kind]
    block(4, [other, own, own, other], folder / "images" / f"{i}.png")
    for name, value in zip(lines, (f"{i}.png", kind + 1, int(i < 4), "14.0 0.0 28.0 56.0")):
      lines[name].append(f"{i + 1} {value}\n")
  for name, rows in lines.items():
    (folder / f"{name}.txt").write_text("".join(rows))
  (folder / "classes.txt").write_text("1 001.Red\n2 002.Blue\n")


def ask(towers, task: str, folder: Path, workdir: Path, *options: str) -> int:
  vision, vdim = towers
  command = [f"--task={task}", f"--vision={vision}", f"--vdim={vdim}", f"--data={folder}", f"--workdir={workdir}"]
  return probe.main([*command, "--level=1", "--steps=60", "--batch_size=4", "--learning_rate=0.03", *options])


def read(workdir: Path, task: str, kind: str) -> dict:
  return json.loads((workdir / task / kind / results.RESULT).read_text())


def test_words_are_read(towers, tmp_path, capsys):
  write_words(tmp_path / "data")
  assert ask(towers, "text", tmp_path / "data", tmp_path / "run", "--features=none") == 0
  result = read(tmp_path / "run", "text", "none")
  assert result["metrics"] == {"word accuracy": 1.0} and result["tested"] == 8  # one in four by chance
  assert "| text | word accuracy | 100.0% | - | - |" in capsys.readouterr().out
  rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
  assert [row["step"] for row in rows] == [*range(10, 61, 10), 60] and rows[-1]["word_accuracy"] == 1
  assert rows[-2]["loss"] < rows[0]["loss"] / 2 and rows[0]["stage"] == "text_none"
  with np.load(tmp_path / "run" / "text" / "none" / "head.npz") as head:
    assert head["kernel"].shape == (2 * tiny.VISION.width, 37)


def test_all_features_of_label_maps_side_by_side(towers, tmp_path, capsys):
  write_label_maps(tmp_path / "data")
  workdir = tmp_path / "run"
  assert ask(towers, "segmentation", tmp_path / "data", workdir, "--features=all") == 0
  # The patches have one colour each, so the tower's own features are the best; the others mix neighbours.
  for kind, least in (("none", 0.99), ("bilinear", 0.9), ("vdim", 0.7)):
    assert read(workdir, "segmentation", kind)["metrics"]["pixel accuracy"] >= least, kind
  assert read(workdir, "segmentation", "none")["metrics"]["mIoU"] >= 0.99
  out = capsys.readouterr().out
  assert "| probe | metric | none | bilinear 2x | vdim 2x |" in out and " - " not in out
  assert (workdir / "results.md").read_text() in out
  assert set(json.loads((workdir / "results.json").read_text())["segmentation"]) == set(features.KINDS)
  page = (workdir / "page" / "index.html").read_text()
  assert page.count("data:image/png") == 4 * 5 and "<script" not in page  # picture, labels, three answers
  assert len(list((workdir / "page").glob("*.png"))) == 4 * 5

  assert ask(towers, "segmentation", tmp_path / "data", workdir, "--features=all") == 0
  assert capsys.readouterr().out.count("finished before, kept") == 3
  assert ask(towers, "segmentation", tmp_path / "data", workdir, "--features=none", "--seed=1") == 2
  assert "is of another probe (settings:" in capsys.readouterr().err
  (workdir / "segmentation/none/result.json").write_text("{")
  assert ask(towers, "segmentation", tmp_path / "data", workdir, "--features=none") == 2
  assert "result.json is damaged" in capsys.readouterr().err


def test_birds_are_named_by_what_is_in_their_boxes(towers, tmp_path):
  """Without the boxes both kinds would have as much red as blue."""
  write_birds(tmp_path / "data")
  assert ask(towers, "classes", tmp_path / "data", tmp_path / "run", "--features=bilinear") == 0
  assert read(tmp_path / "run", "classes", "bilinear")["metrics"] == {"accuracy": 1.0}


def test_bilinear_features_are_the_towers_interpolated(towers):
  vision = towers[0]
  config = build.part_config(vision, "vision")
  patches = np.random.default_rng(0).integers(0, 256, (2, 18, 588), np.uint8)
  maps = {}
  for kind in ("none", "bilinear"):
    graphdef, flat = features.load(vision, config, kind, 1, "", "float32")

    @jax.jit
    def both(flat):
      model, grids = parameters.unflatten(graphdef, flat), jnp.full((2, 2), jnp.asarray([3, 6]))
      return model(patches, (3, 6)), model.vision(model.vision.normalise(patches), grids)

    maps[kind], raw = map(np.asarray, both(flat))
  raw = raw.reshape(2, 3, 6, -1)
  assert maps["none"].shape == (2, 3, 6, 16) and maps["bilinear"].shape == (2, 6, 12, 16)
  normed = lambda x: (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + features.NORM_EPS)
  np.testing.assert_allclose(maps["none"], normed(raw), atol=1e-5)  # float32
  # Inside, a pixel is a quarter of a cell off: 9, 3, 3 and 1 sixteenths of the four cells around.
  expected = (9 * raw[:, 1, 2] + 3 * raw[:, 1, 3] + 3 * raw[:, 2, 2] + raw[:, 2, 3]) / 16
  np.testing.assert_allclose(maps["bilinear"][:, 3, 5], normed(expected), atol=1e-4)


def test_vdim_is_the_one_in_the_file(towers):
  _, flat = features.load(towers[0], build.part_config(towers[0], "vision"), "vdim", 1, towers[1], "float32")
  loaded = {name for name in flat if name.startswith("pyramid/")}
  arrays = load_file(towers[1])
  assert {f"projector/{name}" for name in loaded} == set(arrays)
  for name in loaded:
    np.testing.assert_array_equal(flat[name], arrays[f"projector/{name}"])


class Odd:
  """A task of which every third row cannot be used."""

  def row(self, example):
    if example.label % 3 == 2:
      raise DataError(f"picture {example.label} is damaged")
    return np.zeros((1, 3), np.uint8), {"number": np.int32(example.label)}


def test_batches_with_rows_that_cannot_be_used():
  rows = run.Rows(Odd(), [Example("", i) for i in range(7)], 4)
  found = list(rows.batches([np.asarray([0, 1, 2, 3]), np.asarray([4, 5])]))
  assert [indices for indices, _ in found] == [[0, 1, 2, 3], [4, 5]]
  assert found[0][1]["weights"].tolist() == [1, 1, 0, 1] and found[0][1]["labels"]["number"].tolist() == [0, 1, 0, 3]
  assert found[1][1]["weights"].tolist() == [1, 0, 0, 0] and found[1][1]["patches"].shape == (4, 1, 3)
  assert (rows.seen, rows.unreadable) == (6, 2)
  with pytest.raises(DataError, match="picture 5 is damaged"):
    list(rows.batches([np.asarray([2, 5])]))
  with pytest.raises(DataError, match="of 100 pictures cannot be used"):
    list(run.Rows(Odd(), [Example("", i) for i in range(100)], 50).batches([np.arange(50), np.arange(50, 100)]))


def test_every_picture_is_seen_before_one_is_again():
  settings = run.Settings(steps=5, batch_size=4, learning_rate=1.0, seed=3)
  steps = list(run.order(10, settings))
  assert sorted(np.concatenate(steps)[:10].tolist()) == list(range(10)) and all(len(step) == 4 for step in steps)
  np.testing.assert_array_equal(np.concatenate(steps), np.concatenate(list(run.order(10, settings))))
  assert (np.concatenate(steps)[:10] != np.concatenate(steps)[10:]).any()


def test_a_step_is_compiled_once_and_leaves_bad_rows_out(towers):
  config = build.part_config(towers[0], "vision")
  task = tasks.make("classes", Data((), (), ("x", "y")), config)
  graphdef, frozen = features.load(towers[0], config, "none", 0, "", "float32")
  optimizer, step, _ = run.programs(task, graphdef, run.Settings(3, 2, 0.1))
  patches = np.random.default_rng(0).integers(0, 256, (2, 16, 588), np.uint8)
  losses = []
  for other in (0, 1, 1):
    head = run.new_head(task, graphdef, frozen)
    batch = {"patches": patches, "labels": {"class": np.asarray([0, other])}, "weights": np.asarray([1, 0], np.float32)}
    head, _, loss = step(head, optimizer.init(head), frozen, batch)
    losses.append((float(loss), np.asarray(head["kernel"])))
  assert step._cache_size() == 1
  assert losses[0][0] == losses[1][0] == pytest.approx(np.log(2), rel=1e-6)  # a head of zeros
  np.testing.assert_array_equal(losses[0][1], losses[1][1])


@pytest.mark.parametrize(
  "options, words",
  [
    (["--task=text", "--features=none"], "name --data and --vision, or --demo"),
    (["--task=text", "--features=all", "--demo"], "configs/vdim.py:demo"),
    (["--task=text", "--features=vdim", "--vdim=nowhere", "--demo"], "--vdim nowhere: no such file or folder"),
    (["--task=text", "--features=none", "--demo", "--data=x"], "leave out --data"),
    (["--task=text", "--features=none", "--demo", "--steps=0"], "must be 1 or more"),
    (["--task=words", "--features=none", "--demo"], "invalid choice: 'words'"),
  ],
)
def test_what_a_user_may_get_wrong(options, words, capsys):
  with pytest.raises(SystemExit) as stopped:
    probe.main(options)
  assert stopped.value.code == 2 and words in capsys.readouterr().err


def test_files_that_are_missing_are_told_before_anything_else(towers, tmp_path, capsys):
  (tmp_path / "data").mkdir()
  assert ask(towers, "classes", tmp_path / "data", tmp_path / "run", "--features=none") == 2
  assert "images.txt cannot be read" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_missing_data_are_told_before_anything_heavy_is_imported(tmp_path):
  command = ["--task=classes", "--features=none", f"--vision={tmp_path}", f"--data={tmp_path}"]
  code = (
    f"import sys\nfrom mllm_jax import probe\nassert probe.main({command!r}) == 2\n"
    "heavy = {'jax', 'flax', 'optax', 'transformers', 'grain'} & set(sys.modules)\nassert not heavy, heavy"
  )
  done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
  assert done.returncode == 0 and "images.txt cannot be read" in done.stderr, done.stderr


def test_a_workdir_that_is_a_file(towers, tmp_path, capsys):
  write_birds(tmp_path / "data")
  (tmp_path / "run").write_text("")
  assert ask(towers, "classes", tmp_path / "data", tmp_path / "run", "--features=none") == 2
  assert "run: File exists" in capsys.readouterr().err


def test_a_vdim_that_does_not_reach_the_level(towers, tmp_path):
  flat = parameters.flatten(Vdim(1, tiny.VISION.width, rngs=nnx.Rngs(1)))[1]
  vdim_file.write(tmp_path / "one", {vdim_file.PATH + name: np.asarray(x) for name, x in flat.items()}, {})
  (tmp_path / "one").rename(tmp_path / "one.safetensors")
  with pytest.raises(features.ConfigError, match="has 1 levels above the tower's; set --level to 1"):
    features.load(
      towers[0], build.part_config(towers[0], "vision"), "vdim", 2, str(tmp_path / "one.safetensors"), "float32"
    )
