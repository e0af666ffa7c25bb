"""The layout of the released code of LLaVA 1.5, LLaVA-SP and LLaVA-UHD v2."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from mllm_jax.config import ConfigError, ModelConfig, VisionConfig
from mllm_jax.data import chat
from mllm_jax.data.tiles import GRIDS
from mllm_jax.models.projectors.maps import map_sizes
from mllm_jax.weights import hiwin
from mllm_jax.weights.side_files.files import check_dtype, text_config, write_json

TOKENIZER_FILES = (
  "tokenizer.model",
  "tokenizer.json",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "added_tokens.json",
)
MODEL_MAX_LENGTH, UHD_MAX_LENGTH = 2048, 4096  # tokens of a training row in the released scripts
UHD_TRAINED = "mm_vision_tower,mm_mlp_adapter,mm_language_model"  # what its last stage trains
LLAMA_SEPARATORS = (29892, 13)  # "," and a newline, which the released code of LLaVA-UHD v2 puts after slices
TRANSFORMERS_VERSION = "4.37.2"  # what LLaVA 1.2, on which LLaVA-SP is built, is pinned to
RELEASED_DFI_KERNEL = 16
RELEASED_CONV_WIDTH = 512


@dataclasses.dataclass(frozen=True)
class Literals:
  """What is edited in the released code to choose a variant: the string `a` of the tower's encoder, the architecture's
  name in llava_arch.py, and the branch of train.py that says what is trained."""

  encoder: str
  architecture: str
  train: str


SIX, TWELVE, EIGHT = tuple(range(4, 25, 4)), tuple(range(2, 25, 2)), tuple(range(2, 17, 2))
# (tower's family, the projector's variant, sizes of its maps or windows, whether there is DFI)
VARIANTS = {
  ("clip", "cropping", SIX, False): Literals("336_6_tokens", "conv336", "conv336"),
  ("clip", "cropping", (8, 16, 24), False): Literals("336_3_tokens", "conv336_3_tokens", "conv336_3_tokens"),
  ("clip", "cropping", TWELVE, False): Literals("224", "conv336_12_tokens", "conv336_12_tokens"),
  ("clip", "cropping", (24,), False): Literals("336_6_tokens", "conv336_24", "conv336_24"),
  ("clip", "cropping", EIGHT, False): Literals("224", "conv224", "conv224"),
  ("clip", "cropping", SIX, True): Literals("336_6_tokens", "conv336_cropping_sfe_dfi", "conv336_q"),
  ("clip", "pooling", SIX, False): Literals("336_pooling", "conv336_pooling_sfe", "conv336_adptive_pooling"),
  ("clip", "pooling", SIX, True): Literals("336_pooling", "conv336_adptive_pooling_fuse_49", "conv336_q"),
  ("clip", "windows", (12,), False): Literals("336_6_tokens", "conv336_conv_49", "conv336_conv_49"),
  ("clip", "cropping, transformer", SIX, False): Literals("336_6_tokens", "tfm336", "tfm336"),
  ("clip", "pooling, transformer", SIX, False): Literals(
    "336_6_tokens", "tfm336_adptive_pooling", "tfm336_adptive_pooling"
  ),
  ("siglip", "cropping", SIX, False): Literals("336", "conv336", "conv336"),
  ("siglip", "cropping", TWELVE, False): Literals("224", "conv336_12_tokens", "conv336_12_tokens"),
  ("siglip", "cropping", SIX, True): Literals("336", "conv336_cropping_sfe_dfi", "conv336_q"),
}


def write_official(
  folder: str | Path,
  model: ModelConfig,
  tokenizer_folder: str | Path,
  *,
  vision_source: str,
  base_model: str,
  dtype: str,
  lora: bool,
  cut: bool = False,
) -> None:
  """Writes every file but the weights, for the released code: of LLaVA-SP for a spatial projector, of LLaVA-UHD v2 for
  hiwin, of LLaVA 1.5 else.

  Args:
    folder: exists, or is made. The released code finds the kind of model in its name.
    model: its tower is not part of the folder; the code loads it from `vision_source`. LLaVA-UHD v2's does that too,
      and then puts the weights of the folder in its place.
    tokenizer_folder: the language model's folder; its tokenizer's files are copied as they are.
    vision_source: folder or hub name of the tower. Whether it is CLIP is told by that name.
    base_model: folder or hub name of the language model, which an adapter is loaded onto.
    dtype: of the weights: "float32", "float16" or "bfloat16".
    lora: whether the weights are an adapter and non_lora_trainables.bin, not a whole model.
    cut: whether images were cut to squares in training (data.image_aspect=square), not padded.

  Raises ConfigError for what the released code has no class for.
  """
  check_dtype(dtype)
  refuse(model, vision_source)
  folder, source = Path(folder), Path(tokenizer_folder)
  tokenizer = chat.load_tokenizer(str(source))
  folder.mkdir(parents=True, exist_ok=True)
  ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
  content = config(model, vision_source, dtype, cut) | ids
  write_json(folder / "config.json", {"_name_or_path": base_model} | content)
  ends = sorted(tokenizer.end_ids)
  ending = {"eos_token_id": ends if len(ends) > 1 else ends[0], "transformers_version": TRANSFORMERS_VERSION}
  write_json(folder / "generation_config.json", ids | ending)
  for name in TOKENIZER_FILES:
    if (source / name).is_file():
      shutil.copyfile(source / name, folder / name)
  text = readme(model, source, vision_source, base_model, lora)
  if model.projector.any_aspect:
    text = uhd_readme(model, tokenizer, vision_source, base_model, lora)
  (folder / "README.md").write_text(text, encoding="utf-8")


def refuse(model: ModelConfig, vision_source: str) -> None:
  """Raises ConfigError where the released code would not load the model, or would load another one."""
  uhd = model.projector.any_aspect
  if uhd:
    hiwin.fields(model.projector)
  if model.decoder.attention_bias and not uhd:
    raise ConfigError(
      "decoder.attention_bias: the released code has no class for Qwen2; export to transformers instead"
    )
  if model.decoder.sliding_window or model.decoder.rope_factor != 1:
    raise ConfigError(
      f"decoder.sliding_window={model.decoder.sliding_window}, rope_factor={model.decoder.rope_factor}: the released "
      "code has no class for Mistral and none for Llama 3.1; export to transformers instead"
    )
  if model.decoder.head_width * model.decoder.heads != model.decoder.width:
    raise ConfigError(
      f"decoder.head_width={model.decoder.head_width}: transformers {TRANSFORMERS_VERSION}, which the released code is "
      "pinned to, knows no heads of another width than the decoder's by their number; export to transformers instead"
    )
  spatial, clip = model.projector.kind == "spatial", family(model.vision) == "clip"
  if not clip and uhd:
    raise ConfigError("how LLaVA-UHD v2's released code loads SigLIP is not known here; only CLIP is exported for it")
  if not clip and not spatial:
    raise ConfigError("LLaVA 1.5's released code loads CLIP towers only; export to transformers instead")
  if not vision_source:
    raise ConfigError(
      "vision_source is empty: the released code loads the tower from its own folder; name that or its hub repository, "
      "such as openai/clip-vit-large-patch14-336"
    )
  # LLaVA 1.5's code takes every folder that exists for CLIP's.
  taken_for_clip = vision_source.startswith(("openai", "laion")) or any(
    part in vision_source for part in ("clip", "ShareGPT4V")
  )
  if uhd and "clip" not in vision_source:
    raise ConfigError(
      f"vision_source={vision_source!r}: the released code of LLaVA-UHD v2 finds the tower's kind in that name; give "
      "its folder a name with 'clip' in it"
    )
  if spatial and clip != taken_for_clip:
    raise ConfigError(
      f"vision_source={vision_source!r}: by this name the released code of LLaVA-SP takes the tower for "
      f"{'CLIP' if taken_for_clip else 'SigLIP'}; give its folder a name {'with' if clip else 'without'} 'clip' in it"
    )


def family(vision: VisionConfig) -> str:
  """ "clip" or "siglip"."""
  return "clip" if vision.class_token else "siglip"


def config(model: ModelConfig, vision_source: str, dtype: str, cut: bool) -> dict[str, Any]:
  """config.json, without ids."""
  qwen, uhd = model.decoder.attention_bias, model.projector.any_aspect
  content = {
    "architectures": ["LlavaQwenForCausalLM" if qwen else "LlavaLlamaForCausalLM"],
    **text_config(model.decoder),
    "model_type": "llava_qwen" if qwen else "llava_llama",
    "vocab_size": model.decoder.vocab_size,
    "pretraining_tp": 1,
    "rope_scaling": None,
    "torch_dtype": dtype,
    "transformers_version": TRANSFORMERS_VERSION,
    "mm_vision_tower": vision_source,
    "mm_hidden_size": model.vision.width,
    "mm_projector_type": "mlp2x_gelu",
    "mm_projector_lr": None,
    "mm_vision_select_layer": model.vision.select_layer,
    "mm_vision_select_feature": "patch",
    "mm_patch_merge_type": "spatial_unpad" if model.projector.image_newline else "flat",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "use_mm_proj": True,
    **image_aspect(model, cut),
    "tune_mm_mlp_adapter": False,
    "freeze_mm_mlp_adapter": False,
    "tokenizer_padding_side": "right",
    "tokenizer_model_max_length": UHD_MAX_LENGTH if uhd else MODEL_MAX_LENGTH,
  }
  if not uhd:
    return content
  trained = {"mm_tunable_parts": UHD_TRAINED, "unfreeze_mm_vision_tower": True}
  return content | hiwin.fields(model.projector) | trained | {"image_aspect_ratio": "square"}


def image_aspect(model: ModelConfig, cut: bool) -> dict[str, Any]:
  """How the released code makes pictures fit the tower; a model with a token between rows of tiles takes tiles."""
  if not model.projector.image_newline:
    return {"image_aspect_ratio": "square" if cut else "pad"}
  tile = model.vision.image_size
  grids = [[columns * tile, rows * tile] for columns, rows in GRIDS]
  return {"image_aspect_ratio": "anyres", "image_grid_pinpoints": grids}


def literals(model: ModelConfig) -> Literals | None:
  """What the released code of LLaVA-SP must say for this variant, None where it has no such variant."""
  projector, vision = model.projector, model.vision
  sizes = sides(model)
  found = VARIANTS.get((family(vision), projector.variant, sizes, bool(projector.dfi_kernel)))
  whole_map = sizes[-1] == vision.grid or projector.sfe == "windows"
  released = projector.head_bias == "released" and projector.conv_width == RELEASED_CONV_WIDTH and vision.width == 1024
  return found if released and whole_map else None


def sides(model: ModelConfig) -> tuple[int, ...]:
  """Side lengths of a spatial projector's maps, or of its windows."""
  projector = model.projector
  return (projector.window,) if projector.sfe == "windows" else map_sizes(projector, model.vision.grid)


