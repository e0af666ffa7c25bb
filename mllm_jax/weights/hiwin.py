"""LLaVA-UHD v2's projector, VDIM and Hiwin attention, under the names of the released code; and its predecessor's, the
resampler that the same code compares it with.

The class of v2 has the weights of all four levels and of older kinds of attention, whichever are in use; `placeholders`
makes those for it that a model here has not.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from mllm_jax.config import ConfigError, ProjectorConfig
from mllm_jax.weights import mlp, parts
from mllm_jax.weights.known import WeightsError
from mllm_jax.weights.tables import CONV_1X1, LAST, LINEAR, SAME, Row, Table, linear, norm
from mllm_jax.weights.tensors import Tensors

STEM = "mm_projector."
PYRAMID, ATTENTION = "projector/pyramid", "projector/resampler/attention"
RELEASED_LEVELS = 4  # that its class has projections and embeddings for
RELEASED_MASK = "feature_scale_mask"  # in config.json: 1, 2, 4 and 8 stand for the levels 0 to 3
ORGANISATION, SEPARATORS = "slice_organisation", "slice_separators"  # in config.json, by us; the released code has none
ORGANISATIONS, SEPARATOR_KINDS = ("slices", "spatial"), ("released", "text")  # the released code's own first
# mm_projector_type by the windows along each side.
TYPES = {8: "adapt_spatial_resampler_v2_64", 12: "adapt_spatial_resampler_v2", 16: "adapt_spatial_resampler_v2_256"}
V1_TYPES = {8: "uhd_v1_query64", 12: "adapt_spatial_resampler_v1"}
HEAD_WIDTH = 128
QUERY_SETS = ("1", "2", "3", "4")
INIT_STDDEV = 0.02  # of the released class
LISTED = 6  # tensors that a note spells out
LEVELS = "VDIM has as many stages as the highest level that it was trained for; compare projector.levels"
GRID = "the number of windows, or the decoder's width, is another; compare projector.query_grid"


def is_released(names: Iterable[str]) -> bool:
  """Whether names of a checkpoint are of these projectors, behind whichever prefix."""
  own = rf"{parts.OUTER}mm_projector\.(query_1|features_1x_projector\..*|attn\.in_proj_weight)"
  return any(re.fullmatch(own, name) for name in names)


def types(config: ProjectorConfig) -> Mapping[int, str]:
  """mm_projector_type by the windows along each side."""
  return V1_TYPES if config.kind == "uhd_v1" else TYPES


# ---- tables ----------------------------------------------------------------------------------------------------------


def vdim_rows(levels: int, prefix: str) -> tuple[Row, ...]:
  """VDIM of so many stages, whose names begin with `prefix`."""
  rows: list[Row] = []
  for stage in range(levels):
    foreign, ours = f"{prefix}up{stage + 1}", f"{PYRAMID}/stages/{stage}"
    rows += (Row(f"{foreign}.{name}", f"{ours}/{name}") for name in ("range_temp", "sigma_spatial"))
    for network, name in (("range_proj", "range_proj"), ("fixup_proj", "fixup")):
      for place, layer in enumerate((0, 3)):  # an activation and dropout stand between the two
        rows += linear(f"{foreign}.{network}.{layer}", f"{ours}/{name}/{place}", transform=CONV_1X1)
  # With three stages what each gives is corrected, else only the last.
  for stage in range(levels) if levels == 3 else (levels - 1,):
    name = f"fixup_proj_{2 ** (stage + 1)}x" if levels == 3 else "fixup_proj"
    rows += linear(f"{prefix}{name}.1", f"{PYRAMID}/fixup_proj/{stage}", transform=CONV_1X1)
  return tuple(rows)


def vdim_levels(names: Iterable[str]) -> int:
  """How many stages the VDIM has whose renamed weights are among `names`, 0 without one."""
  found = {match[1] for name in names if (match := re.search(r"(?:^|\.)upsampler\.up(\d+)\.range_temp$", name))}
  return len(found)


def table(config: ProjectorConfig) -> Table:
  """The names of the projector `config`. Raises WeightsError for pyramids that the released code has not."""
  v1 = config.kind == "uhd_v1"
  if not v1 and (config.kind != "hiwin" or config.pyramid not in ("vdim", "none")):
    raise WeightsError(
      f"projector.kind={config.kind!r} with projector.pyramid={config.pyramid!r}: the released code of LLaVA-UHD v2 "
      "has no names for it; they are known for uhd_v1, and for hiwin with vdim or none"
    )
  rows = [*(v1_rows() if v1 else v2_rows(config)), Row(f"{STEM}pos_embed", f"{ATTENTION}/pos_embed", hint=GRID)]
  for part, name in enumerate(("q_proj", "k_proj", "v_proj")):
    for kind, ours, transform in (("weight", "kernel", LINEAR), ("bias", "bias", SAME)):
      rows.append(Row(f"{STEM}attn.in_proj_{kind}", f"{ATTENTION}/{name}/{ours}", transform, part=(part, 3)))
  rows += linear(f"{STEM}attn.out_proj", f"{ATTENTION}/out_proj")
  rows += norm(f"{STEM}ln_q", f"{ATTENTION}/query_norm") + norm(f"{STEM}ln_kv", f"{ATTENTION}/key_norm")
  rows += norm(f"{STEM}ln_post", "projector/resampler/out_norm")
  rows.append(Row(f"{STEM}proj", "projector/resampler/proj/kernel"))  # multiplied from the right there too
  rows += mlp.newline(config.image_newline)
  hints = ((re.escape(STEM) + r"upsampler\.upsampler\..*", LEVELS), *parts.HINTS)
  return Table(tuple(rows), (*unused(config), *mlp.IGNORED), mlp.renames(), hints, mlp.PREFIX)


def v1_rows() -> tuple[Row, ...]:
  """What only the predecessor has: one set of queries, and the tower's own map."""
  queries = Row(f"{STEM}query{{layer}}", f"{ATTENTION}/queries", hint=GRID, places=("",))  # ours are a stack of one
  return queries, *linear(f"{STEM}kv_proj", f"{ATTENTION}/level_projectors/0", bias=False)


