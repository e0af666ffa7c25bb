"""A stored model in the layouts of other tools: names, prefixes, and the files beside the weights."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mllm_jax.config import SHUFFLED, LoraConfig, ModelConfig
from mllm_jax.weights import clip, folder, hiwin, internvit, internvl, llama, mlp, peft, side_files, siglip
from mllm_jax.weights.assemble import StoredModel, belongs
from mllm_jax.weights.known import WeightsError
from mllm_jax.weights.mapping import Theirs
from mllm_jax.weights.recognise import projector_table
from mllm_jax.weights.tables import Table
from mllm_jax.weights.tensors import Cast, Chosen, InMemory, Joined, MoreRows, Tensors
from mllm_jax.weights.write import write_safetensors, write_torch_bin

FORMATS = ("hf", "official", "peft")
OFFICIAL_TOWER = "model.vision_tower.vision_tower.vision_model."
CLASSIC_TOWER = "vision_tower.vision_model."  # llava-hf's names before transformers 4.52, which every version reads
CLASSIC_DECODER = "language_model."
LLAVA_HF_ADAPTER = "base_model.model.model.language_model."  # where transformers since 4.52 keeps the decoder
RELEASED_PROJECTOR = "base_model.model.model."

Progress = Callable[[int], None]


def export(
  stored: StoredModel,
  layout: str,
  out: Path,
  *,
  merge: bool,
  dtype: str = "",
  vision_tower: str = "",
  base_model: str = "",
  overwrite: bool = False,
  progress: Progress | None = None,
) -> None:
  """Writes a model's folder in another tool's layout.

  Args:
    layout: "hf" (LLaVA-1.5-type models, for transformers, vLLM and SGLang), "official" (what the released code of
      LLaVA, LLaVA-SP, LLaVA-UHD v2 and InternVL 2 loads) or "peft" (the adapter and the projector only).
    merge: folds the adapter into the decoder; otherwise it is written apart.
    dtype: of the weights, "" for the one that most of them are stored in.
    vision_tower: of "official", where the released code shall find the tower: a folder or a repository; "" for where
      the model has it from.
    base_model: the same for the language model under an adapter that is written apart.

  Raises WeightsError where the model does not fit the layout, or `out` exists and may not be overwritten.
  """
  config = stored.config()
  if merge:
    stored = stored.merged()
  lora = stored.manifest.parts.get("lora")
  if layout == "peft" and lora is None:
    raise WeightsError("the model has no adapter to write; export it as hf or official")
  if layout not in FORMATS:
    raise WeightsError(f"format {layout!r} is unknown; known: {', '.join(FORMATS)}")
  of_internvl = config.projector.kind in SHUFFLED or config.vision.layer_scale
  if of_internvl and (layout != "official" or lora is not None):
    raise WeightsError("an InternVL tower or projector is written as official only, with the adapter merged")
  if layout != "peft" and not stored.tokenizer:
    raise WeightsError("the model has no tokenizer, which other tools need; import it again with its tokenizer")
  base = base_model or origin(stored, "decoder", ("language model",), "--base_model") if lora is not None else ""
  tower = vision_tower
  if layout == "official" and not tower and not of_internvl:
    tower = origin(stored, "vision", ("vision tower",), "--vision_tower")
  source = Cast(stored.tensors, np.dtype(dtype or stored.dtype()))
  with folder.beside(out, overwrite=overwrite) as partial:
    if layout == "hf":
      write_hf(partial, stored, config, source, progress)
    elif of_internvl:
      write_internvl(partial, stored, config, source, progress)
    elif layout == "official":
      write_official(partial, stored, config, source, tower, base, progress)
    else:
      write_adapter(partial, source, lora, base, peft.PREFIX, progress)
      write_torch_bin(
        partial / "non_lora_trainables.bin", projector(source, config, RELEASED_PROJECTOR), progress=progress
      )


def size(tensors: Tensors) -> int:
  """Bytes of all tensors; for a progress bar."""
  return sum(math.prod(tensors.shape(name)) * tensors.dtype(name).itemsize for name in tensors.names())


def write_hf(out: Path, stored: StoredModel, config: ModelConfig, source: Tensors, progress: Progress | None) -> None:
  """The classic layout of llava-hf. An adapter that stays apart goes into the folder `adapter`."""
  if config.projector.kind != "mlp2x_gelu" or config.projector.image_newline:
    kind = f"{config.projector.kind!r}" + " with tiled images" * config.projector.image_newline
    raise WeightsError(
      f"transformers has no class for the projector {kind}: hf is for LLaVA-1.5-type models; use --format=official"
    )
  vocabulary = side_files.hf_vocabulary(stored.tokenizer, config.decoder)
  tower = clip if config.vision.class_token else siglip
  decoder = Theirs(part(source, "decoder"), llama.table(config.decoder, CLASSIC_DECODER))
  tables = [name for name in decoder.names() if name.endswith(("embed_tokens.weight", "lm_head.weight"))]
  extra = {name: array.astype(source.to) for name, array in side_files.extra_tensors(config).items()}
  tensors = Joined(
    MoreRows(decoder, tables, vocabulary.vocab_size),
    Theirs(part(source, "vision"), tower.table(config.vision, CLASSIC_TOWER)),
    InMemory(extra),
    Theirs(part(source, "projector"), mlp.table("llava-hf")),
  )
  write_safetensors(out, tensors, progress=progress)
  dtype = str(source.to)
  side_files.write_hf(out, config, stored.tokenizer, stored.manifest.template, vocabulary, dtype, are_cut(stored))
  if "lora" in stored.manifest.parts:
    write_adapter(out / "adapter", source, stored.manifest.parts["lora"], "..", LLAVA_HF_ADAPTER, progress)


def write_official(
  out: Path,
  stored: StoredModel,
  config: ModelConfig,
  source: Tensors,
  tower: str,
  base: str,
  progress: Progress | None,
) -> None:
  """What the released code loads: with an adapter, the folder of a LoRA run, else a whole model."""
  lora = stored.manifest.parts.get("lora")
  if lora is not None:
    write_adapter(out, source, lora, base, peft.PREFIX, progress)
    write_torch_bin(out / "non_lora_trainables.bin", projector(source, config, RELEASED_PROJECTOR), progress=progress)
  else:
    tensors = [Theirs(part(source, "decoder"), llama.table(config.decoder))]
    if config.projector.any_aspect:  # its second stage trains the tower too, so that is in what it saves
      tower_family = clip if config.vision.class_token else siglip
      tensors.append(Theirs(part(source, "vision"), tower_family.table(config.vision, OFFICIAL_TOWER)))
    write_safetensors(out, Joined(*tensors, projector(source, config, mlp.PREFIX)), progress=progress)
  side_files.write_official(
    out,
    config,
    stored.tokenizer,
    vision_source=tower,
    base_model=base or stored.manifest.sources.get("decoder", {}).get("path", ""),
    dtype=str(source.to),
    lora=lora is not None,
    cut=are_cut(stored),
  )


def write_internvl(
  out: Path, stored: StoredModel, config: ModelConfig, source: Tensors, progress: Progress | None
) -> None:
  """What InternVL 2's released code loads."""
  template, images = stored.manifest.template, stored.manifest.images
  side_files.write_internvl(out, config, stored.tokenizer, template, images, str(source.to))
  tensors = Joined(
    Theirs(part(source, "vision"), internvit.table(config.vision)),
    Theirs(part(source, "decoder"), llama.table(config.decoder, CLASSIC_DECODER)),
    Theirs(part(source, "projector"), internvl.table()),
  )
  write_safetensors(out, tensors, progress=progress)


