"""Model FLOPs: what a training step must compute, whatever is made again to save memory or computed for padding.

A product of n rows with a matrix of N numbers is 2 n N on the way forward, 2 n N for the gradient of the rows where
something before them is trained, and 2 n N for that of the matrix where it is trained itself. So a frozen decoder
behind a trained projector costs 4 N a token, an adapter 6 N, a frozen tower 2 N. Causal attention counts the pairs of
tokens that see each other, about half of a square; a vocabulary's logits count where they are trained on. Norms,
activations and softmax are left out, as is customary: they are no products.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mllm_jax.batch import Batch
from mllm_jax.config import ModelConfig, ProjectorConfig, VdimStage, VisionConfig
from mllm_jax.models.projectors.convnext import STAGES
from mllm_jax.models.projectors.hiwin import QUERY_SETS
from mllm_jax.models.projectors.maps import map_sizes, spatial_tokens
from mllm_jax.models.projectors.pixel_shuffle import SIDE as SHUFFLED_SIDE
from mllm_jax.models.projectors.sfe_transformer import LAYERS
from mllm_jax.models.projectors.spatial import DFI_STRIDE
from mllm_jax.models.projectors.vdim import KEY_WIDTH, TAPS
from mllm_jax.models.projectors.windows import SIDE


@dataclasses.dataclass(frozen=True)
class Work:
  """What is in the batches of a step, padding left out.

  tokens: of the decoder, visual ones included. pairs: of tokens of which the later sees the earlier or itself. trained:
  tokens that are predicted. crops, patches: of images. patch_pairs: of patches, class token included, that see each
  other in the tower. passes: micro-batches, in each of which the any-aspect projectors fold their matrices anew.
  """

  tokens: float
  pairs: float
  trained: float
  crops: float
  patches: float
  patch_pairs: float
  passes: int = 1


def work_of(batch: Batch, vision: VisionConfig, window: int = 0) -> Work:
  """Of a host batch [A, B, ...] of numpy arrays. Positions restart in every sample, so they count the pairs, as far as
  the decoder's sliding `window` lets tokens see each other."""
  real = batch.segment_ids > 0
  patches = np.prod(np.asarray(batch.grids, np.int64), axis=-1)
  seen = np.where(patches > 0, patches + vision.class_token, 0)
  return Work(
    tokens=float(real.sum()),
    pairs=float((np.minimum(batch.positions + 1, window or batch.tokens.shape[-1]) * real).sum(dtype=np.int64)),
    trained=float((batch.loss_weights > 0).sum()),
    crops=float((patches > 0).sum()),
    patches=float(patches.sum()),
    patch_pairs=float(np.square(seen).sum()),
    passes=len(batch.tokens),
  )


def full_work(batch: Any, vision: VisionConfig, window: int = 0) -> Work:
  """Of a batch of these shapes [A, B, ...] without padding, where every token is predicted and every crop is used."""
  rows, places = math.prod(batch.tokens.shape[:2]), batch.tokens.shape[2]
  crops, patches = rows * batch.patches.shape[2], vision.grid**2
  seen = min(window or places, places)
  return Work(
    tokens=rows * places,
    pairs=rows * (seen * (seen + 1) / 2 + (places - seen) * seen),
    trained=rows * places,
    crops=crops,
    patches=crops * patches,
    patch_pairs=crops * (patches + vision.class_token) ** 2,
    passes=batch.tokens.shape[0],
  )


