"""What a model weighs and what one image costs it, as papers print it: from shapes alone, in seconds.

FLOPs are those of a forward pass over one image at its largest resolution, a multiplication and an addition counted as
two: the tower over every crop, the projector, and the decoder over the image's places. Text and the vocabulary's logits
are left out, and causal attention counts the pairs that see each other.

Of LLaVA-UHD v2's table 1 that meets the rows of LLaVA-1.5 and its own with Vicuna-7B within 3 %. Those with Vicuna-13B
and Qwen2-7B (26.4, 14.3) no count of seven crops can meet: the one with Qwen2-7B has 3.2 TFLOP less than the one with
Vicuna-7B, though Qwen2's layers are the larger ones. Both are met by six crops laid out slice after slice, as the
branch released for these two does it: finetune.data.max_slices=5 and model.projector.organisation=slices.
"""

import dataclasses
import math
from typing import Any

from mllm_jax import build, flops, parameters, preflight
from mllm_jax.compilation.report import flop
from mllm_jax.config import Config, ConfigError, DataConfig, LoraConfig, ModelConfig
from mllm_jax.data.aspects import Aspect
from mllm_jax.data.tiles import GRIDS
from mllm_jax.models.mllm import abstract
from mllm_jax.processors import shapes_aspect

BYTES = 2  # bfloat16
PARTS = ("vision", "projector", "decoder")


@dataclasses.dataclass(frozen=True)
class Summary:
  """parameters: their number by part, and of the projector's by its own parts. image: (width, height). places: of the
  image in the text, visual tokens and separators. flops: by part, of a forward pass."""

  name: str
  parameters: dict[str, int]
  projector: dict[str, int]
  image: tuple[int, int]
  crops: int
  visual_tokens: int
  places: int
  flops: dict[str, float]

  def to_json(self) -> dict[str, Any]:
    sized = lambda counts: {name: {"count": count, "mib": mib(count)} for name, count in counts.items()}
    total = {"total": sum(self.flops.values())}
    content = dataclasses.asdict(self) | {"flops": self.flops | total, "projector": sized(self.projector)}
    return content | {"parameters": sized(self.parameters | {"total": sum(self.parameters.values())})}


def summarise(config: Config) -> Summary:
  """Of the model that a recipe's last stage trains, without adapters.

  Raises ConfigError for a recipe of VDIM alone, or data that the projector cannot read; WeightsError where an
  architecture is not known.
  """
  stages = [name for name in preflight.stage_names(config) if name != "vdim"]
  if not stages:
    raise ConfigError(f"{config.name} trains VDIM alone and has no language model to count")
  model = build.architecture(config.model, LoraConfig())
  aspect, image = largest_image(model, getattr(config, stages[-1]).data)
  shapes = parameters.flatten(abstract(model))[1]
  rows = aspect.places(*image).rows
  work = forward_work(model, aspect, image, len(rows))
  counts, own = dict.fromkeys(PARTS, 0), {}
  for path, x in shapes.items():
    part, child = path.split("/")[:2]
    counts[part] += math.prod(x.shape)
    if part == "projector":
      own[child] = own.get(child, 0) + math.prod(x.shape)
  return Summary(
    name=config.name,
    parameters=counts,
    projector=own,
    image=image,
    crops=int(work.crops),
    visual_tokens=int((rows >= 0).sum()),
    places=len(rows),
    flops=flops.part_flops(model, shapes, dict.fromkeys(shapes, 0.0), work),
  )


def largest_image(model: ModelConfig, data: DataConfig) -> tuple[Aspect, tuple[int, int]]:
  """How images are cut, and the size (width, height) of the largest that is not shrunk: of as many whole squares of the
  tower as there are crops besides the overview, in the grid nearest to a square."""
  aspect = shapes_aspect(model, data)
  grids = [(1, 1)]
  if data.image_aspect == "anyres":
    grids = GRIDS
  elif data.image_aspect in ("slices", "tiles"):
    n = data.max_slices
    grids = [(columns, n // columns) for columns in range(1, n + 1) if n % columns == 0]
  columns, rows = max(grids, key=lambda grid: (grid[0] * grid[1], -abs(math.log(grid[0] / grid[1])), -grid[0]))
  return aspect, (columns * model.vision.image_size, rows * model.vision.image_size)


def forward_work(model: ModelConfig, aspect: Aspect, image: tuple[int, int], places: int) -> flops.Work:
  """The image alone through the model once."""
  crops, patches = aspect.crops_of(*image), model.vision.grid**2
  seen = min(model.decoder.sliding_window or places, places)
  return flops.Work(
    tokens=places,
    pairs=seen * (seen + 1) / 2 + (places - seen) * seen,
    trained=0,
    crops=crops,
    patches=crops * patches,
    patch_pairs=crops * (patches + model.vision.class_token) ** 2,
  )


def mib(count: int) -> float:
  return count * BYTES / 2**20


def text(summary: Summary) -> str:
  """The summary for people."""
  line = lambda name, count: f"  {name:22s} {count / 1e6:12,.2f} M {mib(count):14,.1f} MiB"
  lines = [f"== {summary.name} ==", f"  {'parameters':22s} {'':14s} {'bfloat16':>18s}"]
  for name, count in summary.parameters.items():
    lines.append(line(name, count))
    if name == "projector" and len(summary.projector) > 1:
      lines += [line(f"  {child}", size) for child, size in summary.projector.items()]
  lines.append(line("all", sum(summary.parameters.values())))
  width, height = summary.image
  lines += [
    "",
    f"  one image of {width} x {height} pixels: {summary.crops} crop{'s' * (summary.crops > 1)}, "
    f"{summary.visual_tokens:,} visual tokens in {summary.places:,} places",
  ]
  for name, count in (summary.flops | {"all": sum(summary.flops.values())}).items():
    lines.append(f"  {name:22s} {flop(count):>20s}")
  return "\n".join(lines)
