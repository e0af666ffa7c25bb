"""What a folder or file of weights is, told from its configuration and the names in it.

A checkpoint holds one part of a model or several: `vision`, `decoder`, `projector`, `lora`. `recognise` finds them and
reads configurations; the weights are opened, and of their tensors only a few vectors are read where a projector's
configuration is told by nothing else. VDIM alone, which is less than a projector, is the part `vdim`, for
`weights.vdim`.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mllm_jax import places
from mllm_jax.config import DecoderConfig, LoraConfig, ProjectorConfig, VisionConfig
from mllm_jax.data import chat
from mllm_jax.data.tiles import GRIDS
from mllm_jax.weights import (
  clip,
  folder,
  hiwin,
  internvit,
  internvit_hf,
  internvl,
  llama,
  mistral,
  mlp,
  peft,
  qwen2,
  siglip,
  spatial,
)
from mllm_jax.weights.io import Weights, open_weights
from mllm_jax.weights.known import WeightsError, missing, read_json
from mllm_jax.weights.tables import Table

PARTS = ("vision", "decoder", "projector", "lora")
SIDE_FILES = (*chat.TOKENIZER_FILES, "config.json", "adapter_config.json", folder.MANIFEST)
SIDE_FILES += ("preprocessor_config.json", "processor_config.json")
TOWERS = {"clip": clip, "clip_vision_model": clip, "siglip": siglip, "siglip_vision_model": siglip}
TOWERS |= {"intern_vit_6b": internvit, "internvl_vision": internvit_hf}
TOWER_NAMES = {clip: "CLIP", siglip: "SigLIP", internvit: "InternViT", internvit_hf: "InternViT"}
DECODERS = {"llama": llama, "mistral": mistral, "qwen2": qwen2}
# LLaVA's own classes: the fields of a plain decoder's configuration with others between them.
OFFICIAL = {"llava": llama, "llava_llama": llama, "llava_mistral": mistral, "llava_qwen": qwen2}
OFFICIAL["llava_qwen2"] = qwen2
PROJECTOR_FILES = ("non_lora_trainables.bin", "mm_projector.bin", "model.bin")

AnyConfig = VisionConfig | DecoderConfig | ProjectorConfig | LoraConfig


@dataclasses.dataclass(frozen=True)
class Part:
  """One part of a model in a checkpoint.

  weights: the opened checkpoint, or for an adapter what presents its tensors in one rank.
  origin: the folder or file it was found in.
  config: None where only the rest of the model tells: the tower inside a LLaVA checkpoint, whose configuration lies
    with the tower alone, and a projector, which depends on the tower's grid.
  table: from the part's configuration and the tower's grid to its table; None for checkpoints in our own names.
  """

  weights: Weights
  origin: str
  config: AnyConfig | None
  table: Callable[[Any, int], Table] | None


@dataclasses.dataclass(frozen=True)
class Found:
  """What a path holds.

  family: for people.
  tokenizer: a local folder with its tokenizer, "" without one.
  template: of the conversations it was trained on, "" where it does not say.
  select_layer: which of the tower's layers the projector takes, None where it does not say.
  tower, base: where the checkpoint says that the tower and the language model beside it came from, "" if it does not.
  sources: where each part had come from before, in folders that know it.
  notes: what a user should know about it.
  images: how an image became crops in training, as in a folder's `Manifest`.
  """

  path: str
  family: str
  parts: Mapping[str, Part]
  tokenizer: str = ""
  template: str = ""
  select_layer: int | None = None
  tower: str = ""
  base: str = ""
  sources: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
  notes: tuple[str, ...] = ()
  images: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def recognise(path: places.Place) -> Found:
  """What lies at a path: a folder or a file of weights, local or remote.

  Raises WeightsError where nothing is there, or nothing that is known; the message says what was looked at.
  """
  path = places.place(path)
  if places.is_file(path):
    return projector_alone(path, open_weights(path))
  if not places.is_dir(path):
    raise missing(path, "a folder with a model, or a file of weights")
  names = places.names(path)
  local = places.local_copy(path, [name for name in SIDE_FILES if name in names])
  if folder.MANIFEST in names:
    return of_ours(path, local)
  if "adapter_config.json" in names:
    return of_adapter(path, local, names)
  if "config.json" in names:
    return of_config(path, local, names)
  projectors = [name for name in PROJECTOR_FILES if name in names]
  weights = open_weights(places.join(path, projectors[0]) if projectors else path)
  return projector_alone(path, weights)


def of_ours(path: places.Place, local: Path) -> Found:
  """A folder that `folder.write` made."""
  manifest = folder.read(local)
  weights = open_weights(path)
  parts = {name: Part(weights, str(path), config, None) for name, config in manifest.parts.items()}
  tokenizer = places.join(path, folder.TOKENIZER)
  if places.is_remote(tokenizer) and places.is_dir(tokenizer):
    tokenizer = places.local_copy(tokenizer, [*chat.TOKENIZER_FILES, "config.json"])
  tokenizer = str(tokenizer) if places.is_dir(tokenizer) else ""
  family = f"mllm_jax model ({', '.join(parts)})"
  return Found(str(path), family, parts, tokenizer, manifest.template, sources=manifest.sources, images=manifest.images)


def of_adapter(path: places.Place, local: Path, names: list[str]) -> Found:
  """A PEFT adapter, alone or as LLaVA's fine-tuning leaves it: with the projector in non_lora_trainables.bin."""
  lora, weights = peft.open_adapter(path)
  parts = {"lora": Part(weights, str(path), lora, lambda config, grid: peft.table(config))}
  content = read_json(local / "adapter_config.json", "the configuration of a PEFT adapter")
  found = Found(
    str(path), f"PEFT adapter of rank {lora.rank}", parts, base=str(content.get("base_model_name_or_path") or "")
  )
  of_blocks = peft.of_blocks(weights.names())
  if "non_lora_trainables.bin" not in names:
    if of_blocks:
      raise WeightsError(f"{path} adapts {of_blocks[0]} of a projector; copy the run's non_lora_trainables.bin there")
    return found
  trained = open_weights(places.join(path, "non_lora_trainables.bin"))
  if of_blocks:
    trained = peft.Folded(trained, weights.weights, peft.read_settings(path))
  family = f"{projector_family(trained)} with LoRA of rank {lora.rank}, as the released code leaves it"
  content = read_json(local / "config.json", "") if "config.json" in names else {}
  parts["projector"] = projector_part(path, trained, content)
  found = dataclasses.replace(found, family=family, tokenizer=tokenizer_of(local, names))
  return with_official_fields(found, local) if content else found


