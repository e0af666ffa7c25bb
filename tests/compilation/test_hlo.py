"""The reader of compiled programs, on programs whose cost is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mllm_jax.chips import V5E
from mllm_jax.compilation import hlo
from mllm_jax.compilation.roofline import roofline


def compiled(function, *shapes, **options) -> str:
  return jax.jit(function, **options).lower(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)).compile().as_text()


def test_products_in_loops_count_as_often_as_they_run():
  def layers(x, kernels):
    return jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, kernels)[0]

  cost = hlo.read(compiled(layers, (8, 32), (7, 32, 32)))
  assert cost.flops == 7 * 2 * 8 * 32 * 32
  stack = 4 * 7 * 32 * 32
  assert stack < cost.bytes < 7 * stack  # a layer reads its own kernel and not the stack of them
  nested = hlo.read(
    compiled(lambda x, k: jax.lax.scan(lambda x, _: (layers(x, k), None), x, None, length=3)[0], (8, 32), (7, 32, 32))
  )
  assert nested.flops == 3 * cost.flops


@pytest.mark.parametrize("options", [{}, {"window_strides": (2, 2)}, {"lhs_dilation": (3, 2)}], ids=str)
def test_convolutions_count_what_is_there(options):
  """Against a direct count: how many products of a kernel's ones with the picture's ones there are."""
  options = {"window_strides": (1, 1), "padding": ((1, 1), (2, 0))} | options
  conv = lambda x, k: jax.lax.conv_general_dilated(x, k, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options)
  text = (
    jax.jit(conv).lower(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in ((2, 7, 9, 3), (3, 4, 3, 5)))).as_text("hlo")
  )
  products = float(conv(jnp.ones((2, 7, 9, 3)), jnp.ones((3, 4, 3, 5))).sum())
  assert hlo.read(text).flops == 2 * products


def test_collectives_of_a_sharded_product():
  mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
  place = lambda *axes: NamedSharding(mesh, P(*axes))
  text = compiled(
    lambda x, k: x @ k, (16, 64), (64, 24), in_shardings=(place(None, "fsdp"), place("fsdp")), out_shardings=place()
  )
  (found,) = hlo.read(text).collectives
  assert (found.kind, found.bytes, found.group, found.crosses, found.times) == ("all-reduce", 4 * 16 * 24, 8, False, 1)
  assert found.sent == pytest.approx(2 * 7 / 8 * 4 * 16 * 24)


@pytest.mark.parametrize(
  "text, size",
  [
    ("replica_groups={{0,2},{1,3}}", 2),
    ("replica_groups=[2,4]<=[4,2]T(1,0)", 4),
    ("replica_groups=[1,8]<=[8]", 8),
    ("replica_groups=mesh['a'=2,'b'=1,'c'=4] {'a'}", 2),
    ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}, x={1}", 8),
    ("source_target_pairs={{0,1},{1,2}}", 2),
  ],
)
def test_size_of_a_group(text, size):
  assert hlo.group_size(text) == size


# As the TPU compiler writes it: a loop whose count stands in its condition, a collective spread over three fusions of
# which one starts it, arrays that lie on the chip, an attention kernel, and a sum over three slices.
TPU = (
  """HloModule step

%start (p.1: bf16[8,128]) -> bf16[16,128] {
  %p.1 = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %g.1 = bf16[16,128]{1,0:T(8,128)(2,1)} all-gather(%p.1), channel_id=9, replica_groups=[1,2]<=[2], CHAINED
  ROOT %c.1 = bf16[16,128]{1,0} custom-call(%g.1), custom_call_target="AsyncCollectiveStart"
}

%done (p.2: bf16[16,128]) -> bf16[16,128] {
  %p.2 = bf16[16,128]{1,0:T(8,128)(2,1)} parameter(0)
  %g.2 = bf16[16,128]{1,0:T(8,128)(2,1)} all-gather(%p.2), channel_id=9, replica_groups=[1,2]<=[2], CHAINED
  ROOT %c.2 = bf16[16,128]{1,0} custom-call(%g.2), custom_call_target="AsyncCollectiveDone"
}

