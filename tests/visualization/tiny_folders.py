"""Folders of tiny models of every kind, and pictures for them."""

import dataclasses
from pathlib import Path

import layouts
import numpy as np
from PIL import Image

from mllm_jax.config import ProjectorConfig
from mllm_jax.weights import folder
from mllm_jax.weights.tensors import InMemory

UHD = ProjectorConfig(kind="hiwin", levels=(0, 2), query_grid=2, head_width=8)
KINDS = {
  "mlp": ProjectorConfig(kind="mlp2x_gelu"),
  "tiled": ProjectorConfig(stride=1, dfi_kernel=2, conv_width=8, image_newline=True),
  "cropping": ProjectorConfig(stride=1, dfi_kernel=2, conv_width=8),
  "pooling": ProjectorConfig(maps="pooling", sizes=(1, 3, 4), dfi_kernel=0, conv_width=8),
  "shuffled": ProjectorConfig(kind="spatial_shuffle", stride=1, dfi_kernel=2, conv_width=8),
  "windows": ProjectorConfig(sfe="windows", window=2, window_strides=(1, 2), dfi_kernel=0, conv_width=8),
  "hiwin": UHD,
  "bilinear": dataclasses.replace(UHD, pyramid="bilinear", levels=(1,), pooling="pyramid", organisation="slices"),
  "uhd_v1": dataclasses.replace(UHD, kind="uhd_v1", pyramid="none", levels=(0,)),
  "perceiver": dataclasses.replace(
    UHD,
    kind="perceiver",
    pyramid="convnext",
    levels=(0, 1),
    convnext_widths=(4, 4, 8, 8),
    convnext_depths=(1, 1, 1, 1),
  ),
  "mlp144": dataclasses.replace(UHD, kind="mlp144", pyramid="deconv", levels=(0, 1)),
}


def write(path: Path, kind: str) -> Path:
  """A folder of ours with random weights."""
  model = layouts.model(KINDS[kind])
  parts = {name: getattr(model, name) for name in ("vision", "decoder", "projector")}
  arrays = {}
  for name in parts:
    arrays |= layouts.arrays(model, name)
  folder.write(path, folder.Manifest(parts, "vicuna_v1"), InMemory(arrays), str(layouts.tokenizer(path / "../words")))
  return path


def picture(path: Path, width: int = 168, height: int = 56) -> Path:
  """A file with a picture of smooth random colours."""
  small = np.random.default_rng(0).integers(0, 256, (4, 9, 3), np.uint8)
  Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(path)
  return path