def write_adapter(
  out: Path, source: Tensors, lora: LoraConfig, base: str, prefix: str, progress: Progress | None
) -> None:
  """adapter_config.json and adapter_model.safetensors, as PEFT writes them."""
  out.mkdir(exist_ok=True)
  write_safetensors(
    out, Theirs(part(source, "lora"), peft.table(lora, prefix)), stem="adapter_model", progress=progress
  )
  content = peft.config_file(lora, base, prefix)
  (out / "adapter_config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def projector(source: Cast, config: ModelConfig, prefix: str) -> Tensors:
  """The projector in the released names, behind `prefix`, with all that the released class needs."""
  table = projector_table(config.projector, config.vision.grid)
  tensors = Theirs(part(source, "projector"), Table(table.rows, prefix=prefix))
  if not config.projector.any_aspect:
    return tensors
  extra = hiwin.placeholders(config.projector, config.vision.width, config.decoder.width)
  return Joined(tensors, Cast(InMemory({prefix + name: array for name, array in extra.items()}), source.to))


def are_cut(stored: StoredModel) -> bool:
  """Whether the model was trained on images that were cut to squares."""
  return stored.manifest.images.get("image_aspect") == "square"


def part(source: Tensors, name: str) -> Tensors:
  """The tensors of one part."""
  return Chosen(source, [path for path in source.names() if belongs(path) == name])


def origin(stored: StoredModel, name: str, families: tuple[str, ...], option: str) -> str:
  """Where a part came from. Raises WeightsError where that was not a checkpoint of the part alone, which is what other
  tools can read it from."""
  source = stored.manifest.sources.get(name, {})
  if not any(family in source.get("family", "") for family in families):
    raise WeightsError(
      f"the model's {name} is from {source.get('path') or 'this project'} ({source.get('family', 'trained here')}); "
      f"say with {option} where its {families[0]} lies by itself, as a folder or a repository"
    )
  return source["path"]
