"""LoRA adapters as PEFT stores them: `adapter_model.safetensors` or `.bin`, and `adapter_config.json`.

PEFT gives every module its own rank and scale; here all layers of a decoder share one of each, since they are stacked.
`open_adapter` brings the one to the other without changing what the adapter computes.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mllm_jax.config import LORA_TARGETS, LoraConfig
from mllm_jax.weights import llama
from mllm_jax.weights.io import Weights, open_weights
from mllm_jax.weights.known import WeightsError, read_json
from mllm_jax.weights.tables import LINEAR, Row, Table
from mllm_jax.weights.tensors import View

FILE = "adapter_config.json"
PREFIX = "base_model.model.model."
# In memory PEFT has the adapter's name, "default", before `.weight`; some files were saved so. Only prefixes of a
# language model are taken off: an adapter of a vision tower's q_proj is none of the decoder's.
RENAMES = ((r"^(base_model\.)?((model|language_model)\.)*(?=layers\.)", ""), (r"\.default\.weight$", ".weight"))
BLOCKS = dict.fromkeys(llama.ATTENTION, "self_attn") | dict.fromkeys(llama.MLP, "mlp")
ADAPTER = re.compile(r"layers\.(0|[1-9]\d*)\.(\w+)\.(\w+)\.lora_([AB])\.weight")
OUTER = r"(?:base_model\.)?(?:model\.)*"
BLOCK = re.compile(OUTER + r"(tfm_\d+\..*)\.lora_([AB])(?:\.default)?\.weight")
FOLDED = (BLOCK.pattern, "of LLaVA-SP's transformer blocks, and folded into them by `Folded`")
RANK = "the adapter has another rank or belongs to another model; compare adapter_config.json"

# Settings that are read, and those that change neither the arithmetic nor which tensors the file holds. Whatever else
# is set to something is refused: it may be a kind of adapter that this reader does not know.
READ = {"peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern"}
OF_NO_EFFECT = {
  *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
  *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),  # the tensors tell
  *("megatron_core", "runtime_config", "qalora_group_size", "ensure_weight_tying"),
  *("eva_config", "loftq_config", "corda_config", "lora_ga_config"),  # of initialisations
}
# The other initialisations change the base model's weights too, or may.
NEUTRAL = {"bias": ("none",), "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal")}


@dataclasses.dataclass(frozen=True)
class Settings:
  """What an adapter_config.json says of the arithmetic."""

  path: Path
  rank: int
  alpha: float
  dropout: float
  rank_stabilised: bool
  rank_pattern: Mapping[str, int]
  alpha_pattern: Mapping[str, float]

  def scale(self, rank: int, alpha: float) -> float:
    """What A B is multiplied by: alpha / rank, or alpha / sqrt(rank) if rank-stabilised (Kalajdzievski 2023)."""
    return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)

  def of(self, module: str) -> tuple[int, float]:
    """Rank and scale of a module, named as in the model that the adapter was made for."""
    rank = pattern_value(self.rank_pattern, module, self.rank, f"{self.path}: rank_pattern")
    alpha = pattern_value(self.alpha_pattern, module, self.alpha, f"{self.path}: alpha_pattern")
    if not isinstance(rank, int) or not isinstance(alpha, int | float) or rank < 1:
      raise WeightsError(f"{self.path} gives {module} the rank {rank!r} and the alpha {alpha!r}; correct its patterns")
    return rank, self.scale(rank, alpha)


def pattern_value(pattern: Mapping[str, Any], module: str, default: Any, where: str) -> Any:
  """The value of the first key that matches a module's name by PEFT's rule (peft.utils.get_pattern_key): as a regular
  expression it matches the whole name, or what follows one of its dots."""
  for key, value in pattern.items():
    try:
      if re.match(rf"(.*\.)?({key})$", module):
        return value
    except re.error as error:
      raise WeightsError(
        f"{where} has the key {key!r}, which is no regular expression ({error}); correct it"
      ) from error
  return default


class Uniform:
  """An opened adapter with one rank and one scale for all of its modules; it is read like `io.Weights`.

  Narrower modules are padded with zeros up to the largest rank. The gradients of the padding are zero, as each side's
  are products with the other side's zeros, and so are weight decay and momentum: in training such a module stays as
  narrow as it was. A module without an adapter where other layers have one gets zeros alone, and stays without. Where
  the scale differs from the one that all shall have, B is multiplied by the ratio of the two, in float32.

  Args:
    weights: the adapter's file.
    settings: its adapter_config.json.
    layers: how many layers the decoder has; None: as many as the last one with an adapter tells.

  Raises WeightsError where there is no adapter of a decoder's projection in the file, where a tensor has another rank
  than adapter_config.json says, and for DoRA.
  """

  def __init__(self, weights: Weights, settings: Settings, layers: int | None = None):
    self.weights, self.path = weights, weights.path
    magnitudes = [name for name in weights.names() if "lora_magnitude_vector" in name]
    if magnitudes:
      raise refusal(self.path, [f"DoRA ({magnitudes[0]} and {len(magnitudes) - 1} others like it)"], "holds")
    places, ranks, scales = read_modules(weights, settings)
    rank, scale = max(ranks.values()), settings.scale(settings.rank, settings.alpha)
    targets = tuple(name for name in LORA_TARGETS if any(target == name for _, target, _ in places))
    # Written as it stands where nothing has to be converted, so that 256 stays 256.
    alpha = settings.alpha if rank == settings.rank and not settings.rank_stabilised else scale * rank
    self.config = LoraConfig(rank=rank, alpha=alpha, dropout=settings.dropout, targets=targets)
    self._shapes: dict[str, tuple[int, int]] = {}
    self._ratios = {name: scales[name] / scale for (_, _, side), name in places.items() if side == "B"}
    for (_, _, side), name in places.items():
      stored = weights.shape(name)
      self._shapes[name] = (rank, stored[1]) if side == "A" else (stored[0], rank)
    self._absent = self._zeros(places, layers)

  def _zeros(self, places: Mapping[tuple[int, str, str], str], layers: int | None) -> dict[str, tuple[int, int]]:
    """Names and shapes of the A and B of layers without an adapter, where other layers have one."""
    absent = {}
    count = 1 + max(layer for layer, _, _ in places) if layers is None else layers
    for target in self.config.targets:
      shapes = {side: self._shapes[name] for (_, other, side), name in places.items() if other == target}
      for layer in range(count):
        if not any((layer, target, side) in places for side in "AB"):
          stem = f"{PREFIX}layers.{layer}.{BLOCKS[target]}.{target}.lora_"
          absent |= {f"{stem}{side}.weight": shape for side, shape in shapes.items()}
    return absent

  def names(self) -> list[str]:
    """All names, with those of layers that have no adapter of their own."""
    return [*self.weights.names(), *self._absent]

  def file(self, name: str) -> Path:
    """The file that holds a tensor."""
    return self.path if name in self._absent else self.weights.file(name)

  def shape(self, name: str) -> tuple[int, ...]:
    """The shape after padding."""
    return self._absent.get(name) or self._shapes.get(name) or self.weights.shape(name)

  def dtype(self, name: str) -> np.dtype:
    """The type as stored, float32 where the scale has been multiplied in."""
    if name in self._absent or self._ratios.get(name, 1.0) != 1.0:
      return np.dtype(np.float32)
    return self.weights.dtype(name)

  def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
    """The part `index` of a padded tensor, all of it for ()."""
    if name not in self._shapes and name not in self._absent:
      return self.weights.read(name, index)
    shape = self.shape(name)
    spans = [part.indices(length)[:2] for part, length in zip(index or (slice(None),) * 2, shape, strict=True)]
    out = np.zeros([stop - start for start, stop in spans], self.dtype(name))
    if name in self._absent:
      return out
    inside = [(min(start, length), min(stop, length)) for (start, stop), length in zip(spans, self.weights.shape(name))]
    if all(start < stop for start, stop in inside):
      stored = self.weights.read(name, tuple(slice(start, stop) for start, stop in inside))
      ratio = self._ratios.get(name, 1.0)
      # The padding stands behind what is stored, so that lies at the beginning of any part it is in.
      out[: stored.shape[0], : stored.shape[1]] = stored if ratio == 1.0 else stored.astype(np.float32) * ratio
    return out

  def release(self, name: str) -> None:
    """Says that a tensor is not needed for now."""
    if name not in self._absent:
      self.weights.release(name)


class Folded(View):
  """The tensors of a projector with its own adapters folded in: W + B A * scale, added in float32.

  LLaVA-SP's fine-tuning means to leave the projector without adapters, but a slip in its list of exceptions gives them
  to the transformer blocks. A matrix of PyTorch's attention got one that it never used: B is still zero.

  Raises WeightsError for an adapter of a tensor that there is not, or that does not fit it.
  """

  def __init__(self, source: Weights, adapter: Weights, settings: Settings):
    super().__init__(source)
    self.path, self.file = source.path, source.file
    self._adapter, self._factors, self._scales = adapter, {}, {}
    stems = {re.sub(rf"^{OUTER}|(\.base_layer)?\.weight$", "", name): name for name in source.names()}
    for name in of_blocks(adapter.names()):
      stem, side = BLOCK.fullmatch(name).groups()
      if stem not in stems:
        raise WeightsError(f"{adapter.path}: {name} is of no tensor in {source.path}; both must be of one run")
      self._factors.setdefault(stems[stem], {})[side] = name
      self._scales[stems[stem]] = settings.of(stem)[1]
    for name, factors in self._factors.items():
      shapes = [adapter.shape(factors[side]) for side in "BA" if side in factors]
      if len(shapes) != 2 or shapes[0][1:] != shapes[1][:1] or (shapes[0][0], shapes[1][1]) != source.shape(name):
        raise WeightsError(f"{adapter.path}: {', '.join(factors.values())} of shapes {shapes} are no adapter of {name}")

  def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
    """The part `index` of a tensor, all of it for ()."""
    stored = super().read(name, index)
    if name not in self._factors:
      return stored
    rows, columns = index or (slice(None), slice(None))
    a, b = (self._adapter.read(self._factors[name][side]).astype(np.float32) for side in "AB")
    update = np.matmul(b[rows], a[:, columns]) * np.float32(self._scales[name])
    return (stored.astype(np.float32) + update).astype(stored.dtype)


def of_blocks(names: Iterable[str]) -> list[str]:
  """Those adapters that are of LLaVA-SP's transformer blocks."""
  return [name for name in names if BLOCK.fullmatch(name)]


