"""LLaVA-SP's projectors under the names of the released code.

The final files of a released run are read: `model.bin` of the first stage, `non_lora_trainables.bin` of the second.
"""

import dataclasses
import re
from collections.abc import Mapping

from mllm_jax.config import ProjectorConfig
from mllm_jax.models.projectors.maps import map_sizes
from mllm_jax.models.projectors.sfe_transformer import LAYERS
from mllm_jax.models.projectors.spatial import has_head_bias
from mllm_jax.weights import mlp, parts
from mllm_jax.weights.known import WeightsError
from mllm_jax.weights.tables import CONV, LAST, LAYER, LINEAR, Row, Table, linear, norm

# Patches along a side of CLIP-L/14 at 224, whose maps the released code counts instead of naming their size.
GRID_224 = 16
LISTED = 6  # tensors that an error spells out
MAPS = (
  "the maps have other sizes; compare projector.stride, projector.sizes and projector.maps with the run that made it"
)
WINDOW = "the windows have another size; compare projector.window with the run that made it"
WINDOW_STRIDE = 2  # of the released code's only windows
RELEASED_EXTRACTORS = ("convolution", "windows", "transformer")
DFI = "one of the two has DFI and the other has none, or another conv_width; compare projector.dfi_kernel"
UNREAD = (
  (
    r"(conv|(query|key|value)_projector)_(small|mid|huge)\..*",
    "the variant with several detail maps, which is not read here",
  ),
  (r"conv_\d+\.((?!1\.)\d+\..*|1\.(?!weight).*)", "the variant of stacked small convolutions, which is not read here"),
  *parts.HINTS,
)
HINTS = (
  (r"conv_\d+\.1\.weight", "a name of the pooling variant; compare projector.maps"),
  (
    r"conv_\d+\.weight",
    "kernels are named by map size; compare projector.maps and projector.stride, and note that an "
    "intermediate mm_projector.bin of the released code lacks most of them: use the run's final file",
  ),
  (r"conv_CM\.weight|(query|key|value)_projector\..*", "a part of DFI; compare projector.dfi_kernel"),
  (r"tfm_.*|query_\d+", "a part of the variant with transformer blocks; compare projector.sfe and projector.maps"),
  (r"conv_linear\.1\.bias", "in the released code only cropping with DFI has it; compare projector.head_bias"),
  *UNREAD,
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
  """The names of the projector `config` over a tower with `grid` patches along a side. Raises WeightsError for one that
  the released code has not, or that would mean something else there."""
  check_released(config)
  rows, head = [], "tfm_linear.1" if config.sfe == "transformer" else "conv_linear.1"
  if config.sfe == "transformer":
    rows += transformer_rows(map_sizes(config, grid))
  elif config.sfe == "windows":
    rows.append(Row("conv_CM.weight", "projector/sfe/kernel", CONV, WINDOW))
  else:
    rows += [
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
  rows += linear(head, "projector/head", has_head_bias(config), DFI)
  rows += mlp.rows("projector/patch_mlp")
  rows += mlp.newline(config.image_newline)
  return Table(tuple(rows), mlp.IGNORED, mlp.renames(), HINTS, mlp.PREFIX)


def check_released(config: ProjectorConfig) -> None:
  """Raises WeightsError for a spatial projector that the released code has no names for."""
  if config.sfe not in RELEASED_EXTRACTORS:
    raise WeightsError(
      f"projector.sfe={config.sfe} is none of the released code's, which has no names for it; a folder of ours keeps it"
    )
  if config.sfe == "windows" and (config.dfi_kernel or set(config.window_strides) != {WINDOW_STRIDE}):
    raise WeightsError(
      f"projector.window_strides={config.window_strides}, projector.dfi_kernel={config.dfi_kernel}: the released code "
      f"has windows {WINDOW_STRIDE} patches apart both ways, without DFI, and no names for others; a folder of ours "
      "keeps them"
    )
  if config.sfe == "transformer" and config.maps == "pooling" and config.token_order != "released":
    raise WeightsError(
      f"projector.token_order={config.token_order}: the released code cuts pooled maps into tokens across cells and "
      "channels, so weights of one order mean nothing in the other; projector.token_order=released is read and written"
    )


def transformer_rows(sizes: tuple[int, ...]) -> list[Row]:
  """A transformer for each map, with its layers' three matrices of attention in one tensor."""
  rows = [Row(f"query_{LAYER}", "projector/sfe/queries", LAST, MAPS, places=tuple(map(str, sizes)))]
  parts = {"encoder": ("self_norm", "norm"), "decoder": ("self_norm", "cross_norm", "norm")}
  for place, size in enumerate(sizes):
    for part, norms in parts.items():
      foreign, ours = f"tfm_{size}.{part}", f"projector/sfe/{part}s/{place}"
      layer, stacked = f"{foreign}.layers.{LAYER}", f"{ours}/layers"
      for kind, attention in (("self_attention", "self_attn"), ("cross_attention", "multihead_attn"))[: len(norms) - 1]:
        for third, name in enumerate(("q_proj", "k_proj", "v_proj")):
          packed = f"{layer}.{attention}.in_proj_weight"
          rows.append(Row(packed, f"{stacked}/{kind}/{name}/kernel", LINEAR, part=(third, 3)))
        rows += linear(f"{layer}.{attention}.out_proj", f"{stacked}/{kind}/out_proj", bias=False)
      for number in (1, 2):
        rows += linear(f"{layer}.linear{number}", f"{stacked}/fc{number}", bias=False)
      rows += [Row(f"{layer}.norm{number + 1}.weight", f"{stacked}/{name}/scale") for number, name in enumerate(norms)]
      rows.append(Row(f"{foreign}.norm.weight", f"{ours}/norm/scale"))
  return rows


def recognise(
  shapes: Mapping[str, tuple[int, ...]], grid: int, where: str = "the checkpoint", maps: str = ""
) -> ProjectorConfig:
  """The configuration of the projector whose tensors a released file or a whole checkpoint holds.

  Args:
    shapes: {name: shape} of all tensors, under any of the prefixes that `table` reads.
    grid: patches along a side of the tower it belongs to.
    where: the file, for errors.
    maps: "cropping" or "pooling" for transformer blocks, whose names are the same for both; "" for every other variant.

  A single map that is the whole grid counts as a crop: pooled it would compute the same. Raises WeightsError that names
  the tensors no variant has, or where there are none at all, or where `maps` is missing or out of place.
  """
  plain = mlp.table()
  renamed = {plain.rename(name): tuple(shape) for name, shape in shapes.items()}
  of_others = lambda name: any(re.fullmatch(pattern, name) for pattern, _ in plain.ignored)
  found = {name: shape for name, shape in renamed.items() if not of_others(name)}
  if not found:
    raise WeightsError(
      f"{where} holds no tensor of a projector; name the final mm_projector.bin, model.bin or non_lora_trainables.bin "
      "of a run"
    )
  tiled = found.get(parts.NEWLINE) is not None
  config, rows = ProjectorConfig(kind="mlp2x_gelu", image_newline=tiled), mlp.table(image_newline=tiled).rows
  if any(not name.startswith("mm_projector.") for name in found if name != parts.NEWLINE):
    config = spatial_config(found, grid) or window_config(found, grid) or transformer_config(found, grid, maps, where)
    config = config and dataclasses.replace(config, image_newline=tiled)
    rows = table(config, grid).rows if config else plain.rows
  if maps and (config is None or config.sfe != "transformer"):
    raise WeightsError(f"{where} is no variant with transformer blocks; its names tell its maps, so leave out {maps!r}")
  names = {row.name(layer) for row in rows for layer in range(len(row.places) or (LAYERS if row.stacked else 1))}
  hint_of = lambda name: "".join(f" ({text})" for pattern, text in UNREAD if re.fullmatch(pattern, name))
  misfits = [f"{name} {shape}{hint_of(name)}" for name, shape in found.items() if name not in names]
  if misfits or config is None:
    more = f"; and {len(misfits) - LISTED} more" if len(misfits) > LISTED else ""
    raise WeightsError(
      f"{where} holds the projector of no variant that is read for a grid of {grid}: "
      f"{'; '.join(misfits[:LISTED])}{more}"
    )
  return config


def spatial_config(found: Mapping[str, tuple[int, ...]], grid: int) -> ProjectorConfig | None:
  """The variant whose names come closest to those found, None where no map is among them."""

  def kernels(pattern: str) -> dict[int, tuple[int, ...]]:
    matches = {re.fullmatch(pattern, name): shape for name, shape in found.items() if len(shape) == 4}
    return {int(match[1]): shape for match, shape in matches.items() if match}

  pooled, cropped = kernels(r"conv_(\d+)\.1\.weight"), kernels(r"conv_(\d+)\.weight")
  detail = found.get("conv_CM.weight", ())
  dfi_kernel = detail[2] if len(detail) == 4 and 1 <= detail[2] == detail[3] <= grid else 0
  series = range(2, grid + 1, 2)
  counted = {number + 1: size for number, size in enumerate(series)}
  if grid == GRID_224 and not dfi_kernel and {number: shape[2] for number, shape in cropped.items()} == counted:
    sizes = tuple(series)
  else:
    maps = pooled | {size: shape for size, shape in cropped.items() if not pooled or size == grid}
    centred = lambda size: bool(pooled) or (grid - size) % 2 == 0
    fits = lambda size, shape: 1 <= size <= grid and shape[2:] == (size, size) and centred(size)
    sizes = tuple(sorted(size for size, shape in maps.items() if fits(size, shape)))
  if not sizes:
    return None
  config = ProjectorConfig(
    maps="pooling" if pooled else "cropping",
    dfi_kernel=dfi_kernel,
    conv_width=next(iter((pooled | cropped).values()))[0],
    **sizes_of(sizes, grid),
  )
  biased = "conv_linear.1.bias" in found
  if has_head_bias(config) == biased:
    return config
  return dataclasses.replace(config, head_bias="always" if biased else "never")


def window_config(found: Mapping[str, tuple[int, ...]], grid: int) -> ProjectorConfig | None:
  """The variant of windows under one kernel, which DFI's kernel is called like; None where it is something else."""
  kernel, head = found.get("conv_CM.weight", ()), found.get("conv_linear.1.weight", ())
  if len(kernel) != 4 or not 1 <= kernel[2] == kernel[3] <= grid or head[1:] != kernel[:1]:
    return None
  strides = (WINDOW_STRIDE, WINDOW_STRIDE)
  return ProjectorConfig(sfe="windows", window=kernel[2], window_strides=strides, dfi_kernel=0, conv_width=kernel[0])


def transformer_config(
  found: Mapping[str, tuple[int, ...]], grid: int, maps: str, where: str
) -> ProjectorConfig | None:
  """The variant of transformer blocks, None where there are no queries of its."""
  sizes = tuple(sorted(int(match[1]) for name in found if (match := re.fullmatch(r"query_(\d{1,4})", name))))
  if not sizes or sizes[0] < 1 or sizes[-1] > grid:
    return None
  if maps not in ("cropping", "pooling"):
    raise WeightsError(
      f"{where} has transformer blocks, whose names are the same for cropping and pooling; say which it was trained "
      "with (--maps=cropping or --maps=pooling)"
    )
  if maps == "cropping" and any((grid - size) % 2 for size in sizes):
    return None
  return ProjectorConfig(sfe="transformer", maps=maps, token_order="released", dfi_kernel=0, **sizes_of(sizes, grid))


def sizes_of(sizes: tuple[int, ...], grid: int) -> dict[str, int | tuple[int, ...]]:
  """The fields of `ProjectorConfig` that give these maps."""
  stride = sizes[0] // 2
  regular = stride > 0 and sizes == tuple(range(2 * stride, grid + 1, 2 * stride))
  return {"stride": stride} if regular else {"sizes": sizes}
