"""Model FLOPs against XLA's own count of the same gradient, unrolled and with nothing computed twice."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from mllm_jax import flops, parameters, recipes, sharding
from mllm_jax.batch import Batch
from mllm_jax.compilation import abstract_step, hlo
from mllm_jax.config import (
  DecoderConfig,
  LoraConfig,
  MeshConfig,
  ModelConfig,
  ProjectorConfig,
  VdimStage,
  VisionConfig,
)
from mllm_jax.models.mllm import abstract
from mllm_jax.training import step as step_lib
from mllm_jax.training import vdim_step
from mllm_jax.training.step import loss_and_tokens

# Wide enough for products to be nearly all that XLA counts.
VISION = VisionConfig(image_size=112, patch_size=14, width=256, layers=3, heads=2, mlp_width=1024)
DECODER = DecoderConfig(vocab_size=512, width=512, layers=2, heads=4, kv_heads=2, head_width=128, mlp_width=2048)
SPATIAL = ProjectorConfig(kind="spatial", stride=1, dfi_kernel=4, conv_width=128)
WINDOWS = ProjectorConfig(sfe="windows", window=4, window_strides=(1, 1), dfi_kernel=0, conv_width=512)
TRANSFORMER = ProjectorConfig(sfe="transformer", stride=2, dfi_kernel=0)
LORA = LoraConfig(rank=16, dropout=0.0)
UHD = dict(query_grid=4, head_width=128, pooling="fixed")  # with as many tokens in each window as XLA computes
DECONV = ProjectorConfig(kind="hiwin", pyramid="deconv", levels=(0, 1), **UHD)
VDIM = dataclasses.replace(DECONV, pyramid="vdim")
V1 = ProjectorConfig(kind="uhd_v1", pyramid="none", levels=(0,), organisation="slices", **UHD)
PERCEIVER = dataclasses.replace(DECONV, kind="perceiver")
MLP144 = dataclasses.replace(DECONV, kind="mlp144")
CASES = {
  "spatial, frozen towers": (SPATIAL, LoraConfig(), recipes.parameter_table(1e-3)),
  "spatial, adapters": (SPATIAL, LORA, recipes.parameter_table(1e-3, 1e-3)),
  "spatial_shuffle, frozen towers": (
    dataclasses.replace(SPATIAL, kind="spatial_shuffle"),
    LoraConfig(),
    recipes.parameter_table(1e-3),
  ),
  "windows, frozen towers": (WINDOWS, LoraConfig(), recipes.parameter_table(1e-3)),
  "transformer blocks, frozen towers": (TRANSFORMER, LoraConfig(), recipes.parameter_table(1e-3)),
  "mlp, everything": (ProjectorConfig(kind="mlp2x_gelu"), LoraConfig(), ((".*", 1e-3),)),
  "hiwin on deconvolution, frozen towers": (DECONV, LoraConfig(), recipes.uhd_table(DECONV, 1e-3)),
  "uhd_v1, everything": (V1, LoraConfig(), recipes.uhd_table(V1, 1e-3, vision=1e-3, decoder=1e-3)),
}
LONG = {
  "hiwin on deconvolution, everything": (
    DECONV,
    LoraConfig(),
    recipes.uhd_table(DECONV, 1e-3, vision=1e-3, decoder=1e-3),
  ),
  "hiwin on VDIM, frozen towers": (VDIM, LoraConfig(), recipes.uhd_table(VDIM, 1e-3)),
  "hiwin on VDIM, all but VDIM": (VDIM, LoraConfig(), recipes.uhd_table(VDIM, 1e-3, vision=1e-3, decoder=1e-3)),
  "perceiver on deconvolution, everything": (
    PERCEIVER,
    LoraConfig(),
    recipes.uhd_table(PERCEIVER, 1e-3, vision=1e-3, decoder=1e-3),
  ),
  "mlp144, everything": (MLP144, LoraConfig(), recipes.uhd_table(MLP144, 1e-3, vision=1e-3, decoder=1e-3)),
}
ROWS, PLACES = 2, 128


def make(projector, lora):
  model = ModelConfig(vision=VISION, decoder=DECODER, projector=projector, lora=lora, dtype="float32", remat="none")
  return model, *parameters.flatten(abstract(model))


def make_batch() -> Batch:
  shape = lambda dtype, *dims: jax.ShapeDtypeStruct((ROWS, *dims), dtype)
  ids = ("tokens", "targets", "segment_ids", "positions", "visual_index")
  return Batch(
    **{name: shape(jnp.int32, PLACES) for name in ids},
    loss_weights=shape(jnp.float32, PLACES),
    patches=shape(jnp.uint8, 1, VISION.grid**2, VISION.patch_values),
    grids=shape(jnp.int32, 1, 2),
  )


def xla_count(graphdef, shapes, rates, monkeypatch) -> float:
  with monkeypatch.context() as patched:
    patched.setattr(jax.lax, "scan", functools.partial(jax.lax.scan, unroll=True))
    patched.setattr(jax, "checkpoint", lambda f, **options: f)
    trainable = {path: x for path, x in shapes.items() if rates[path]}
    frozen = {path: x for path, x in shapes.items() if not rates[path]}

    def loss(trainable, frozen, batch):
      return loss_and_tokens(parameters.unflatten(graphdef, {**frozen, **trainable}), batch, None)[0]

    return jax.jit(jax.value_and_grad(loss)).lower(trainable, frozen, make_batch()).cost_analysis()["flops"]


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.long) for case in LONG)])
def test_model_flops_are_xlas(case, monkeypatch):
  projector, lora, table = (CASES | LONG)[case]
  model, graphdef, shapes = make(projector, lora)
  rates = parameters.match(table, list(shapes), "test")
  work = flops.Work(
    tokens=ROWS * PLACES,
    pairs=ROWS * PLACES**2,  # XLA computes the whole square, and masks it
    trained=ROWS * PLACES,
    crops=ROWS,
    patches=ROWS * VISION.grid**2,
    patch_pairs=ROWS * (VISION.grid**2 + 1) ** 2,
    passes=1,
  )
  found = flops.step_flops(model, shapes, rates, work)
  assert found == pytest.approx(xla_count(graphdef, shapes, rates, monkeypatch), rel=0.02)


@pytest.mark.parametrize("inputs", [False, True])
def test_factorised_kernels(inputs):
  """Too little beside a tower for XLA's count of a whole step to tell."""
  light = dataclasses.replace(SPATIAL, sfe="factorised", dfi_kernel=0, depth_multiplier=3)
  model, _, shapes = make(light, LoraConfig())
  rates = dict.fromkeys(shapes, 1e-3) if inputs else parameters.match(recipes.parameter_table(1e-3), list(shapes), "")
  crops = flops.Work(tokens=0, pairs=0, trained=0, crops=5, patches=0, patch_pairs=0)
  without = {path: x for path, x in shapes.items() if not path.startswith("projector/sfe/")}
  found = flops.step_flops(model, shapes, rates, crops) - flops.step_flops(model, without, rates, crops)
  depthwise, pointwise = (4 + 16 + 36 + 64) * 256 * 3, 4 * 256 * 3 * 128
  assert found == 5 * 2 * ((3 if inputs else 2) * depthwise + 3 * pointwise)


