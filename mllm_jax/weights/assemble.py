"""One model out of what one or several checkpoints hold."""

import dataclasses
import math
from collections.abc import Mapping

from flax import nnx

from mllm_jax import parameters, places
from mllm_jax.config import LoraConfig, ModelConfig, VisionConfig
from mllm_jax.models import projectors
from mllm_jax.models.decoder import Decoder
from mllm_jax.models.vision import VisionTower
from mllm_jax.weights import hiwin, peft
from mllm_jax.weights.fingerprint import fingerprint
from mllm_jax.weights.folder import Manifest
from mllm_jax.weights.known import WeightsError, lookup
from mllm_jax.weights.mapping import Ours
from mllm_jax.weights.recognise import PARTS, Found, Part, projector_config, recognise
from mllm_jax.weights.tensors import Chosen, Joined, Merged, Tensors

DEFAULT_TEMPLATE = "vicuna_v1"


@dataclasses.dataclass(frozen=True)
class StoredModel:
  """A model where it is stored: everything that building it needs, with no tensor read yet.

  tensors: by our paths. tokenizer: a local folder, "" without one. notes: what a user should know.
  """

  manifest: Manifest
  tensors: Tensors
  tokenizer: str
  notes: tuple[str, ...] = ()

  def config(self, dtype: str = "") -> ModelConfig:
    """The whole model's configuration, computing in `dtype` ("": as stored, float16 as bfloat16).

    Raises WeightsError where a part is missing: without a projector the towers are no model.
    """
    parts = self.manifest.parts
    absent = [name for name in PARTS[:3] if name not in parts]
    if absent:
      raise WeightsError(
        f"{', '.join(absent)}: not there; it has {', '.join(parts)}. Name a checkpoint with it (--vision, --llm, "
        "--projector), or train one"
      )
    return ModelConfig(
      vision=parts["vision"],
      decoder=parts["decoder"],
      projector=parts["projector"],
      lora=parts.get("lora", LoraConfig()),
      dtype=dtype or {"float16": "bfloat16"}.get(self.dtype(), self.dtype()),
    )

  def dtype(self) -> str:
    """The type that most of the parameters are stored in."""
    sizes: dict[str, int] = {}
    for name in self.tensors.names():
      dtype = str(self.tensors.dtype(name))
      sizes[dtype] = sizes.get(dtype, 0) + math.prod(self.tensors.shape(name))
    return max(sizes, key=sizes.get)

  def merged(self) -> "StoredModel":
    """The same model with its adapters folded into the decoder."""
    if "lora" not in self.manifest.parts:
      return self
    lora: LoraConfig = self.manifest.parts["lora"]
    without = lambda content: {name: value for name, value in content.items() if name != "lora"}
    manifest = dataclasses.replace(
      self.manifest, parts=without(self.manifest.parts), sources=without(self.manifest.sources)
    )
    return dataclasses.replace(self, manifest=manifest, tensors=Merged(self.tensors, lora.alpha / lora.rank))


def open_model(
  model: str = "",
  *,
  vision: str = "",
  llm: str = "",
  projector: str = "",
  adapter: str = "",
  template: str = "",
  levels: tuple[int, ...] = (),
  maps: str = "",
) -> StoredModel:
  """A model from one checkpoint, from several, or from one whose parts others replace.

  Args:
    model: anything `recognise` knows. What it does not hold, and names as a local folder, is taken from there.
    vision, llm, projector, adapter: checkpoints whose part is taken instead of the model's.
    template: of the conversations, where the checkpoint does not say.
    levels: of the pyramid that a released LLaVA-UHD v2's projector attends to, whatever its checkpoint says.
    maps: of a released LLaVA-SP's transformer blocks, "cropping" or "pooling"; no checkpoint says it.

  Raises WeightsError where something is missing, of an unknown kind, or does not fit together.
  """
  whole = recognise(model) if model else None
  given = {"vision": vision, "decoder": llm, "projector": projector, "lora": adapter}
  founds = {name: recognise(path) if path else None for name, path in given.items()}
  chosen: dict[str, tuple[Found, Part]] = {}
  for name, found in founds.items():
    if found is not None and name not in found.parts:
      raise WeightsError(f"{found.path} is a {found.family} and holds no {name}; it has {', '.join(found.parts)}")
    if found is not None:
      chosen[name] = found, found.parts[name]
    elif whole is not None and name in whole.parts:
      chosen[name] = whole, whole.parts[name]
  for name, place in (("vision", whole.tower), ("decoder", whole.base)) if whole is not None else ():
    if name not in chosen and place and places.exists(place):
      found = recognise(place)
      if name in found.parts:
        chosen[name] = found, found.parts[name]
  if founds["decoder"] is not None and "lora" in founds["decoder"].parts and "lora" not in chosen:
    raise WeightsError(f"{llm} has an adapter beside its language model; merge it first, or name it as --model")
  if levels:
    chosen["projector"] = with_levels(chosen.get("projector"), levels)
  return put_together(chosen, whole, template, maps)


def with_levels(projector: tuple[Found, Part] | None, levels: tuple[int, ...]) -> tuple[Found, Part]:
  """A projector of LLaVA-UHD v2 as released, with other levels. Raises WeightsError for any other one."""
  found, part = projector or (None, None)
  if part is None or part.table is None or part.config is None or part.config.kind != "hiwin":
    what = f"{found.path} is a {found.family}" if found is not None else "no projector is named"
    raise WeightsError(f"levels {levels} are for a projector of LLaVA-UHD v2 as released, and {what}; leave them out")
  config = hiwin.with_levels(part.config, levels, part.weights, str(part.weights.path))
  return found, dataclasses.replace(part, config=config)