# Rows that a kernel is multiplied with, and whether they come straight from the tower.
FEATURES, BEHIND = True, False
ROWS = (
  (r"projector/sfe/(kernels|depthwise)/\d+", FEATURES, lambda s: s.crops),
  (r"projector/sfe/pointwise/\d+/kernel", BEHIND, lambda s: s.crops),
  (r"projector/sfe/kernel", FEATURES, lambda s: s.crops * s.spatial),
  (r"projector/dfi/kernel", FEATURES, lambda s: s.crops * s.details),
  (r"projector/dfi/query/kernel", BEHIND, lambda s: s.crops * s.spatial),
  (r"projector/dfi/(key|value)/kernel", BEHIND, lambda s: s.crops * s.details),
  (r"projector/head/kernel", BEHIND, lambda s: s.crops * s.spatial),
  (r"projector/(patch_mlp/)?fc1/kernel", FEATURES, lambda s: s.patches),
  (r"projector/(patch_mlp/)?fc2/kernel", BEHIND, lambda s: s.patches),
  (r"projector/(patch_mlp/)?(in|out)_proj/kernel", BEHIND, lambda s: s.patches / SHUFFLED_SIDE**2),
  (r"projector/resampler/fc[12]/kernel", BEHIND, lambda s: s.crops * s.windows),
  (r"projector/resampler/(attention/)?q_proj/kernel", BEHIND, lambda s: s.passes * s.sets * s.windows),
  (r"projector/resampler/attention/k_proj/kernel", BEHIND, lambda s: s.passes * (s.folded + s.windows)),
  (r"projector/resampler/attention/v_proj/kernel", BEHIND, lambda s: s.passes * s.folded),
  (r"projector/resampler/kv_proj/kernel", FEATURES, lambda s: s.crops * s.cells),
  (r"projector/resampler/[kv]_proj/kernel", BEHIND, lambda s: s.crops * s.cells),
  (r"projector/resampler/(attention/)?out_proj/kernel", BEHIND, lambda s: s.crops * s.windows * s.sets),
  (r"projector/resampler/(merge|proj)/kernel", BEHIND, lambda s: s.crops * s.windows),
)


class _Sizes:
  """How many rows there are of everything that a projector makes in a step."""

  def __init__(self, projector: ProjectorConfig, vision: VisionConfig, work: Work):
    self.crops, self.patches, self.passes = work.crops, work.patches, work.passes
    self.maps = []  # cells of each map that a transformer looks at
    if projector.kind in ("spatial", "spatial_shuffle"):
      self.spatial = spatial_tokens(projector, vision.grid)
      if projector.sfe == "transformer":
        self.maps = [size**2 for size in map_sizes(projector, vision.grid)]
      along = (vision.grid - projector.dfi_kernel) // DFI_STRIDE + 1
      self.details = along**2 if projector.dfi_kernel else 0
    self.windows = projector.query_grid**2
    self.sets = QUERY_SETS if projector.kind == "hiwin" else 1
    self.levels = projector.levels if projector.kind == "hiwin" else (0,)
    self.cells = sum(4**level * vision.grid**2 for level in projector.levels)  # that a perceiver's queries attend to
    self.folded = len(self.levels) * (vision.width + 2)  # rows of the matrices that keys and values are folded into


def step_flops(model: ModelConfig, shapes: Mapping[str, Any], rates: Mapping[str, float], work: Work) -> float:
  """FLOPs of a step. shapes: every parameter by path; rates: its learning rate, 0 where it is frozen."""
  return sum(part_flops(model, shapes, rates, work).values())