def v2_rows(config: ProjectorConfig) -> tuple[Row, ...]:
  """What only LLaVA-UHD v2 has: VDIM, four sets of queries with what merges them, and several levels."""
  rows = [*vdim_rows(max(config.levels), f"{STEM}upsampler.upsampler.")] if config.pyramid == "vdim" else []
  names = tuple(str(2**level) for level in config.levels)
  rows += [
    Row(f"{STEM}query_{{layer}}", f"{ATTENTION}/queries", hint=GRID, places=QUERY_SETS),
    Row(f"{STEM}feature_{{layer}}x_embedding", f"{ATTENTION}/level_embeddings", LAST, places=names),
  ]
  for index, name in enumerate(names):
    rows += linear(f"{STEM}features_{name}x_projector", f"{ATTENTION}/level_projectors/{index}")
  rows += norm(f"{STEM}ln_proj", "projector/resampler/set_norm")
  rows += linear(f"{STEM}cat_proj", "projector/resampler/merge")
  return tuple(rows)


def unused(config: ProjectorConfig) -> tuple[tuple[str, str], ...]:
  """What the released class has and does not compute with, and why: (regular expression of the name, reason)."""
  if config.kind == "uhd_v1":
    return ()
  stem = re.escape(STEM)
  others = "|".join(str(2**level) for level in range(RELEASED_LEVELS) if level not in config.levels)
  found = [
    (rf"{stem}(query|kv_proj\.weight)", "of the attention before LLaVA-UHD v2's, which its class still builds"),
    (rf"{stem}upsampler\.model\.1\.norm\..*", "a norm of VDIM's own training"),
    (rf"{stem}upsampler\.model\.0\..*", "a copy of the tower, of VDIM's own training"),
  ]
  if others:
    found.append((rf"{stem}(features_({others})x_projector\..*|feature_({others})x_embedding)", "of levels not in use"))
  if config.pyramid == "none":
    found.append((rf"{stem}upsampler\.upsampler\..*", "VDIM, and no level above the tower's is in use"))
  elif max(config.levels) == 3:
    found.append(
      (rf"{stem}upsampler\.upsampler\.fixup_proj\.1\..*", "a correction that VDIM of three stages does not use")
    )
  return tuple(found)