def put_together(
  chosen: Mapping[str, tuple[Found, Part]], whole: Found | None, template: str, maps: str = ""
) -> StoredModel:
  """The model that the chosen parts make."""
  configs = {}
  if "vision" in chosen:
    configs["vision"] = vision_config(*chosen["vision"], whole or chosen["vision"][0])
  elif whole is not None and whole.tower:
    raise WeightsError(
      f"{whole.path} was trained on the tower {whole.tower}, which is not in it; name that tower's folder with "
      f"--vision (hf download {whole.tower} --local-dir FOLDER)"
    )
  if "lora" in chosen and "decoder" not in chosen:
    base = chosen["lora"][0].base or "its base model"
    raise WeightsError(
      f"{chosen['lora'][1].origin} is an adapter of {base}, which is not here; name its folder (--llm)"
    )
  for name in ("decoder", "lora"):
    if name in chosen:
      configs[name] = chosen[name][1].config
  if "projector" in chosen:
    if "vision" not in configs:
      raise WeightsError(
        f"{chosen['projector'][1].origin} is a projector, and its size follows from the tower's (--vision)"
      )
    configs["projector"] = projector_config(chosen["projector"][1], configs["vision"].grid, maps)
  if not configs:
    alone = f"{whole.path} is a {whole.family}, which is no model; a run starts from it by model.vdim_weights"
    raise WeightsError(alone if whole is not None else "no checkpoint named; --model, or --vision and --llm")
  ordered = {name: configs[name] for name in PARTS if name in configs}
  sources, tensors = {}, []
  for name in ordered:
    found, part = chosen[name]
    if name == "lora" and part.table is not None:  # layers that it leaves out at the end do not show in it
      _, weights = peft.open_adapter(part.origin, configs["decoder"].layers)
      part = dataclasses.replace(part, weights=weights)
    tensors.append(part_tensors(name, part, ordered))
    sources[name] = found.sources.get(name) or {
      "path": part.origin,
      "family": found.family,
      "fingerprint": fingerprint(part.weights),
    }
  tokens = chosen["decoder"][0].tokenizer if "decoder" in chosen else ""
  if not tokens and whole is not None:
    tokens = whole.tokenizer
  templates = [found.template for found, _ in chosen.values() if found.template]
  images = chosen["projector"][0].images if "projector" in chosen else {}
  manifest = Manifest(ordered, template or (templates or [DEFAULT_TEMPLATE])[0], sources, images=images)
  notes = dict.fromkeys(note for found, _ in chosen.values() for note in found.notes)
  if "projector" in chosen and chosen["projector"][1].table is not None and configs["projector"].any_aspect:
    notes |= dict.fromkeys(hiwin.notes(chosen["projector"][1].weights.names(), configs["projector"]))
  return StoredModel(manifest, Joined(*tensors), tokens, tuple(notes))


def vision_config(found: Found, part: Part, whole: Found) -> VisionConfig:
  """The tower's configuration, with the layer that the projector was trained on."""
  config = part.config
  if config is None:  # the tower of a checkpoint that names it without describing it
    known = lookup(found.tower) if found.tower else None
    if known is not None:
      config = known.config
    elif found.tower and places.is_dir(found.tower):
      config = recognise(found.tower).parts["vision"].config
    else:
      raise WeightsError(
        f"{found.path} holds the weights of its tower {found.tower or '(unnamed)'} and not its configuration; name the "
        "tower's own folder with --vision"
      )
  return config if whole.select_layer is None else dataclasses.replace(config, select_layer=whole.select_layer)


def part_tensors(name: str, part: Part, configs: Mapping) -> Tensors:
  """A part's tensors by our paths; its shapes are those that its configuration gives."""
  config = configs[name]
  if name == "projector" and part.table is not None and config.any_aspect and {"vision", "decoder"} <= configs.keys():
    widths = configs["vision"].width, configs["decoder"].width
    hiwin.check_widths(part.weights, *widths, str(part.weights.path))
  shapes = part_shapes(name, configs)
  if part.table is not None:
    return Ours(part.weights, part.table(config, configs["vision"].grid if "vision" in configs else 0), shapes)
  stored = {path: part.weights.shape(path) for path in part.weights.names() if belongs(path) == name}
  if stored != shapes:
    wrong = sorted(path for path in stored.keys() | shapes.keys() if stored.get(path) != shapes.get(path))
    raise WeightsError(
      f"{part.weights.path} does not hold what its manifest says: {', '.join(wrong[:6])}; import the model again"
    )
  return Chosen(part.weights, shapes)


def part_shapes(name: str, configs: Mapping) -> dict[str, tuple[int, ...]]:
  """{path: shape} of a part."""
  config = configs[name]
  if name == "vision":
    make = lambda rngs: VisionTower(config, dtype="float32", rngs=rngs)
  elif name == "projector":
    whole = ModelConfig(vision=configs["vision"], projector=config)
    if "decoder" in configs:
      whole = dataclasses.replace(whole, decoder=configs["decoder"])
    make = lambda rngs: projectors.make(whole, rngs)
  else:
    lora = config if name == "lora" else LoraConfig()
    make = lambda rngs: Decoder(configs["decoder"], lora, dtype="float32", remat="none", rngs=rngs)
  room = "decoder" if name == "lora" else name
  flat = parameters.flatten(nnx.eval_shape(lambda: make(nnx.Rngs(0))))[1]
  return {f"{room}/{path}": array.shape for path, array in flat.items() if belongs(f"{room}/{path}") == name}


def belongs(path: str) -> str:
  """The part that a parameter belongs to."""
  return "lora" if "/lora/" in path else path.partition("/")[0]