%body (b: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %b = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%b), index=0
  %x = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%b), index=1
  %f.1 = bf16[16,128]{1,0:T(8,128)(2,1)S(1)} fusion(%x), kind=kLoop, calls=%start
  %f.2 = bf16[16,128]{1,0:T(8,128)(2,1)S(1)} fusion(%f.1), kind=kLoop, calls=%done
  %splash_mha_fwd_segmented_residuals.2 = (f32[1], /*index=1*/bf16[1,2,2048,64]{3,2,1,0}) custom-call(%f.2), LAYOUTS
  ROOT %t = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) tuple(%i, %x)
}

%condition (b: (s32[], bf16[8,128])) -> pred[] {
  %b.1 = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%b.1), index=0
  %n = s32[]{:T(128)} constant(32)
  ROOT %less = pred[]{:T(512)} compare(%i.1, %n), direction=LT
}

ENTRY %main (a: bf16[8,128]) -> bf16[8,128] {
  %a = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %start.1 = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) tuple(%zero, %a)
  %s = (bf16[8,128]{1,0:T(8,128)(2,1)}, u32[], token[]) send(%a, %zero), channel_id=2, is_host_transfer=true, MEGASCALE
  %w = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) while(%start.1), condition=%condition, body=%body
  ROOT %r = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%w), index=1
}
""".replace(
    "MEGASCALE", 'frontend_attributes={_xla_megascale_target="{1:3}x{0:1}",_xla_megascale_transfer_type="ALL_REDUCE"}'
  )
  .replace("CHAINED", 'dimensions={0}, frontend_attributes={chain_id="3"}')
  .replace(
    "LAYOUTS",
    'custom_call_target="tpu_custom_call", operand_layout_constraints={s8[1,4,4]{2,1,0}, bf16[1,2,2048,64]{3,2,1,0}, '
    "bf16[1,2,2048,64]{3,2,1,0}, s32[2048,128]{1,0}}",
  )
)


def test_a_program_of_the_tpu_compiler():
  cost = hlo.read(TPU)
  assert cost.collectives == (
    hlo.Collective("all-gather", 16 * 128 * 2, 2, False, 32),
    hlo.Collective("all-reduce", 8 * 128 * 2, 3, True, 1),
  )
  # Four blocks of 512 places: ten of sixteen are at or below the diagonal.
  assert cost.flops == 32 * 2 * 2 * 2 * 2048 * 2048 * 64 * 10 / 16
  assert cost.custom == {}
  assert hlo.read(TPU.replace("splash_", "other_")).custom == {"other_mha_fwd_segmented_residuals": 32}
  # Backward: four products for keys and values, a fifth where the kernel gives the gradient of queries too, by blocks.
  backward = TPU.replace("_fwd_segmented_residuals", "_dkv_segmented_no_residuals")
  assert hlo.read(backward).flops == 2 * cost.flops
  assert hlo.read(backward.replace("(f32[1], ", "(bf16[1,4,2,2048,64]{4,3,2,1,0}, ")).flops == 2.5 * cost.flops


def test_the_slowest_rate_bounds_the_step():
  gather = hlo.Collective("all-gather", 2 * V5E.ici, 2, False, 3)
  line = roofline(hlo.Cost(2 * V5E.flops, V5E.bandwidth, (gather,), {}), V5E, 1.5 * V5E.flops)
  assert (line.compute, line.memory, line.ici, line.dcn) == pytest.approx((2, 1, 3, 0))
  assert (line.bound, line.step, line.mfu) == ("ici", pytest.approx(3), pytest.approx(0.5))
  assert np.isclose(roofline(hlo.Cost(V5E.flops, 0, (), {}), V5E, V5E.flops).mfu, 1)
