"""The command: what it writes for every kind of model, and what it says to arguments that cannot work."""

import base64
import html.parser
import json
import os

import pytest
import tiny_folders

from mllm_jax import visualize
from mllm_jax.visualization import folder

FIGURES = {
  "mlp": {"overview", "tokens", "patches", "features"},
  "tiled": {"slices", "overview", "tokens", "patches", "features", "squares", "maps", "details"},
  "cropping": {"overview", "tokens", "patches", "features", "squares", "maps", "details"},
  "windows": {"overview", "tokens", "patches", "features", "maps"},
  "pooling": {"overview", "tokens", "patches", "features", "maps"},
  "shuffled": {"slices", "overview", "tokens", "patches", "features", "squares", "maps", "details"},
  "hiwin": {"slices", "overview", "tokens", "crop", "features-0", "pyramid-2", "bilinear-2"}
  | {"windows", "window-0", "window-2"},
  "bilinear": {"slices", "overview", "tokens", "crop", "features-0", "pyramid-1", "windows", "window-1"},
  "uhd_v1": {"slices", "overview", "tokens", "patches", "features", "windows", "window-0"},
  "perceiver": {"slices", "overview", "tokens", "crop", "pyramid-0", "pyramid-1"},
  "mlp144": {"slices", "overview", "tokens", "crop", "features-0", "pyramid-1", "bilinear-1", "windows"},
}


class Page(html.parser.HTMLParser):
  """Everything that a page refers to."""

  def __init__(self, text: str):
    super().__init__()
    self.tags, self.images, self.links = set(), [], []
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.tags.add(tag)
    for name, value in attrs:
      if name in ("src", "srcset", "data", "poster"):
        self.images.append(value)
      elif name == "href":
        self.links.append(value)


@pytest.fixture(scope="module")
def image(tmp_path_factory):
  return str(tiny_folders.picture(tmp_path_factory.mktemp("picture") / "a wide <one>.png"))


@pytest.mark.parametrize("kind", FIGURES)
def test_a_page_and_its_pictures_for_every_kind_of_model(kind, image, tmp_path, capsys):
  model = tiny_folders.write(tmp_path / "model", kind)
  out = tmp_path / "deep" / "looked"
  assert visualize.main([f"--model={model}", f"--image={image}", f"--out={out}"]) == 0
  printed = capsys.readouterr()
  assert printed.out == f"{out}/index.html\n" and "read in" in printed.err
  expected = {f"{name}.png" for name in FIGURES[kind]}
  assert set(os.listdir(out)) == expected | {"index.html", "visualize.json"}
  assert os.listdir(out.parent) == ["looked"]  # nothing half done beside it
  manifest = json.loads((out / "visualize.json").read_text())
  assert set(manifest["files"]) == expected | {"index.html"} and manifest["image"] == image

  text = (out / "index.html").read_text()
  page = Page(text)
  assert set(page.links) == expected
  prefix = "data:image/png;base64,"
  assert all(source.startswith(prefix) for source in page.images)
  inside = [base64.b64decode(source[len(prefix) :]) for source in page.images]
  assert sorted(inside) == sorted((out / name).read_bytes() for name in expected)
  assert not page.tags & {"script", "link", "iframe", "object", "form"}
  assert "http" not in text.replace("http-equiv", "") and "url(" not in text and "@import" not in text
  assert "a wide &lt;one&gt;.png" in text and ("no pyramid" in text) == (kind == "uhd_v1")


@pytest.mark.long
def test_another_crop_replaces_the_folder(image, tmp_path, capsys):
  model, out = tiny_folders.write(tmp_path / "model", "hiwin"), tmp_path / "looked"
  out.mkdir()  # an empty one may be used
  for crop, folder_of_window in ((0, "crop 0 of 4"), (3, "crop 3 of 4")):
    assert visualize.main([f"--model={model}", f"--image={image}", f"--out={out}", f"--crop={crop}"]) == 0
    assert folder_of_window in (out / "index.html").read_text()
  before = (out / "index.html").read_bytes()
  assert visualize.main([f"--model={model}", f"--image={image}", f"--out={out}", "--crop=4"]) == 2
  assert capsys.readouterr().err.endswith("error: --crop=4: the image becomes 4 crops, 0 to 3\n")
  assert (out / "index.html").read_bytes() == before and set(os.listdir(tmp_path)) == {"model", "words", "looked"}


def test_a_folder_of_others_is_left_alone(image, tmp_path, capsys):
  (tmp_path / "mine").mkdir()
  (tmp_path / "mine" / "notes.txt").write_text("mine")
  (tmp_path / "file").write_text("mine")
  (tmp_path / "link").symlink_to(tmp_path / "mine")
  for name, told in (
    ("mine", "this folder holds notes.txt, which this command did not write"),
    ("file", "there is something that is no folder"),
    ("link", "there is something that is no folder"),
    ("gs://bucket/x", "write to a local folder"),
  ):
    out = name if "://" in name else tmp_path / name
    assert visualize.main([f"--model={tmp_path}", f"--image={image}", f"--out={out}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --out ") and told in error and error.count("\n") == 1
  # What was added to a folder of this command's is kept too.
  folder.write(tmp_path / "ours", {"a.png": b"1"}, {})
  assert folder.check(str(tmp_path / "ours")) == tmp_path / "ours"
  (tmp_path / "ours" / "mine.txt").write_text("mine")
  assert visualize.main([f"--model={tmp_path}", f"--image={image}", f"--out={tmp_path / 'ours'}"]) == 2
  assert "holds mine.txt" in capsys.readouterr().err


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
  out = tmp_path / "looked"
  folder.write(out, {"a.png": b"old"}, {})
  with pytest.raises(OSError):
    folder.write(out, {"no/such/folder.png": b"new"}, {})
  assert (out / "a.png").read_bytes() == b"old" and os.listdir(tmp_path) == ["looked"]

  replace = os.replace

  def stuck(source, target):
    if str(source).endswith(".partial"):
      raise OSError("stuck")
    replace(source, target)

  monkeypatch.setattr(os, "replace", stuck)
  with pytest.raises(OSError, match="stuck"):
    folder.write(out, {"a.png": b"new"}, {})
  assert (out / "a.png").read_bytes() == b"old" and os.listdir(tmp_path) == ["looked"]


@pytest.mark.parametrize(
  "changes,told",
  [
    ({"model": "/no/such/folder"}, "--model /no/such/folder: no such folder"),
    ({"image": "/no/such.png"}, "--image /no/such.png: no such file"),
    ({"crop": "-1"}, "--crop is -1"),
    ({"crop": "first"}, "--crop"),
    ({"kind": "x"}, "unrecognized arguments: --kind=x"),
  ],
)
def test_arguments_that_cannot_work(changes, told, image, tmp_path, capsys):
  given = {"model": tmp_path, "image": image, "out": tmp_path / "out"} | changes
  with pytest.raises(SystemExit) as stop:
    visualize.main([f"--{name}={value}" for name, value in given.items()])
  error = capsys.readouterr().err
  assert stop.value.code == 2 and error.startswith("error: ") and told in error and error.count("\n") == 1


def test_files_that_are_no_picture_and_folders_that_are_no_model(image, tmp_path, capsys):
  (tmp_path / "a.png").write_text("no picture")
  arguments = [f"--model={tmp_path}", f"--out={tmp_path / 'out'}"]
  for name, told in ((str(tmp_path / "a.png"), "cannot be read as a picture"), (image, "model.safetensors does not")):
    assert visualize.main([*arguments, f"--image={name}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and told in error and error.count("\n") == 1
  assert not (tmp_path / "out").exists()
