"""Looking at checkpoints: what one holds, tensor by tensor, and how two differ."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from mllm_jax import build, parameters, places
from mllm_jax.batch import Batch
from mllm_jax.config import ConfigError, ModelConfig, to_dict
from mllm_jax.models.mllm import abstract
from mllm_jax.models.projectors import tokens_per_crop
from mllm_jax.places import PlaceError
from mllm_jax.weights import buffers
from mllm_jax.weights.assemble import StoredModel
from mllm_jax.weights.errors import WeightsError
from mllm_jax.weights.io import open_weights
from mllm_jax.weights.mapping import place
from mllm_jax.weights.recognise import PROJECTOR_FILES, recognise
from mllm_jax.weights.tensors import Tensors, is_float

TEXT_TOKENS = 32  # of the fixed input that logits are compared on
VOCABULARY_AXES = {"decoder/embedding": 0, "decoder/head": 1}  # along which exports have rows for added tokens
SHOWN = 12  # tensors that a comparison spells out


def inspect(path: str) -> dict[str, Any]:
  """What lies at a path: {"path", "recognised", "parts", "notes", "tensors": [{"name", "shape", "dtype", "bytes",
  "file"}]}, all of it as JSON can hold it. Raises WeightsError where there are no weights at all.
  """
  if build.is_run(path):
    stored, config = build.open_run(path)
    run = stored.manifest.run
    found = f"training run {config.name!r}, {run['stage']} after step {run['step']}"
    parts = {name: to_dict(part) for name, part in stored.manifest.parts.items()}
    return report(path, found, parts, (), {"": stored.tensors})
  try:
    found = recognise(path)
  except PlaceError as error:
    return report(path, f"nothing known: {error}", {}, (), {"": open_weights(path)})
  files = {str(part.weights.path): part.weights for part in found.parts.values()}
  parts = {name: to_dict(part.config) if part.config else {} for name, part in found.parts.items()}
  return report(path, found.family, parts, found.notes, files)


def report(path: str, recognised: str, parts: dict, notes: tuple, sources: dict[str, Tensors]) -> dict[str, Any]:
  """`inspect`'s result."""
  tensors = []
  for file, source in sources.items():
    for name in source.names():
      shape, dtype = source.shape(name), source.dtype(name)
      size = math.prod(shape) * dtype.itemsize
      holder = str(source.file(name)) if hasattr(source, "file") else file
      tensors.append({"name": name, "shape": list(shape), "dtype": str(dtype), "bytes": size, "file": holder})
  return {"path": str(path), "recognised": recognised, "parts": parts, "notes": list(notes), "tensors": tensors}


def table(content: dict[str, Any]) -> str:
  """`inspect`'s result for people."""
  lines = [f"{content['path']}: {content['recognised']}"]
  lines += [
    f"  {name}: " + (", ".join(f"{key}={value}" for key, value in config.items()) or "(follows from the tower)")
    for name, config in content["parts"].items()
  ]
  lines += [f"  note: {note}" for note in content["notes"]]
  tensors = content["tensors"]
  rows = [
    (row["name"], " x ".join(map(str, row["shape"])) or "scalar", row["dtype"], f"{row['bytes']:,}") for row in tensors
  ]
  widths = [max([len(row[i]) for row in rows], default=0) for i in range(4)]
  lines += ["", *(f"{a:{widths[0]}}  {b:>{widths[1]}}  {c:{widths[2]}}  {d:>{widths[3]}}" for a, b, c, d in rows)]
  count = sum(math.prod(row["shape"]) for row in tensors)
  size = parameters.readable(sum(row["bytes"] for row in tensors))
  return "\n".join([*lines, f"{len(tensors)} tensors, {count:,} numbers, {size}"])


@dataclasses.dataclass(frozen=True)
class Difference:
  """Of one tensor: the largest absolute difference, and relative to the largest absolute value of the two."""

  name: str
  absolute: float
  relative: float


