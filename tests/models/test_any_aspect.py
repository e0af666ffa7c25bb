"""Models for images of any shape: each image gets what it gets alone, one compilation serves all, on any mesh."""

import dataclasses

import jax
import numpy as np
import pytest
import released
from flax import nnx

from mllm_jax import parameters, sharding
from mllm_jax.config import ConfigError, DecoderConfig, MeshConfig, ModelConfig, ProjectorConfig, VisionConfig
from mllm_jax.models import projectors
from mllm_jax.models.mllm import Mllm, abstract

PATCHES = 64
CONFIG = ModelConfig(
  vision=VisionConfig(image_size=112, width=16, layers=2, heads=2, mlp_width=32),
  decoder=DecoderConfig(vocab_size=64, width=32, layers=1, heads=2, kv_heads=2, head_width=16, mlp_width=32),
  projector=ProjectorConfig(kind="hiwin", query_grid=4, head_width=16),
  dtype="float32",
  remat="full",
)
# of which an unused crop sees nothing at all
SIGLIP = dict(class_token=False, patch_bias=True, pre_norm=False, activation="gelu_pytorch_tanh")
KINDS = {
  "hiwin": dataclasses.replace(CONFIG.projector, levels=(0, 1)),
  "bilinear": dataclasses.replace(CONFIG.projector, pyramid="bilinear", levels=(0, 1, 2), pooling="fixed"),
  "deconv": dataclasses.replace(CONFIG.projector, pyramid="deconv", levels=(0, 1), pooling="pyramid"),
  "uhd_v1": dataclasses.replace(CONFIG.projector, kind="uhd_v1", pyramid="none", levels=(0,)),
  "mlp144": dataclasses.replace(CONFIG.projector, kind="mlp144"),
}
OTHERS = [kind for kind in KINDS if kind not in ("hiwin", "uhd_v1")]
GRIDS = np.array([[[8, 8], [3, 16], [0, 0]], [[21, 3], [1, 64], [8, 7]]], np.int32)


def make(kind: str):
  """VDIM's model has a SigLIP tower, the others have CLIP's."""
  vision = dataclasses.replace(CONFIG.vision, **SIGLIP if kind == "hiwin" else {})
  config = dataclasses.replace(CONFIG, projector=KINDS[kind], vision=vision)
  graphdef, flat = parameters.flatten(Mllm(config, rngs=nnx.Rngs(0)))
  # Larger than a fresh model's, so that no part is lost beside another.
  flat = {path: np.asarray(x) * (4 if path.endswith("kernel") and x.ndim > 1 else 1) for path, x in flat.items()}
  return graphdef, flat


def crops(grids: np.ndarray, seed: int = 0, padding: int = 0) -> np.ndarray:
  patches = np.random.default_rng(seed).integers(0, 256, (*grids.shape[:-1], PATCHES, 588), np.uint8)
  beyond = np.arange(PATCHES) >= grids.prod(-1)[..., None]
  patches[beyond] = padding
  return patches


@pytest.mark.parametrize("kind", ["hiwin", "uhd_v1", *(pytest.param(kind, marks=pytest.mark.long) for kind in OTHERS)])
def test_an_image_gets_in_a_mixed_batch_what_it_gets_alone(kind):
  graphdef, flat = make(kind)
  run = released.jit(lambda flat, patches, grids: parameters.unflatten(graphdef, flat).visual_tokens(patches, grids))
  patches, grids = np.concatenate([crops(GRIDS), crops(GRIDS[::-1], 1)]), np.concatenate([GRIDS, GRIDS[::-1]])
  mixed = np.asarray(run(flat, patches[:2], grids[:2])).reshape(2, 3, 16, -1)
  run(flat, patches[2:], grids[2:])
  assert run._cache_size() == 1  # whatever the grids
  assert np.isfinite(mixed).all() and mixed.std() > 1e-3
  for row in range(2):
    for crop in range(3):
      if grids[row, crop].any():
        alone = crops(grids[row : row + 1, crop : crop + 1], padding=255)  # other pixels beyond its end
        used = grids[row, crop].prod()
        alone[0, 0, :used] = patches[row, crop, :used]
        found = np.asarray(run(flat, alone, grids[row : row + 1, crop : crop + 1]))[0]
        np.testing.assert_allclose(found, mixed[row, crop], rtol=0, atol=1e-5 * np.abs(mixed).max())


@pytest.mark.parametrize("kind", ["hiwin", pytest.param("deconv", marks=pytest.mark.long)])
def test_gradients_on_a_mesh_are_those_of_one_device(kind):
  """Gradients of everything, the tower's too: stage 2 of LLaVA-UHD v2 trains it."""
  graphdef, flat = make(kind)
  grids = np.concatenate([GRIDS, GRIDS[:, ::-1]] * 2)
  patches = crops(grids)
  cotangent = np.random.default_rng(2).normal(size=(8, 48, 32)).astype(np.float32)

  def gradient(mesh):
    places = sharding.parameter_shardings(flat, mesh)
    placed = {path: jax.device_put(x, places[path]) for path, x in flat.items()}

    def loss(flat, patches, grids):
      return (parameters.unflatten(graphdef, flat).visual_tokens(patches, grids) * cotangent).sum()

    batch = tuple(jax.device_put(x, jax.NamedSharding(mesh, jax.P(sharding.BATCH_AXES))) for x in (patches, grids))
    with jax.set_mesh(mesh):
      return jax.device_get(released.jit(jax.grad(loss))(placed, *batch))

  expected = gradient(sharding.make_mesh(MeshConfig(), jax.devices()[:1]))
  assert all(np.abs(expected[path]).max() > 0 for path in expected if path.startswith("vision"))
  for path, value in gradient(sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices())).items():
    # Where a bias cancels in a softmax only rounding is left of its gradient, hence the floor.
    bound = 1e-4 * np.abs(expected[path]).max() + 1e-5
    np.testing.assert_allclose(value, expected[path], rtol=0, atol=bound, err_msg=path)


def test_sizes_and_names_of_the_projectors():
  for kind, projector in KINDS.items():
    config = dataclasses.replace(CONFIG, projector=projector)
    assert projectors.tokens_per_crop(config) == 16
    flat = parameters.flatten(abstract(config))[1]
    sharding.parameter_shardings(flat, sharding.make_mesh(MeshConfig(), jax.devices()))
    assert any(path.startswith("projector/resampler/") for path in flat)
    assert any(path.startswith("projector/pyramid/") for path in flat) == (kind in ("hiwin", "deconv", "mlp144"))
  full = dataclasses.replace(ModelConfig(), projector=ProjectorConfig(kind="hiwin"))
  assert projectors.tokens_per_crop(full) == 144
  with pytest.raises(ConfigError, match="projector.kind='hiwi' is unknown; known: spatial, mlp2x_gelu, .*hiwin"):
    abstract(dataclasses.replace(CONFIG, projector=ProjectorConfig(kind="hiwi")))


def test_an_image_that_is_not_that_of_the_features_is_refused():
  projector = projectors.make(CONFIG, nnx.Rngs(0))
  features, patches, grids = (
    np.zeros((1, 2, PATCHES, 16)),
    np.zeros((1, 2, PATCHES, 588)),
    np.zeros((1, 2, 2), np.int32),
  )
  for wrong in ((patches[:, :, 1:], grids), (patches, grids[:, 1:])):
    with pytest.raises(ConfigError, match=r"does not match features of 64 patches in \(1, 2\) crops"):
      projector(features, *wrong)