def open_adapter(folder: str | Path, layers: int | None = None) -> tuple[LoraConfig, Uniform]:
  """An adapter's configuration, and its tensors as `table` of that configuration reads them.

  `layers` is the number of the decoder's layers, which matters only where the last ones have no adapter. The targets
  are those that the file has tensors of, whatever target_modules says (a list, an expression or "all-linear").

  Raises WeightsError where a file is missing, is no LoRA, or has what is not computed here (DoRA, trained biases or
  whole modules, initialisations that change the base model, ...).
  """
  uniform = Uniform(open_weights(folder), read_settings(folder), layers)
  return uniform.config, uniform


def read_config(folder: str | Path) -> LoraConfig:
  """The configuration of the adapter in a folder, as `open_adapter` gives it."""
  return open_adapter(folder)[0]


def read_settings(folder: str | Path) -> Settings:
  """What a folder's adapter_config.json says. Raises WeightsError where the file is missing, is of no LoRA, lacks what
  is needed, or sets what is not computed here."""
  path = Path(folder) / FILE
  content = read_json(path, "the configuration of a PEFT adapter")
  if content.get("peft_type") != "LORA":
    raise WeightsError(f"{path}: peft_type is {content.get('peft_type')!r}; only LORA adapters are read")
  wrong = [
    f"{name}={value!r}"
    for name, value in content.items()
    if name not in READ | OF_NO_EFFECT and value not in (None, *NEUTRAL.get(name, (False, {}, [])))
  ]
  if wrong:
    raise refusal(path, wrong, "sets")
  rank, alpha = content.get("r"), content.get("lora_alpha")
  if not isinstance(rank, int) or not isinstance(alpha, int | float) or rank < 1 or alpha <= 0:
    raise WeightsError(f"{path} lacks r or lora_alpha, or they are not positive; write the adapter's rank and alpha")
  dropout, ranks, alphas = (
    content.get(name) or default
    for name, default in (("lora_dropout", 0.0), ("rank_pattern", {}), ("alpha_pattern", {}))
  )
  if not isinstance(dropout, int | float) or not isinstance(ranks, dict) or not isinstance(alphas, dict):
    raise WeightsError(f"{path}: lora_dropout must be a number, and rank_pattern and alpha_pattern objects; correct it")
  return Settings(path, rank, float(alpha), float(dropout), bool(content.get("use_rslora")), ranks, alphas)