@dataclasses.dataclass(frozen=True)
class Comparison:
  """How two checkpoints differ.

  differences: of every tensor in both, the largest relative one first.
  only: tensors that one of the two lacks, and those whose shapes differ, as sentences.
  notes: tables with more rows in one of the two, for tokens that were added; the others are compared.
  logits: the largest difference of the logits, None where they were not compared, for the reason in `why`.
  """

  tolerance: float
  differences: list[Difference]
  only: list[str]
  notes: list[str]
  logits: Difference | None
  why: str

  @property
  def equal(self) -> bool:
    found = [*self.differences, *([self.logits] if self.logits is not None else [])]
    return not self.only and all(difference.relative <= self.tolerance for difference in found)


def compare(a: str, b: str, others: dict[str, str], tolerance: float) -> Comparison:
  """Compares two checkpoints by our paths where both are models, by their own names where both are something else.

  Raises WeightsError where one is a model and the other is not, or has no weights.
  """
  first, second = contents(a, others), contents(b, others)
  if (first[1] is None) != (second[1] is None):
    path, reason = (a, first[2]) if first[1] is None else (b, second[2])
    raise WeightsError(f"{path} is no whole model, and the other is, so they cannot be compared: {reason}")
  differences, only, notes = compare_tensors(first[0], second[0])
  logits, why = None, first[2]
  if first[1] is not None:
    try:
      logits, why = compare_logits(first[1], second[1]), ""
    except (PlaceError, ConfigError) as error:
      why = str(error)
  return Comparison(tolerance, differences, only, notes, logits, why)


def contents(path: str, others: dict[str, str]) -> tuple[Tensors, StoredModel | None, str]:
  """What a path holds: its tensors, as a model (by our paths) or else by the names in the file, and why it is none."""
  try:
    stored = build.open_any(path, **others).merged()
    return stored.tensors, stored, ""
  except PlaceError as error:
    reason = str(error)
  files = [path]
  if places.is_dir(path):
    files = [places.join(path, name) for name in PROJECTOR_FILES if name in places.names(path)][:1] or files
  return open_weights(files[0]), None, reason


def compare_tensors(a: Tensors, b: Tensors) -> tuple[list[Difference], list[str], list[str]]:
  """The differences of all tensors in both, what only one has, and where one has rows for added tokens."""
  names = [name for name in a.names() if name in set(b.names())]
  only = [f"only in A: {name}" for name in a.names() if name not in set(names)]
  only += [f"only in B: {name}" for name in b.names() if name not in set(names)]
  differences, notes = [], []
  for name in tqdm(names, desc="comparing", unit="tensor"):
    shapes = a.shape(name), b.shape(name)
    common = shapes[0]
    if shapes[0] != shapes[1]:
      axis = VOCABULARY_AXES.get(name)
      common = tuple(map(min, *shapes))
      if axis is None or any(common[i] != shape[i] for shape in shapes for i in range(2) if i != axis):
        only.append(f"shape: {name} is {shapes[0]} in A and {shapes[1]} in B")
        continue
      notes.append(f"{name} is {shapes[0]} in A and {shapes[1]} in B; the tokens of both are compared")
    differences.append(difference(name, a, b, common))
    a.release(name)
    b.release(name)
  return sorted(differences, key=lambda difference: -difference.relative), only, notes


def difference(name: str, a: Tensors, b: Tensors, shape: tuple[int, ...]) -> Difference:
  """Of one tensor, as far as `shape` goes."""
  absolute = largest = 0.0
  for piece in buffers.pieces(buffers.whole(shape), max(a.dtype(name).itemsize, b.dtype(name).itemsize)):
    x, y = a.read(name, piece), b.read(name, piece)
    if x.dtype == y.dtype and x.tobytes() == y.tobytes():
      continue
    wide = np.float64 if is_float(x.dtype) or is_float(y.dtype) else np.int64
    x, y = x.astype(wide), y.astype(wide)
    if np.isnan(x).any() or np.isnan(y).any():
      return Difference(name, math.inf, math.inf)
    absolute = max(absolute, float(np.abs(x - y).max(initial=0)))
    largest = max(largest, float(np.abs(x).max(initial=0)), float(np.abs(y).max(initial=0)))
  return Difference(name, absolute, absolute / largest if largest else absolute)