def readme(model: ModelConfig, llm_folder: Path, vision_source: str, base_model: str, lora: bool) -> str:
  """What to set in the released code, and the command that asks the model."""
  code = "LLaVA-SP (github.com/CnFaker/LLaVA-SP)" if model.projector.kind == "spatial" else "LLaVA 1.5"
  needed = '"llava" and "lora"' if lora else '"llava"'
  lines = [
    f"# For the released code of {code}",
    "",
    f"Weights: {f'an adapter for `{base_model}`' if lora else 'the language model'} and the projector.",
    f"The vision tower is loaded from `{vision_source}`.",
    "",
    "## What the code must say",
    "",
    *_settings(model),
    "",
    "## Asking it",
    "",
    f"FOLDER is this folder. The code finds the kind of model in its name, which must contain {needed}.",
  ]
  if not lora and not (llm_folder / "tokenizer.model").is_file():
    lines.append(
      "It reads tokenizers from `tokenizer.model`, which this one came without: put it into the folder first."
    )
  lines += [
    "",
    "```",
    "python -m llava.eval.model_vqa_loader --model-path FOLDER \\",
    *([f"  --model-base {base_model} \\"] if lora else []),
    "  --question-file questions.jsonl --image-folder images --answers-file answers.jsonl \\",
    "  --temperature 0 --conv-mode vicuna_v1",
    "```",
  ]
  return "\n".join(lines) + "\n"


