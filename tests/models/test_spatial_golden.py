"""The spatial projector against the released module definitions: tokens and gradients of every variant."""

import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import released
from flax import nnx

from mllm_jax.config import ProjectorConfig
from mllm_jax.models.projectors import maps
from mllm_jax.models.projectors.spatial import SpatialProjector
from mllm_jax.weights import spatial

GRID = 24
VARIANTS = {
  "sp_crop_sfe": dict(maps="cropping", dfi_kernel=0),
  "sp_pool_sfe": dict(maps="pooling", dfi_kernel=0),
  "sp_crop_1tok": dict(maps="cropping", dfi_kernel=0, sizes=(24,)),
  "sp_crop_3tok": dict(maps="cropping", dfi_kernel=0, stride=4),
  "sp_crop_12tok": dict(maps="cropping", dfi_kernel=0, stride=1),
  "sp_crop_tfm": dict(sfe="transformer", maps="cropping", dfi_kernel=0),
  "sp_pool_tfm_official_scrambled": dict(sfe="transformer", maps="pooling", dfi_kernel=0, token_order="released"),
  "sp_conv49": dict(sfe="windows", window_strides=(2, 2), dfi_kernel=0),
  "sp_siglip_crop_dfi_k16": dict(maps="cropping", dfi_kernel=16),
} | {
  f"sp_{short}_dfi_k{kernel}": dict(maps=maps, dfi_kernel=kernel)
  for short, maps in (("crop", "cropping"), ("pool", "pooling"))
  for kernel in (4, 8, 12, 16)
}
# Adding the same number to all of a query's scores changes no attention weight, so a bias of the keys has no gradient.
NO_GRADIENT = ("key_projector.0.bias", "key_projector.1.bias")


class Case(NamedTuple):
  name: str
  golden: dict
  tokens: np.ndarray  # the visual tokens
  parts: dict  # what lies on the way to them
  gradients: dict  # by foreign name
  input_gradient: np.ndarray


SLOW = ("sp_crop_tfm", "sp_pool_tfm_official_scrambled")  # test_sfe_transformer.py has what is quick of them


@pytest.fixture(
  scope="module", params=[pytest.param(name, marks=[pytest.mark.long] * (name in SLOW)) for name in VARIANTS]
)
def case(request):
  """A golden, and all that the projector with its weights gives for it; one compilation serves every check."""
  golden = released.read(request.param)
  meta = json.loads(str(golden["meta_json"]))
  config = ProjectorConfig(**VARIANTS[request.param], conv_width=meta["E"])
  table = spatial.table(config, GRID)
  projector = nnx.eval_shape(lambda: SpatialProjector(config, GRID, meta["C"], meta["H"], rngs=nnx.Rngs(0)))
  projector = released.fill(projector, "projector/", table, released.group(golden, "w."))

  @released.jit
  def run(projector, patch_features):
    patch_map = patch_features.reshape(2, GRID, GRID, -1)
    parts = {"mid.conv_49" if config.sfe == "windows" else "mid.tokens_pre": projector.sfe(patch_map)}
    parts |= {f"mid.pool{m.shape[1]}": m for m in maps.make(config, patch_map) if config.maps == "pooling"}
    if projector.dfi is not None:
      parts |= {"mid.conv_fuse": projector.dfi.details(patch_map)}
      parts |= {"mid.embed_fuse": projector.dfi(parts["mid.tokens_pre"], patch_map)}
    tokens, pullback = jax.vjp(lambda projector, x: projector(x), projector, patch_features)
    return tokens, parts, pullback(jnp.asarray(golden["cotangent"]))

  tokens, parts, (of_weights, of_input) = run(projector, golden["in.patch_features"])
  names = released.to_foreign(of_weights, "projector/", table)
  gradients = {name.removeprefix("model."): gradient for name, gradient in names.items()}
  return Case(request.param, golden, np.asarray(tokens), jax.device_get(parts), gradients, np.asarray(of_input))


def test_visual_tokens(case):
  spatial_count = case.golden["out64.spatial"].shape[1]
  assert case.tokens.shape[1] == spatial_count + GRID**2
  chosen = case.tokens[:, case.golden["out.rows"]]
  released.check_close(f"{case.name} tokens", chosen, case.golden["out.image_features"], relative=0, floor=1e-5)
  # The float64 run tells our rounding from the released run's.
  spatial_tokens = case.tokens[:, :spatial_count]
  released.check_close(f"{case.name} spatial", spatial_tokens, case.golden["out64.spatial"], relative=0, floor=5e-6)


def test_gradients(case):
  released.check_close(f"{case.name} input", case.input_gradient, case.golden["grad_in.patch_features"], relative=1e-4)
  whole, samples = released.group(case.golden, "g."), released.group(case.golden, "sample.")
  assert sorted(case.gradients) == sorted([*whole, *samples])
  for name, gradient in case.gradients.items():
    if name in NO_GRADIENT:
      assert np.abs(gradient).max() < 1e-4 * np.abs(case.gradients["value_projector.1.bias"]).max()
    elif name in whole:
      released.check_close(f"{case.name} {name}", gradient, whole[name], relative=1e-4)
    else:
      flat, size = gradient.ravel(), case.golden["max." + name]
      chosen = flat[:: flat.size // int(case.golden.get("sample_count", 2048)) | 1]
      released.check_close(f"{case.name} {name}", chosen, samples[name], relative=1e-4, size=size)
      assert np.abs(flat).max() == pytest.approx(size, rel=1e-4)


def test_maps_and_details(case):
  """Two float32 sums over up to 9216 products in different orders, and a tenth of that where bins are averaged."""
  checked = [name for name in case.parts if name in case.golden]
  assert {"mid.tokens_pre", "mid.conv_49"} & set(checked)
  for name in checked:
    floor = 1e-6 if name.startswith("mid.pool") else 2e-5
    released.check_close(f"{case.name} {name}", case.parts[name], case.golden[name], relative=0, floor=floor)
