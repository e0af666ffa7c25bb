"""The ConvNeXt pyramid against transformers', with weights read under both ways of naming."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from released import check_close, jit, weights

from mllm_jax import parameters
from mllm_jax.models.projectors import convnext
from mllm_jax.weights import convnext as convnext_weights
from mllm_jax.weights.known import WeightsError
from mllm_jax.weights.mapping import load

pytestmark = pytest.mark.torch
GRIDS = [(2, 3), (1, 5), (3, 1)]
SIDE, PLACES = 14, 6
WIDTHS, DEPTHS = (8, 12, 16, 20), (2, 1, 2, 1)
# transformers' names as timm has them.
TO_TIMM = (
  ("embeddings.patch_embeddings", "stem.0"),
  ("embeddings.layernorm", "stem.1"),
  ("encoder.", ""),
  ("downsampling_layer", "downsample"),
  (r"layers\.(\d)", r"blocks.\1"),
  ("dwconv", "conv_dw"),
  ("layernorm", "norm"),
  ("pwconv1", "mlp.fc1"),
  ("pwconv2", "mlp.fc2"),
  ("layer_scale_parameter", "gamma"),
)


@pytest.fixture(scope="module")
def reference():
  import torch
  import transformers

  config = transformers.ConvNextConfig(hidden_sizes=list(WIDTHS), depths=list(DEPTHS), drop_path_rate=0.0)
  model = transformers.ConvNextModel(config).eval()
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, x in model.named_parameters():
      x.copy_(0.2 * torch.randn(x.shape, generator=generator) + bool(re.search("norm.weight|scale", name)))
  return model


def timm_names(tensors: dict) -> dict:
  renamed = {}
  for name, x in tensors.items():
    for pattern, new in TO_TIMM:
      name = re.sub(pattern, new, name)
    renamed["visual.trunk." + name] = x
  return renamed


def loaded(tensors: dict) -> convnext.ConvNext:
  graphdef, flat = parameters.flatten(convnext.ConvNext(WIDTHS, DEPTHS, rngs=nnx.Rngs(0)))
  targets = {convnext_weights.PATH + path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in flat.items()}
  kind = convnext_weights.TIMM if any("conv_dw" in name for name in tensors) else convnext_weights.TRANSFORMERS
  found = load(weights(tensors), convnext_weights.table(kind), targets)
  return parameters.unflatten(graphdef, {path.removeprefix(convnext_weights.PATH): x for path, x in found.items()})


@pytest.mark.parametrize("naming", [dict, timm_names])
def test_every_stage_is_transformers(reference, naming):
  import torch

  tensors = naming({name: x.detach().numpy() for name, x in reference.state_dict().items()})
  module, random = loaded(tensors), np.random.default_rng(0)
  patches, expected = np.zeros((len(GRIDS), PLACES, 3 * SIDE**2), np.float32), []
  for n, (h, w) in enumerate(GRIDS):
    image = random.standard_normal((h * SIDE, w * SIDE, 3)).astype(np.float32)
    patches[n, : h * w] = image.reshape(h, SIDE, w, SIDE, 3).swapaxes(1, 2).reshape(h * w, -1)
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
    pixels = torch.nn.functional.interpolate(pixels, (32 * h, 32 * w), mode="bilinear", align_corners=False)
    with torch.no_grad():
      states = reference(pixels, output_hidden_states=True).hidden_states
    expected.append([states[4 - level][0].permute(1, 2, 0).numpy() for level in range(4)])
  maps = jit(lambda module, *args: module(*args))(module, patches, jnp.asarray(GRIDS, jnp.int32))
  for n, (h, w) in enumerate(GRIDS):
    for level, x in enumerate(maps):
      found = np.asarray(x[n, : 4**level * h * w]).reshape(expected[n][level].shape)
      check_close(f"{h} x {w}, level {level}", found, expected[n][level], relative=0, floor=1e-4)


def test_weights_of_another_size(reference):
  tensors = {name: x.detach().numpy() for name, x in reference.state_dict().items()}
  tensors["encoder.stages.3.layers.1.dwconv.bias"] = np.zeros(20, np.float32)
  tensors.pop("embeddings.patch_embeddings.bias")
  with pytest.raises(
    WeightsError, match=r"(?s)missing: embeddings.patch_embeddings.bias.*unexpected: encoder.stages.3"
  ):
    loaded(tensors)