@pytest.mark.long
def test_vdims_own_training(monkeypatch):
  """Its loops are counted in the compiled program, whose recomputed rows of pixels are left out by hand."""
  vision = dataclasses.replace(VISION, layers=2)
  stage = VdimStage(batch_size=2, jitters=2, crf_samples=50)
  make = lambda: vdim_step.make_model(vision, VDIM, stage, "float32", nnx.Rngs(0))
  with monkeypatch.context() as patched:
    patched.setattr(jax, "checkpoint", lambda f, **options: f)
    graphdef, shapes = parameters.flatten(nnx.eval_shape(make))
    trainable = {path: x for path, x in shapes.items() if vdim_step.is_trained(path)}
    frozen = {path: x for path, x in shapes.items() if path not in trainable}
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    optimizer = vdim_step.make_optimizer(stage)
    state = jax.eval_shape(lambda t: step_lib.initial_state(optimizer, t, mesh), trainable)
    shardings = step_lib.state_shardings(optimizer, trainable, mesh)
    step = vdim_step.make_step(graphdef, stage, 0, mesh, optimizer, shardings)
    with jax.set_mesh(mesh):
      text = step.lower(state, frozen, abstract_step.image_batch(vision, stage)).compile().as_text()
  executed = hlo.read(text).flops
  assert flops.vdim_flops(vision, stage, shapes, levels=1) == pytest.approx(executed, rel=0.1)
