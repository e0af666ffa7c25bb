"""A model as this project stores it: one folder that needs no other file.

    mllm_jax.json               the manifest: configuration, conversation template, where each part came from, versions
    model.safetensors           the parameters by our own paths, or model-0000i-of-0000n.safetensors with an index
    tokenizer/                  the tokenizer's files, as they were

A folder is written beside its place and renamed when it is complete, so that one that was interrupted never looks
finished.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import mllm_jax
from mllm_jax.config import (
  ConfigError,
  DataConfig,
  DecoderConfig,
  LoraConfig,
  ProjectorConfig,
  VisionConfig,
  check_types,
  from_dict,
  to_dict,
)
from mllm_jax.data.chat import copy_tokenizer
from mllm_jax.weights.known import WeightsError, read_json
from mllm_jax.weights.tensors import Tensors
from mllm_jax.weights.write import local, write_safetensors

MANIFEST = "mllm_jax.json"
TOKENIZER = "tokenizer"
FORMAT = 1
CONFIGS = {"vision": VisionConfig, "decoder": DecoderConfig, "projector": ProjectorConfig, "lora": LoraConfig}
IMAGES = ("image_aspect", "max_slices")
PACKAGES = ("jax", "flax", "orbax-checkpoint", "numpy")


@dataclasses.dataclass(frozen=True)
class Manifest:
  """What a folder holds.

  parts: "vision", "decoder", "projector", "lora", as many as there are, with their configurations.
  template: of the conversations the model was trained on.
  sources: for each part where it came from: path, family, fingerprint.
  run: the training run that made it: stage, step; {} for an import.
  images: how an image became crops in training, by the fields of `DataConfig` that say so; {} where nothing says.
  versions: of the packages that wrote it.
  """

  parts: Mapping[str, VisionConfig | DecoderConfig | ProjectorConfig | LoraConfig]
  template: str
  sources: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
  run: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
  images: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def images_of(data: DataConfig) -> dict[str, Any]:
  """`Manifest.images` of a stage's data."""
  return {name: getattr(data, name) for name in IMAGES}


def read(path: Path) -> Manifest:
  """The manifest of a local folder. Raises WeightsError where it is missing, damaged or of a newer format."""
  file = Path(path) / MANIFEST
  content = read_json(file, "the manifest of a model")
  if content.get("format") != FORMAT:
    raise WeightsError(
      f"{file}: its format is {content.get('format')!r}, and this version of mllm_jax reads {FORMAT}; update mllm_jax"
    )
  try:
    parts = {name: from_dict(CONFIGS[name], config, name) for name, config in content["parts"].items()}
    fields = {name: content[name] for name in ("template", "sources", "run", "versions")}
    fields["images"] = content.get("images", {})
    check_types(from_dict(DataConfig, fields["images"], "images"), "images")
  except (ConfigError, KeyError, TypeError, AttributeError) as error:
    raise WeightsError(f"{file} is damaged ({error}); import the model again") from error
  return Manifest(parts, **fields)


def write(
  path: Path,
  manifest: Manifest,
  tensors: Tensors,
  tokenizer: str,
  *,
  overwrite: bool = False,
  progress: Callable[[int], None] | None = None,
) -> None:
  """Writes a model's folder: the tensors by our paths, the tokenizer's files out of a local folder ("": none), and the
  manifest. Raises WeightsError where the folder exists already, unless it may be overwritten."""
  with beside(path, overwrite=overwrite) as partial:
    write_safetensors(partial, tensors, progress=progress)
    if tokenizer:
      copy_tokenizer(tokenizer, partial / TOKENIZER)
    content = {
      "format": FORMAT,
      "parts": {name: to_dict(config) for name, config in manifest.parts.items()},
      "template": manifest.template,
      "sources": manifest.sources,
      "run": manifest.run,
      "versions": versions(),
      "images": manifest.images,
    }
    (partial / MANIFEST).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def versions() -> dict[str, str]:
  """The installed versions of this package, also where it runs from a checkout, and of those it builds on."""
  others = {package: importlib.metadata.version(package) for package in PACKAGES}
  return {"mllm_jax": mllm_jax.__version__, **others}


@contextlib.contextmanager
def beside(path: Path, *, overwrite: bool) -> Iterator[Path]:
  """A new folder PATH.partial that becomes PATH when the block ends without an error, and is removed otherwise. What an
  earlier attempt has left is removed first.

  Raises WeightsError where PATH is remote, cannot be made, exists and is not to be overwritten, or is to be and holds
  something else than weights.
  """
  path = Path(os.path.abspath(local(path)))  # "." has no name to put an ending to
  if path.exists() and not (path.is_dir() and not any(path.iterdir())):
    if not overwrite:
      raise WeightsError(f"{path} exists already; name another folder, remove it, or allow it with --overwrite")
    if not any(entry.suffix in (".safetensors", ".bin") for entry in path.glob("*")):
      raise WeightsError(f"{path} is no folder of weights, and --overwrite replaces nothing else; name another folder")
  partial = path.with_name(path.name + ".partial")
  shutil.rmtree(partial, ignore_errors=True)
  try:
    partial.mkdir(parents=True)
  except OSError as error:
    raise WeightsError(f"{path} cannot be made ({error.strerror}); name another folder") from error
  try:
    yield partial
  except BaseException:
    shutil.rmtree(partial, ignore_errors=True)
    raise
  old = path.with_name(path.name + ".replaced")
  shutil.rmtree(old, ignore_errors=True)
  if path.exists():
    os.replace(path, old)
  os.replace(partial, path)
  shutil.rmtree(old, ignore_errors=True)