def notes(names: Iterable[str], config: ProjectorConfig) -> tuple[str, ...]:
  """What of a released checkpoint is left out, and why, as sentences."""
  rename, left = table(config).rename, {}
  for name in map(rename, names):
    for pattern, reason in unused(config):
      if re.fullmatch(pattern, name):
        left.setdefault(reason, []).append(name.removeprefix(STEM))
        break
  found = []
  for reason, tensors in left.items():
    more = f" and {len(tensors) - LISTED} more" if len(tensors) > LISTED else ""
    found.append(f"left out: {', '.join(sorted(tensors)[:LISTED])}{more} ({reason})")
  return tuple(found)


# ---- recognising -----------------------------------------------------------------------------------------------------


def recognise(weights: Tensors, content: Mapping[str, Any], where: str) -> ProjectorConfig:
  """The configuration of the projector in a released checkpoint.

  Args:
    weights: the checkpoint, with the released names behind any prefix.
    content: of the config.json beside it, {} without one: then the levels in use are told by their embeddings, which
      begin as zeros and stay so where nothing is trained.
    where: that file, for errors.

  The code that writes `feature_scale_mask` lays out slices one after another and separates them by Llama's tokens;
  config.json may say otherwise by slice_organisation and slice_separators. Raises WeightsError for what no such
  projector has.
  """
  shapes = {mlp.table().rename(name): weights.shape(name) for name in weights.names()}
  positions = shapes.get(f"{STEM}pos_embed", ())
  grid = math.isqrt(positions[0]) if positions else 0
  if len(positions) != 2 or grid**2 != positions[0] or not grid:
    raise WeightsError(
      f"{where}: its pos_embed is {positions or 'missing'}; read are tables of g x g windows, (g * g, width)"
    )
  if positions[1] % HEAD_WIDTH:
    raise WeightsError(f"{where}: its width is {positions[1]}, and the released attention has heads of {HEAD_WIDTH}")
  v1, mask = f"{STEM}query_1" not in shapes, content.get(RELEASED_MASK)
  if v1:
    levels = (0,)
  elif mask is None:
    levels = trained_levels(weights, vdim_levels(shapes))
  elif type(mask) is int and 0 < mask < 2**RELEASED_LEVELS:
    levels = tuple(level for level in range(RELEASED_LEVELS) if mask >> level & 1)
  else:
    raise WeightsError(
      f"{where}: {RELEASED_MASK}={mask!r} must be from 1 to 15, the sum of 1, 2, 4, 8 for levels 0 to 3"
    )
  layout = {}
  for field, key, known in (("organisation", ORGANISATION, ORGANISATIONS), ("separators", SEPARATORS, SEPARATOR_KINDS)):
    layout[field] = content.get(key, known[0])
    if layout[field] not in known:
      raise WeightsError(f"{where}: {key}={layout[field]!r} is unknown; known: {', '.join(known)}")
  config = ProjectorConfig(kind="uhd_v1" if v1 else "hiwin", query_grid=grid, head_width=HEAD_WIDTH, **layout)
  return with_levels(config, levels, weights, where)


def trained_levels(weights: Tensors, above: int) -> tuple[int, ...]:
  """The levels that a checkpoint without config.json was trained with; before any training, those of the released
  scripts, the lowest and the highest."""
  found = []
  for name in weights.names():
    match = re.search(r"mm_projector\.feature_([1248])x_embedding$", name)
    level = int(match[1]).bit_length() - 1 if match else RELEASED_LEVELS
    if level <= above and np.any(weights.read(name)):
      found.append(level)
  return tuple(sorted(found)) or tuple(sorted({0, above}))