def part_flops(
  model: ModelConfig, shapes: Mapping[str, Any], rates: Mapping[str, float], work: Work
) -> dict[str, float]:
  """The same by part: "vision", "projector", "decoder"."""
  trains = lambda start: any(rate for path, rate in rates.items() if path.startswith(start))
  vision, projector, adapters = trains("vision/"), trains("projector/"), trains("decoder/")
  convnext = trains("projector/pyramid/convnext/")
  sizes = _Sizes(model.projector, model.vision, work)
  seen = work.patches + work.crops * model.vision.class_token
  total = dict.fromkeys(("vision", "projector", "decoder"), 0.0)
  for path, x in shapes.items():
    if path.startswith("projector/pyramid/"):
      rows, inputs = _pyramid_rows(path, work), convnext or vision
    elif path.startswith("projector/sfe/") and "/layers/" in path:
      rows, inputs = _block_rows(path, sizes) * path.endswith("/kernel"), vision or projector
    elif path.startswith("projector/"):
      found = [row for row in ROWS if re.fullmatch(row[0], path)]
      rows = found[0][2](sizes) if found else 0
      inputs = vision or (projector and bool(found) and found[0][1] is BEHIND)
    elif path.startswith("vision/"):
      # What is trained first has nothing before it.
      rows, inputs = (
        (seen if "/layers/" in path else work.patches) * path.endswith("/kernel"),
        vision and "/layers/" in path,
      )
    else:
      inputs = vision or projector or adapters
      rows = work.tokens * bool(re.fullmatch(r"decoder/layers/.*(/kernel|/lora/[ab])", path))
      if path == "decoder/head" or (path == "decoder/embedding" and model.decoder.tied_embeddings):
        rows = work.trained
    total[path.partition("/")[0]] += 2 * rows * math.prod(x.shape) * (1 + bool(rates[path]) + inputs)
  query_width = model.decoder.heads * model.decoder.head_width
  total["decoder"] += (
    4 * work.pairs * model.decoder.layers * query_width * (3 if vision or projector or adapters else 1)
  )
  total["vision"] += 4 * work.patch_pairs * model.vision.layers_used * model.vision.width * (3 if vision else 1)
  if sizes.maps:
    total["projector"] += _block_flops(sizes, model.vision.width) * (3 if vision or projector else 1)
  if model.projector.any_aspect:
    if model.projector.pyramid == "convnext":
      total["vision"] = 0.0  # nothing looks at the tower's features, and the compiler leaves them out
    total["projector"] += _pyramid_flops(
      model.projector, model.vision.width, work, trains("projector/pyramid/"), vision
    ) + _window_flops(model, sizes, trains("projector/resampler/"), vision)
  return total


def counter(model: ModelConfig, shapes: Mapping[str, Any], rates: Mapping[str, float]) -> Callable[[Any], float]:
  """The function that tells the FLOPs of a host batch, or of several of different lengths, quickly: FLOPs are linear in
  the work."""
  names = [field.name for field in dataclasses.fields(Work)]
  nothing = dict.fromkeys(names, 0.0)
  costs = [step_flops(model, shapes, rates, Work(**nothing | {name: 1.0})) for name in names]

  def count(batches: Any) -> float:
    micro_batches = batches if isinstance(batches, tuple) else (batches,)
    works = [work_of(batch, model.vision, model.decoder.sliding_window) for batch in micro_batches]
    return sum(cost * amount for work in works for cost, amount in zip(costs, dataclasses.astuple(work)))

  return count


def vdim_flops(vision: VisionConfig, stage: VdimStage, shapes: Mapping[str, Any], levels: int) -> float:
  """FLOPs of a step of VDIM's own training. The tower sees each image and its views; of each view VDIM is applied and
  its maps are brought to pixels and pooled, one matrix along each axis."""
  images, views = stage.batch_size, stage.batch_size * stage.jitters
  patches, places, side = vision.grid**2, vision.grid**2 + vision.class_token, vision.grid * vision.patch_size
  total = 4.0 * (images + views) * places**2 * vision.layers_used * vision.width
  work = Work(0, 0, 0, views, views * patches, 0)
  for path, x in shapes.items():
    if path.startswith("vision/") and path.endswith("/kernel"):
      total += 2 * (images + views) * (places if "/layers/" in path else patches) * math.prod(x.shape)
    elif path.startswith("projector/pyramid/"):
      total += 3 * 2 * _pyramid_rows(path, work) * math.prod(x.shape)
  total += sum(
    _upsampling_flops(level, vision.width, views * patches) * (2 + (level > 1 and stage.supervision == "last"))
    for level in range(1, levels + 1)
  )
  for level in range(1, levels + 1) if stage.supervision == "all" else (levels,):
    cells = vision.grid * 2**level
    to_pixels = 2 * vision.width * side * cells * (cells + side)
    pooled = 2 * 2 * vision.width * side**2  # saliency and weighted sum
    total += views * (2 * to_pixels + 3 * pooled)
    sampled = 2 * stage.crf_samples * (stage.projected or vision.width) * (cells**2 + cells + stage.crf_samples)
    total += 2 * images * sampled
  return total


