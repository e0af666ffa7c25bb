"""int8 storage of a frozen decoder's kernels: symmetric, with one scale for each output channel of each layer.

The embedding table, the head and the norms stay as they are. See `ModelConfig.int8_decoder`.
"""

import re

import numpy as np

from mllm_jax.weights.buffers import Index, whole
from mllm_jax.weights.tensors import Tensors, View

KERNELS, SCALES = r"decoder/layers/\w+_proj/kernel", r"decoder/layers/\w+_proj/scale"
LARGEST = 127


class Rounded(View):
  """A decoder's tensors with the values that its int8 kernels stand for, in the types that they had."""

  def __init__(self, source: Tensors):
    super().__init__(source)
    self._scales: dict[str, np.ndarray] = {}

  def read(self, name: str, index: Index = ()) -> np.ndarray:
    if not re.fullmatch(KERNELS, name):
      return self.source.read(name, index)
    steps, scale = self.steps(name, index)
    return (steps * scale).astype(self.source.dtype(name))

  def steps(self, name: str, index: Index) -> tuple[np.ndarray, np.ndarray]:
    """A part of a kernel [L, in, out] as whole numbers in -127..127, float32, and their scales [L, 1, out]."""
    layers, _, outputs = index = index or whole(self.source.shape(name))
    scale = self.scale(name)[layers, None, outputs]
    return np.rint(self.source.read(name, index).astype(np.float32) / scale), scale

  def scale(self, name: str) -> np.ndarray:
    """float32 [L, out]: the largest weight of each channel over 127, 1 for a channel of zeros. A kernel is read for it
    layer by layer, once."""
    if name not in self._scales:
      layers, *rest = whole(self.source.shape(name))
      largest = []
      for layer in range(layers.stop):
        kernel = self.source.read(name, (slice(layer, layer + 1), *rest))
        largest.append(np.abs(kernel[0]).max(axis=0).astype(np.float32))
        self.source.release(name)
      scale = np.stack(largest) / np.float32(LARGEST)
      self._scales[name] = np.where(scale > 0, scale, np.float32(1))
    return self._scales[name]


class Int8(Rounded):
  """A decoder's tensors as a model stores them in int8: kernels int8, and beside each its float32 scale [L, out]."""

  def names(self) -> list[str]:
    names = self.source.names()
    return names + [_scale_name(name) for name in names if re.fullmatch(KERNELS, name)]

  def shape(self, name: str) -> tuple[int, ...]:
    if not re.fullmatch(SCALES, name):
      return self.source.shape(name)
    layers, _, outputs = self.source.shape(_kernel_name(name))
    return layers, outputs

  def dtype(self, name: str) -> np.dtype:
    if re.fullmatch(SCALES, name):
      return np.dtype(np.float32)
    return np.dtype(np.int8) if re.fullmatch(KERNELS, name) else self.source.dtype(name)

  def read(self, name: str, index: Index = ()) -> np.ndarray:
    if re.fullmatch(SCALES, name):
      return self.scale(_kernel_name(name))[index]
    if not re.fullmatch(KERNELS, name):
      return self.source.read(name, index)
    return self.steps(name, index)[0].astype(np.int8)

  def release(self, name: str) -> None:
    self.source.release(_kernel_name(name) if re.fullmatch(SCALES, name) else name)


def _scale_name(kernel: str) -> str:
  return kernel.removesuffix("kernel") + "scale"


def _kernel_name(scale: str) -> str:
  return scale.removesuffix("scale") + "kernel"