def _settings(model: ModelConfig) -> list[str]:
  if model.projector.kind != "spatial":
    return ["Nothing: it is chosen by config.json."]
  found = literals(model)
  if found is None:
    sizes = ", ".join(str(size) for size in sides(model))
    return [
      f"It has no such variant: {model.projector.variant} with sizes {sizes}, DFI's kernel",
      f"{model.projector.dfi_kernel} and {model.projector.conv_width} channels. The names of the weights follow its",
      "rules all the same.",
    ]
  encoder = "clip_encoder.py" if family(model.vision) == "clip" else "siglip_encoder.py"
  lines = [
    "Its variants are chosen by literals in the code, which must agree:",
    "",
    "| file | literal |",
    "|---|---|",
    f"| `llava/model/multimodal_encoder/{encoder}`, `feature_select` | `a='{found.encoder}'` |",
    "| `llava/model/llava_arch.py`, `LlavaMetaModel.__init__` and, again, `encode_images` | the architecture "
    f"`{found.architecture}` |",
    f"| `train.py`, only to train on | `a='{found.train}'` |",
  ]
  if model.projector.dfi_kernel not in (0, RELEASED_DFI_KERNEL):
    lines += [
      "",
      f"`conv_CM` in `llava_arch.py` must have a kernel of {model.projector.dfi_kernel}, not {RELEASED_DFI_KERNEL}.",
    ]
  return lines