def _block_rows(path: str, s: _Sizes) -> float:
  """Rows that a kernel of a transformer SFE's layers is multiplied with: a map's cells, or the decoder's one query."""
  part, number = re.match(r"projector/sfe/(encoders|decoders)/(\d+)/", path).groups()
  cells = part == "encoders" or re.search(r"/cross_attention/[kv]_proj/", path)
  return s.crops * (s.maps[int(number)] if cells else 1)


def _block_flops(s: _Sizes, width: int) -> float:
  """Scores of a transformer SFE and their sums of values, forward: cells by cells, the query by itself and by cells."""
  return 4 * s.crops * LAYERS * width * sum(cells**2 + 1 + cells for cells in s.maps)


def _pyramid_rows(path: str, work: Work) -> float:
  """Pixels that a layer of a pyramid is applied to: a stage's are those of its level."""
  convnext = re.fullmatch(
    r"projector/pyramid/(convnext/stages/(\d)/.*kernel|convnext/stem/kernel|laterals/(\d)/kernel)", path
  )
  if convnext:
    level = int(convnext[3]) if convnext[3] else STAGES - 1 - int(convnext[2] or 0)
    return work.patches * 4**level
  found = re.fullmatch(
    r"projector/pyramid/(stages/(\d+)/(range_proj|fixup)/\d+|stages/(\d+)|fixup_proj/(\d+))/kernel", path
  )
  if found is None:
    return 0
  if found[4]:  # a deconvolution makes all four pixels of a cell of the level below at once
    return work.patches * 4 ** int(found[4])
  return work.patches * 4 ** (int(found[2] or found[5]) + 1)


def _upsampling_flops(level: int, width: int, patches: float) -> float:
  """One of VDIM's stages, forward: a pixel's key times those of the pixels around, and their weighted sum."""
  return 2 * patches * 4**level * TAPS**2 * (KEY_WIDTH + width)


def _pyramid_flops(projector: ProjectorConfig, width: int, work: Work, trained: bool, inputs: bool) -> float:
  """What a pyramid computes besides its layers."""
  if projector.pyramid == "vdim" and projector.kind != "uhd_v1":
    levels = range(1, max(projector.levels) + 1)
    return sum(_upsampling_flops(level, width, work.patches) for level in levels) * (1 + trained + inputs)
  return 0.0  # bilinear upsampling has four taps


def _window_flops(model: ModelConfig, s: _Sizes, trained: bool, inputs: bool) -> float:
  """What window attention computes besides its layers, in the order of hiwin.py: the deviations' matrices, the queries
  folded into them, the deviation of each cell; scores, sums of tokens, their values."""
  if model.projector.kind == "mlp144":
    return 0.0
  if model.projector.kind == "perceiver":
    return 4 * s.crops * s.windows * s.cells * model.decoder.width * (1 + 2 * trained)
  width, row = model.decoder.width, model.vision.width + 2
  queries = s.windows * s.sets * (width // model.projector.head_width)  # of a crop, each with a score for each token
  total = 0.0
  for level in s.levels:
    cells = s.patches * 4**level
    total += s.passes * 2 * model.vision.width**2 * width * (1 + 2 * trained)
    total += s.passes * 2 * s.windows * s.sets * width * row * (1 + 2 * trained)
    total += 2 * cells * model.vision.width**2 * (1 + trained)
    tokens = SIDE**2 if model.projector.pooling != "pyramid" else (SIDE * 2**level) ** 2
    total += 2 * s.crops * queries * tokens * row * 2 * (1 + trained + inputs)
    total += 2 * s.crops * s.windows * s.sets * width * row * (1 + 2 * trained)
  return total
