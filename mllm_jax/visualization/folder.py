"""The folder that is written: whole or not at all, and never over anything that is not this command's own."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from mllm_jax.config import ConfigError

MANIFEST = "visualize.json"
MAKER = "mllm_jax.visualize"


def check(path: str) -> Path:
  """The local folder at a path: not there yet, empty, or written here before and unchanged since.

  Raises ConfigError, in the words of the command line, for any other.
  """
  folder = Path(os.path.abspath(path))
  if "://" in path:
    raise ConfigError(f"--out {path}: write to a local folder and copy it there")
  if not os.path.lexists(folder):
    return folder
  if folder.is_symlink() or not folder.is_dir():
    raise ConfigError(f"--out {path}: there is something that is no folder; name another")
  present = {entry.name for entry in folder.iterdir()}
  strangers = sorted(present - _written(folder))
  if strangers:
    raise ConfigError(
      f"--out {path}: this folder holds {strangers[0]}, which this command did not write; name another folder"
    )
  return folder


def _written(folder: Path) -> set[str]:
  """The names that an earlier call has listed as its own."""
  try:
    content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    return {MANIFEST, *content["files"]} if content["made_by"] == MAKER else set()
  except (OSError, ValueError, KeyError, TypeError):
    return set()


def write(folder: Path, files: Mapping[str, bytes], facts: Mapping[str, str]) -> None:
  """Writes the files and a list of them into a new folder beside, and puts that in the place of `folder`."""
  beside = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
  old = folder.with_name(f".{folder.name}.{os.getpid()}.replaced")
  try:
    beside.mkdir(parents=True)
    for name, content in files.items():
      (beside / name).write_bytes(content)
    manifest = {"made_by": MAKER, **facts, "files": sorted(files)}
    (beside / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    if folder.exists():
      os.replace(folder, old)
    os.replace(beside, folder)
  finally:
    shutil.rmtree(beside, ignore_errors=True)
    if old.exists() and not folder.exists():  # the new one could not take its place
      os.replace(old, folder)
    shutil.rmtree(old, ignore_errors=True)