def of_config(path: places.Place, local: Path, names: list[str]) -> Found:
  """A folder with a config.json of Hugging Face's kind."""
  content = read_json(local / "config.json", "the configuration of a model")
  kind = content.get("model_type")
  if kind in TOWERS:
    family = TOWERS[kind]
    part = Part(open_weights(path), str(path), family.read_config(local), lambda config, grid: family.table(config))
    return Found(str(path), f"{TOWER_NAMES[family]} vision tower", {"vision": part})
  if kind == "llava" and isinstance(content.get("text_config"), dict):
    return of_llava_hf(path, local, names, content)
  if kind in internvl.COMPUTED:
    return of_internvl(path, local, names, content)
  if kind in OFFICIAL or (kind in DECODERS and "mm_projector_type" in content):
    return of_official(path, local, names, OFFICIAL.get(kind) or DECODERS[kind])
  if kind in DECODERS:
    family = DECODERS[kind]
    part = Part(open_weights(path), str(path), family.read_config(local), lambda config, grid: family.table(config))
    return Found(str(path), f"{kind} language model", {"decoder": part}, tokenizer_of(local, names))
  raise WeightsError(
    f"{places.join(path, 'config.json')}: model_type is {kind!r}; read are "
    + ", ".join(sorted({*TOWERS, *DECODERS, *OFFICIAL, *internvl.COMPUTED}))
  )


