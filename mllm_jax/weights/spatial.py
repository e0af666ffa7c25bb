"""LLaVA-SP's projectors under the names of the released code, every variant made of convolutions.

The final files of a released run are read: `model.bin` of the first stage, `non_lora_trainables.bin` of the second.
"""

from mllm_jax.config import ProjectorConfig
from mllm_jax.models.projectors.spatial import has_head_bias, map_sizes
from mllm_jax.weights import mlp
from mllm_jax.weights.mapping import CONV, Row, Table, linear, norm

GRID_224 = (
  16  # patches along a side of CLIP-L/14 at 224, whose maps the released code counts instead of naming their size
)
MAPS = (
  "the maps have other sizes; compare projector.stride, projector.sizes and projector.maps with the run that made it"
)
DFI = "one of the two has DFI and the other has none, or another conv_width; compare projector.dfi_kernel"
HINTS = (
  (r"conv_\d+\.1\.weight", "a name of the pooling variant; compare projector.maps"),
  (
    r"conv_\d+\.weight",
    "kernels are named by map size; compare projector.maps and projector.stride, and note that an "
    "intermediate mm_projector.bin of the released code lacks most of them: use the run's final file",
  ),
  (r"conv_CM\.weight|(query|key|value)_projector\..*", "a part of DFI; compare projector.dfi_kernel"),
  (r"conv_linear\.1\.bias", "in the released code only cropping with DFI has it; compare projector.head_bias"),
  (r"tfm_.*|query_\d+", "the transformer variant of LLaVA-SP, which is not read here"),
  (
    r"(conv|(query|key|value)_projector)_(small|mid|huge)\..*",
    "the variant with several detail maps, which is not read here",
  ),
  (r"image_newline", "the checkpoint was trained with tiled images, which are not read here"),
)


def kernel_names(config: ProjectorConfig, grid: int) -> tuple[str, ...]:
  """The name of each map's convolution, from the smallest map to the largest.

  A pooled map's convolution stands behind the pooling in a Sequential, and so has `.1` in its name; the whole map is
  not pooled.
  """
  sizes = map_sizes(config, grid)
  if config.maps == "pooling":
    return tuple(f"conv_{size}" if size == grid else f"conv_{size}.1" for size in sizes)
  if grid == GRID_224 and sizes == tuple(range(2, grid + 1, 2)) and not config.dfi_kernel:
    return tuple(f"conv_{number + 1}" for number in range(len(sizes)))
  return tuple(f"conv_{size}" for size in sizes)


def table(config: ProjectorConfig, grid: int) -> Table:
  """The names of the projector `config` over a tower with `grid` patches along a side."""
  rows = [
    Row(f"{name}.weight", f"projector/sfe/kernels/{place}", CONV, MAPS)
    for place, name in enumerate(kernel_names(config, grid))
  ]
  if config.dfi_kernel:
    rows.append(
      Row("conv_CM.weight", "projector/dfi/kernel", CONV, "its DFI has another kernel; compare projector.dfi_kernel")
    )
    for name in ("query", "key", "value"):
      rows += norm(f"{name}_projector.0", f"projector/dfi/{name}_norm")
      rows += linear(f"{name}_projector.1", f"projector/dfi/{name}")
  rows += linear("conv_linear.1", "projector/head", has_head_bias(config), DFI)
  rows += mlp.rows("projector/patch_mlp")
  return Table(tuple(rows), mlp.IGNORED, mlp.RENAMES, HINTS, mlp.PREFIX)