def with_levels(config: ProjectorConfig, levels: tuple[int, ...], weights: Tensors, where: str) -> ProjectorConfig:
  """`config` with other levels. Raises WeightsError where the checkpoint's VDIM is not for them."""
  if not levels or list(levels) != sorted(set(levels)) or not set(levels) <= set(range(RELEASED_LEVELS)):
    raise WeightsError(f"levels {levels} must be some of 0 to {RELEASED_LEVELS - 1}, in order")
  found, needed = vdim_levels(weights.names()), levels[-1]
  if needed and found != needed:
    raise WeightsError(f"{where}: its VDIM has {found} levels above the tower's, and levels {levels} need {needed}")
  return dataclasses.replace(config, levels=levels, pyramid="vdim" if needed else "none")


def check_widths(weights: Tensors, vision_width: int, width: int, where: str) -> None:
  """Raises WeightsError where a released projector stands between towers of other widths than these."""
  rename = mlp.table().rename
  kernel = re.compile(rf"{re.escape(STEM)}(features_\dx_projector|kv_proj)\.weight")
  for name in weights.names():
    shape = weights.shape(name)
    if len(shape) == 2 and kernel.fullmatch(rename(name)) and shape != (width, vision_width):
      raise WeightsError(
        f"{where}: the projector leads from features of width {shape[1]} to a decoder of width {shape[0]}, and here "
        f"the tower's are {vision_width} wide and the decoder is {width}; it is of another model"
      )


# ---- for export ------------------------------------------------------------------------------------------------------


def fields(config: ProjectorConfig) -> dict[str, Any]:
  """What config.json says of the projector. Raises ConfigError where the released code computes something else."""
  v1 = config.kind == "uhd_v1"
  wrong = [
    f"{name}={getattr(config, name)!r}"
    for name, accepted in (
      ("kind", ("hiwin", "uhd_v1")),
      ("pyramid", (config.pyramid,) if v1 else ("vdim", "none")),
      ("query_grid", tuple(types(config))),
      ("pooling", ("selective",)),
      ("head_width", (HEAD_WIDTH,)),
    )
    if getattr(config, name) not in accepted
  ]
  if wrong:
    raise ConfigError(f"projector: the released code of LLaVA-UHD v2 has no {', '.join(wrong)}, and cannot be told")
  return {
    "mm_projector_type": types(config)[config.query_grid],
    **({} if v1 else {RELEASED_MASK: sum(2**level for level in config.levels)}),
    ORGANISATION: config.organisation,
    SEPARATORS: config.separators,
  }


def placeholders(config: ProjectorConfig, vision_width: int, width: int) -> dict[str, np.ndarray]:
  """The tensors that the released class has and a model here has not, as it initialises them: {name: float32}."""
  if config.kind == "uhd_v1":
    return {}
  draw = np.random.default_rng(0)
  normal = lambda *shape: draw.normal(0, INIT_STDDEV, shape).astype(np.float32)
  zeros = lambda *shape: np.zeros(shape, np.float32)
  found = {"query": normal(config.query_grid**2, width)}
  if vision_width != width:
    found["kv_proj.weight"] = normal(width, vision_width)
  for level in range(RELEASED_LEVELS):
    if level not in config.levels:
      found[f"feature_{2**level}x_embedding"] = zeros(1, 1, width)
      found[f"features_{2**level}x_projector.weight"] = normal(width, vision_width)
      found[f"features_{2**level}x_projector.bias"] = zeros(width)
  if config.pyramid == "vdim":
    found |= {
      "upsampler.model.1.norm.weight": zeros(vision_width) + 1,
      "upsampler.model.1.norm.bias": zeros(vision_width),
    }
  if max(config.levels) == 3:
    found["upsampler.upsampler.fixup_proj.1.weight"] = normal(vision_width, vision_width, 1, 1)
    found["upsampler.upsampler.fixup_proj.1.bias"] = zeros(vision_width)
  return {STEM + name: array for name, array in found.items()}