def of_llava_hf(path: places.Place, local: Path, names: list[str], content: dict[str, Any]) -> Found:
  """`LlavaForConditionalGeneration` of transformers, whichever of its versions saved it."""
  where = str(places.join(path, "config.json"))
  refuse(where, content, {"projector_hidden_act": ("gelu",), "multimodal_projector_bias": (True,)})
  vision, text = dict(content.get("vision_config") or {}), dict(content["text_config"])
  tower, decoder = vision.get("model_type", "clip_vision_model"), text.get("model_type", "llama")
  if tower not in TOWERS or decoder not in DECODERS:
    raise WeightsError(
      f"{where}: a {tower} with a {decoder} is not read; read are {', '.join(TOWERS)} with {', '.join(DECODERS)}"
    )
  vision_family, decoder_family = TOWERS[tower], DECODERS[decoder]
  layer = content.get("vision_feature_layer", -2)
  strategy = content.get("vision_feature_select_strategy", "default")
  vision_config = clip.with_colours(vision_family.parse(vision, f"{where}, vision_config"), local)
  if not isinstance(layer, int) or strategy != ("default" if vision_config.class_token else "full"):
    raise WeightsError(
      f"{where}: vision_feature_layer is {layer!r} and vision_feature_select_strategy {strategy!r}; read are one layer "
      "and all patches without a class token"
    )
  tied = content.get("tie_word_embeddings", text.get("tie_word_embeddings"))
  if tied is not None and "tie_word_embeddings" not in text:
    text["tie_word_embeddings"] = tied
  weights = open_weights(path)
  part = lambda config, table: Part(weights, str(path), config, table)
  parts = {
    "vision": part(
      dataclasses.replace(vision_config, select_layer=layer), lambda config, grid: vision_family.table(config)
    ),
    "decoder": part(
      decoder_family.parse(text, f"{where}, text_config"), lambda config, grid: decoder_family.table(config)
    ),
    "projector": part(ProjectorConfig(kind="mlp2x_gelu"), lambda config, grid: mlp.table()),
  }
  notes, images = shaping(local)
  tokenizer = tokenizer_of(local, names)
  return Found(str(path), "LLaVA-1.5 as transformers stores it", parts, tokenizer, notes=notes, images=images)


def of_internvl(path: places.Place, local: Path, names: list[str], content: dict[str, Any]) -> Found:
  """A whole InternVL, as its own code or as transformers stores it."""
  where = str(places.join(path, "config.json"))
  refuse(where, internvl.DEFAULTS[content["model_type"]] | content, internvl.COMPUTED[content["model_type"]])
  vision, text, layer = internvl.parts_of(content, where)
  tower, decoder = TOWERS.get(vision.get("model_type")), DECODERS.get(text.get("model_type"))
  if tower not in (internvit, internvit_hf) or decoder is None:
    raise WeightsError(
      f"{where}: a tower of type {vision.get('model_type')} with a language model of type {text.get('model_type')} is "
      f"not read; read are InternViT with {', '.join(DECODERS)}"
    )
  weights = open_weights(path)
  tied = not holds(weights, r"(.*\.)?lm_head\.weight")
  vision_config = clip.with_colours(tower.parse(vision, f"{where}, vision_config"), local)
  part = lambda config, table: Part(weights, str(path), config, table)
  parts = {
    "vision": part(dataclasses.replace(vision_config, select_layer=layer), lambda config, grid: tower.table(config)),
    "decoder": part(
      decoder.parse(text | {"tie_word_embeddings": tied}, where), lambda config, grid: decoder.table(config)
    ),
    "projector": part(internvl.PROJECTOR, lambda config, grid: internvl.table()),
  }
  named = content.get("template", "Hermes-2")
  template = internvl.TEMPLATES.get(named, "chatml")
  notes = (
    ()
    if named in internvl.TEMPLATES
    else (
      f"its conversations are written as {named}, which is not built in; they are taken for chatml, name another with "
      "--template",
    )
  )
  tokenizer, images = tokenizer_of(local, names), internvl.images_of(content)
  return Found(str(path), "InternVL 2", parts, tokenizer, template, notes=notes, images=images)


