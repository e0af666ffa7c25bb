"""Model FLOPs against XLA's own count of the same gradient, unrolled and with nothing computed twice."""

import functools

import jax
import jax.numpy as jnp
import pytest

from mllm_jax import flops, parameters, recipes
from mllm_jax.batch import Batch
from mllm_jax.config import DecoderConfig, LoraConfig, ModelConfig, ProjectorConfig, VisionConfig
from mllm_jax.models.mllm import abstract
from mllm_jax.training.step import loss_and_tokens

# Wide enough for products to be nearly all that XLA counts.
VISION = VisionConfig(image_size=112, patch_size=14, width=256, layers=3, heads=2, mlp_width=1024)
DECODER = DecoderConfig(vocab_size=512, width=512, layers=2, heads=4, kv_heads=2, head_width=128, mlp_width=2048)
SPATIAL = ProjectorConfig(kind="spatial", stride=1, dfi_kernel=4, conv_width=128)
LORA = LoraConfig(rank=16, dropout=0.0)
EVERYTHING = ((".*", 1e-3),)
PROJECTOR = recipes.parameter_table(1e-3)
CASES = {
  "spatial, frozen towers": (SPATIAL, LoraConfig(), PROJECTOR),
  "spatial, adapters": (SPATIAL, LORA, recipes.parameter_table(1e-3, 1e-3)),
  "mlp, everything": (ProjectorConfig(kind="mlp2x_gelu"), LoraConfig(), EVERYTHING),
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

    lowered = jax.jit(jax.value_and_grad(loss)).lower(trainable, frozen, make_batch())
    return lowered.compile().cost_analysis()["flops"]


@pytest.mark.parametrize("case", CASES)
def test_model_flops_are_xlas(case, monkeypatch):
  projector, lora, table = CASES[case]
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