def refusal(path: Path, what: list[str], verb: str) -> WeightsError:
  """The error for an adapter that computes something else than LoRA does here."""
  return WeightsError(
    f"{path} {verb} {', '.join(what)}, which is not computed here; merge the adapter into its model with PEFT "
    "(merge_and_unload) and use the result"
  )


def read_modules(
  weights: Weights, settings: Settings
) -> tuple[dict[tuple[int, str, str], str], dict[str, int], dict[str, float]]:
  """The decoder's adapters in a file: {(layer, target, "A" or "B"): name}, {name: rank} and {name: scale}."""
  places, ranks, scales, problems = {}, {}, {}, []
  table_of_all = table(LoraConfig(targets=LORA_TARGETS))
  for name in weights.names():
    found = ADAPTER.fullmatch(table_of_all.rename(name))
    shape = weights.shape(name)
    if not found or BLOCKS.get(found[3]) != found[2] or len(shape) != 2:
      continue  # the table reports it as unexpected, or of a wrong shape
    module = re.sub(r"^base_model\.model\.|\.lora_[AB](\.default)?\.weight$", "", name)
    rank, scale = settings.of(module)
    stored = shape[0 if found[4] == "A" else 1]
    if stored != rank:
      problems.append(f"{name} has rank {stored}, and adapter_config.json gives it {rank}")
    places[int(found[1]), found[3], found[4]] = name
    ranks[name], scales[name] = stored, scale
  if problems:
    more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
    raise WeightsError(
      f"{weights.path}: {'; '.join(problems[:3])}{more}; file and configuration do not belong together"
    )
  if not places:
    raise WeightsError(
      f"{weights.path} has no adapter of a decoder's {', '.join(LORA_TARGETS)}, but {weights.names()[:3]}; "
      "is it the right file?"
    )
  return places, ranks, scales