def shaping(local: Path) -> tuple[tuple[str, ...], dict[str, str]]:
  """(notes, `Found.images`) of a llava-hf checkpoint, by how its processor makes pictures square.

  Ours pads them unless it says outright that it pads none. llava-hf's own say nothing and cut, though the models were
  trained on padded pictures.
  """
  file = local / "preprocessor_config.json"
  content = read_json(file, "how images are prepared") if file.is_file() else {}
  cuts = content.get("do_center_crop", False) and not content.get("do_pad", False)
  if content.get("do_pad") is False and (cuts or content.get("image_processor_type") == "SiglipImageProcessor"):
    return (), {"image_aspect": "square"}
  if not cuts:
    return (), {}
  note = (
    "its preprocessor_config.json cuts pictures to a square; here they are padded to one, as the released LLaVA-1.5 "
    "was trained"
  )
  return (note,), {}


def of_official(path: places.Place, local: Path, names: list[str], family) -> Found:
  """A whole model as LLaVA's, LLaVA-SP's and LLaVA-UHD v2's own code saves it."""
  weights, content = open_weights(path), read_json(local / "config.json", "")
  config = family.parse(
    {key: value for key, value in content.items() if key != "model_type"}, str(places.join(path, "config.json"))
  )
  if "lm_head.weight" not in weights.names() and not config.tied_embeddings:
    config = dataclasses.replace(config, tied_embeddings=True)
  part = lambda config, table: Part(weights, str(path), config, table)
  parts = {"decoder": part(config, lambda config, grid: family.table(config))}
  if holds(weights, r"(model\.)?vision_tower\..*"):
    tower = siglip if holds(weights, r".*vision_tower.*patch_embedding\.bias") else clip
    parts["vision"] = part(None, lambda config, grid: tower.table(config))
  if holds(weights, r".*mm_projector\..*"):
    parts["projector"] = projector_part(path, weights, content)
  found = Found(str(path), projector_family(weights) + " as released", parts, tokenizer_of(local, names))
  return with_official_fields(found, local)


def with_official_fields(found: Found, local: Path) -> Found:
  """What the config.json of the released code says about the tower."""
  where = str(places.join(found.path, "config.json"))
  content = read_json(local / "config.json", "the configuration of a LLaVA model")
  projector = found.parts["projector"].config if "projector" in found.parts else None
  uhd = projector is not None and projector.any_aspect
  refuse(
    where,
    content,
    {
      "mm_projector_type": (hiwin.types(projector).get(projector.query_grid),) if uhd else ("mlp2x_gelu",),
      "mm_vision_select_feature": ("patch",),
      "mm_use_im_start_end": (False,),
      "mm_patch_merge_type": ("flat", "spatial_unpad"),
    },
  )
  if content.get("image_aspect_ratio") not in (None, "pad", "square"):
    sizes = content.get("image_grid_pinpoints")
    tile = min(sizes[0]) if isinstance(sizes, list) and sizes and isinstance(sizes[0], list) and sizes[0] else 0
    grids = [[columns * tile, rows * tile] for columns, rows in GRIDS]
    tiled = {"image_aspect_ratio": ("anyres",), "image_grid_pinpoints": (grids,)}
    refuse(where, {"mm_patch_merge_type": "flat"} | content, tiled | {"mm_patch_merge_type": ("spatial_unpad",)})
  layer = content.get("mm_vision_select_layer")
  tower = content.get("mm_vision_tower") or content.get("vision_tower") or ""
  # LLaVA-UHD v2's code trains Qwen2 on its own conversations, with labels of its own.
  qwen = uhd and "decoder" in found.parts and found.parts["decoder"].config.attention_bias
  template = "chatml_released" if qwen else "vicuna_v1"
  # Its code pads where it is told to, and leaves everything else to the tower's own preprocessing.
  images = {"image_aspect": "square"} if content.get("image_aspect_ratio") == "square" and not uhd else {}
  return dataclasses.replace(found, select_layer=layer, tower=str(tower), template=template, images=images)