def compare_logits(a: StoredModel, b: StoredModel) -> Difference:
  """Of the logits on a fixed input, computed in float32 from the parameters as stored."""
  configs = a.config("float32"), b.config("float32")
  if configs[0].vision.image_size != configs[1].vision.image_size:
    raise WeightsError("the towers take pictures of different sizes")
  vocabulary = min(config.decoder.vocab_size for config in configs)
  first, second = (logits(model, config, vocabulary) for model, config in zip((a, b), configs, strict=True))
  absolute = float(np.abs(first - second).max())
  largest = float(max(np.abs(first).max(), np.abs(second).max()))
  return Difference("logits", absolute, absolute / largest if largest else absolute)


def logits(stored: StoredModel, config: ModelConfig, vocabulary: int) -> np.ndarray:
  """float32 [S, vocabulary] on the fixed input."""
  graphdef, shapes = parameters.flatten(abstract(config))
  targets = {path: jax.ShapeDtypeStruct(x.shape, stored.tensors.dtype(path)) for path, x in shapes.items()}
  model = parameters.unflatten(graphdef, place(stored.tensors, targets))
  batch = fixed_input(config, vocabulary)
  with jax.default_matmul_precision("highest"):
    return np.asarray(jax.jit(lambda model, batch: model.logits(batch))(model, batch))[0, :, :vocabulary]


def fixed_input(config: ModelConfig, vocabulary: int) -> Batch:
  """One row: a picture of noise, its visual tokens, and TEXT_TOKENS random ids below `vocabulary`; always the same."""
  draw = np.random.default_rng(0)
  visual = tokens_per_crop(config)
  vision, places_ = config.vision, visual + TEXT_TOKENS
  text = draw.integers(0, vocabulary, TEXT_TOKENS).astype(np.int32)
  row = lambda values, dtype=np.int32: np.asarray(values, dtype)[None]
  zeros = np.zeros(places_, np.int32)
  return Batch(
    tokens=row(np.concatenate([zeros[:visual], text])),
    targets=row(zeros),
    loss_weights=row(zeros, np.float32),
    segment_ids=row(zeros + 1),
    positions=row(np.arange(places_)),
    visual_index=row(np.concatenate([np.arange(visual), np.full(TEXT_TOKENS, -1)])),
    patches=draw.integers(0, 256, (1, 1, vision.grid**2, vision.patch_values)).astype(np.uint8),
    grids=np.full((1, 1, 2), vision.grid, np.int32),
  )


def comparison_table(result: Comparison) -> str:
  """A comparison for people."""
  lines = []
  lines += [*result.notes, *result.only[:SHOWN]]
  if len(result.only) > SHOWN:
    lines.append(f"and {len(result.only) - SHOWN} more")
  same = sum(difference.absolute == 0 for difference in result.differences)
  lines.append(f"{same} of {len(result.differences)} tensors are equal to the last bit")
  shown = [difference for difference in result.differences if difference.absolute > 0][:SHOWN]
  width = max([len(difference.name) for difference in shown], default=0)
  if shown:
    lines.append(f"{'largest differences':{width}}  {'absolute':>10}  {'relative':>10}")
  lines += [f"{d.name:{width}}  {d.absolute:10.3e}  {d.relative:10.3e}" for d in shown]
  if result.logits is not None:
    lines.append(f"logits: {result.logits.absolute:.3e} absolute, {result.logits.relative:.3e} relative")
  else:
    lines.append(f"logits: not compared: {result.why}")
  verdict = "equal" if result.equal else "different"
  lines.append(f"{verdict} (tolerance {result.tolerance:g})")
  return "\n".join(lines)