def table(config: LoraConfig, prefix: str = PREFIX) -> Table:
  """The names of the adapters of a decoder's projections, exported behind `prefix`: that of a causal language model, or
  `base_model.model.model.language_model.` or `base_model.model.language_model.model.` inside a llava-hf model."""
  rows = tuple(
    Row(f"layers.{{layer}}.{BLOCKS[name]}.{name}.{foreign}.weight", f"decoder/layers/{name}/lora/{ours}", LINEAR, RANK)
    for name in LORA_TARGETS
    if name in config.targets
    for foreign, ours in (("lora_A", "a"), ("lora_B", "b"))
  )
  return Table(rows, (FOLDED,), renames=RENAMES, prefix=prefix)


def config_file(config: LoraConfig, base_model: str, prefix: str = PREFIX) -> dict[str, Any]:
  """The content of adapter_config.json for an adapter exported by `table(config, prefix)`.

  base_model: the repository or folder of the model it belongs to. Inside a llava-hf model the targets are an expression
  that leaves out the vision tower, whose projections have the same names.
  """
  targets: list[str] | str = list(config.targets)
  if prefix != PREFIX:
    inside = re.escape(prefix.removeprefix("base_model.model."))
    targets = rf"{inside}layers\.\d+\.(self_attn|mlp)\.({'|'.join(config.targets)})"
  alpha = int(config.alpha) if float(config.alpha).is_integer() else config.alpha
  return {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": base_model,
    "inference_mode": True,
    "r": config.rank,
    "lora_alpha": alpha,
    "lora_dropout": config.dropout,
    "target_modules": targets,
    "bias": "none",
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "use_rslora": False,
    "use_dora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
  }