def projector_alone(path: places.Place, weights: Weights) -> Found:
  """A file with a projector, or VDIM alone, and nothing else that is known."""
  if hiwin.vdim_levels(weights.names()) and not holds(weights, r".*mm_projector\..*"):
    return Found(str(path), "VDIM of LLaVA-UHD v2", {"vdim": Part(weights, str(path), None, None)})
  if not holds(weights, r".*(mm_projector|multi_modal_projector|conv_\d+)\..*"):
    some = ", ".join(weights.names()[:4])
    raise WeightsError(
      f"{weights.path} holds no projector, and there is no config.json beside it that says what else it is; its "
      f"{len(weights.names())} tensors begin with {some}"
    )
  return Found(str(path), projector_family(weights), {"projector": projector_part(path, weights, {})})


def projector_part(path: places.Place, weights: Weights, content: Mapping[str, Any]) -> Part:
  """The projector in the released names. LLaVA-UHD v2's is told by itself and the `content` of config.json."""
  uhd = hiwin.is_released(weights.names())
  config = hiwin.recognise(weights, content, str(weights.path)) if uhd else None
  return Part(weights, str(path), config, projector_table)


def projector_family(weights: Weights) -> str:
  """Whose a projector is: LLaVA-1.5's, LLaVA-SP's or LLaVA-UHD's."""
  if hiwin.is_released(weights.names()):
    return "LLaVA-UHD v2" if holds(weights, r".*mm_projector\.query_1") else "LLaVA-UHD v1"
  return "LLaVA-SP" if holds(weights, r".*\b(conv_\w+\.(1\.)?|tfm_linear\.1\.)weight") else "LLaVA-1.5"


def projector_table(config: ProjectorConfig, grid: int) -> Table:
  """The table of a projector in the released names."""
  if config.kind == "mlp2x_gelu":
    return mlp.table(image_newline=config.image_newline)
  return hiwin.table(config) if config.any_aspect else spatial.table(config, grid)


def projector_config(part: Part, grid: int, maps: str = "") -> ProjectorConfig:
  """The configuration of a projector over a tower with `grid` patches along a side; `maps` is for a released one (see
  `spatial.recognise`)."""
  if part.config is not None:
    return part.config
  renamed = {mlp.table().rename(name): part.weights.shape(name) for name in part.weights.names()}
  ours = r"(mm_projector|conv_\w+|(query|key|value)_projector|tfm_\w+|query_\d+|image_newline)(\..*)?"
  found = {name: shape for name, shape in renamed.items() if re.fullmatch(ours, name)}
  return spatial.recognise(found, grid, str(part.weights.path), maps)


def tokenizer_of(local: Path, names: list[str]) -> str:
  """The folder, where it holds a tokenizer."""
  return str(local) if set(chat.VOCABULARY_FILES) & set(names) else ""


def holds(weights: Weights, pattern: str) -> bool:
  """Whether some tensor's whole name matches."""
  return any(re.fullmatch(pattern, name) for name in weights.names())


def refuse(where: str, content: Mapping[str, Any], accepted: Mapping[str, tuple]) -> None:
  """Raises WeightsError for fields with another value than the accepted ones; absent fields are accepted."""
  wrong = [f"{name}={content[name]!r}" for name, values in accepted.items() if content.get(name) not in (None, *values)]
  if wrong:
    raise WeightsError(f"{where} sets {', '.join(wrong)}, which is not computed here")