def uhd_readme(
  model: ModelConfig, tokenizer: chat.ChatTokenizer, vision_source: str, base_model: str, lora: bool
) -> str:
  """What to set in the released code of LLaVA-UHD v2, and which of its weights mean nothing."""
  same = model.vision.width == model.decoder.width
  projector, extra = model.projector, hiwin.placeholders(model.projector, 1, 1 if same else 2)  # for the names
  layout = "True" if projector.organisation == "spatial" else "False"
  held = "an adapter" if lora else "the language model, the vision tower"
  whose = f" for `{base_model}`" if lora else ""
  lines = [
    "# For the released code of LLaVA-UHD v2 (github.com/thunlp/LLaVA-UHD)",
    "",
    f"Weights: {held}{whose} and the projector. The tower is built from `{vision_source}`.",
    "",
    "## What the code must say",
    "",
    f"- `llava/model/llava_arch.py`: `UsePermute = {layout}`, by which the tokens of slices are laid out.",
    *_separators(projector.separators, tokenizer),
  ]
  if projector.kind == "hiwin" and max(projector.levels) == 3:
    lines.append("- It has weights for level 3 (8x) and no forward pass: that must be written first.")
  names = ", ".join(f"`{name.removeprefix(hiwin.STEM)}`" for name in extra)
  lines.append("- `slice_organisation` and `slice_separators` in config.json are for mllm_jax; the code ignores them.")
  lines += (
    []
    if not extra
    else [
      "",
      "## Placeholders",
      "",
      "The released class has more weights than it computes with. These are here so that it loads; they are as it",
      f"initialises them and were never trained: {names}.",
    ]
  )
  return "\n".join(lines) + "\n"


def _separators(kind: str, tokenizer: chat.ChatTokenizer) -> list[str]:
  ids = tuple(tokenizer.inside_id(text) for text in (",", "\n")) if kind == "text" else LLAMA_SEPARATORS
  if ids == LLAMA_SEPARATORS:
    return []
  return [
    f"- `llava/slice_process.py`: the tokens after slices are {ids[0]} and {ids[1]}, not {LLAMA_SEPARATORS[0]} and "
    f"{LLAMA_SEPARATORS[1]}."
  ]
