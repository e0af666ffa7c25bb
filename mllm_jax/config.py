"""The typed configuration: what a model is, what a stage does, where things are.

Two families of classes. *Architectures* (`VisionConfig`, `DecoderConfig`, `LoraConfig`, `ProjectorConfig`,
`ModelConfig`) say everything that `mllm_jax.models` needs and nothing else. *Recipes* (`Config` and what it holds) say
what a run does; the files in `configs/` return one, and `--config.a.b=value` overrides a field of it. An optional
number is 0 where it is absent and an optional text is "", so that every field can be overridden from the command line.

Only the standard library is imported here: every other room may read the configuration.
"""

import dataclasses
import typing
from typing import Any

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # OpenAI CLIP's preprocessing, RGB in 0..1
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SHUFFLED = ("pixel_shuffle", "spatial_shuffle")  # the projectors that put four patches into a token
ANY_ASPECT = ("hiwin", "uhd_v1", "mlp144", "perceiver")  # the projectors that take images of any shape
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# Architectures must be hashable by value: they are static parts of compiled functions. They are not frozen only because
# the command line sets their fields before anything is built.
architecture = dataclasses.dataclass(kw_only=True, unsafe_hash=True)
recipe = dataclasses.dataclass(kw_only=True)


class ConfigError(ValueError):
  """A configuration that cannot work; the message names the field, its value and the remedy."""


@architecture
class VisionConfig:
  """A ViT of the CLIP family. The defaults are CLIP ViT-L/14 at 336 pixels.

  class_token: a learned token before the patches, which the features leave out again.
  patch_bias: a bias on the patch embedding.
  pre_norm: a layer norm between the embeddings and the first layer.
  SigLIP (Zhai et al. 2023) is without the first, with the second and without the third.
  layer_scale: learned factors for each channel on what attention and MLP add (Touvron et al. 2021); InternViT (Chen et
    al. 2024) has them, the first and the second, and is taken at its last layer.
  """

  image_size: int = 336
  patch_size: int = 14
  width: int = 1024
  layers: int = 24
  heads: int = 16
  mlp_width: int = 4096
  activation: str = "quick_gelu"  # or "gelu", "gelu_pytorch_tanh"
  norm_eps: float = 1e-5
  select_layer: int = -2  # index into [embeddings, after layer 1, ..., after layer L]
  class_token: bool = True
  patch_bias: bool = False
  pre_norm: bool = True
  layer_scale: bool = False
  mean: tuple[float, ...] = CLIP_MEAN
  std: tuple[float, ...] = CLIP_STD

  @property
  def grid(self) -> int:
    """Patches along one side; pixels at the right and the bottom that fill no patch belong to none."""
    return self.image_size // self.patch_size

  @property
  def patch_values(self) -> int:
    """Numbers in a patch: its pixels by three colours."""
    return 3 * self.patch_size**2

  @property
  def layers_used(self) -> int:
    """How many layers are computed; the rest of the checkpoint is never read."""
    used = self.select_layer if self.select_layer >= 0 else self.layers + 1 + self.select_layer
    if not 0 <= used <= self.layers:
      raise ConfigError(f"vision.select_layer={self.select_layer} does not exist in a tower of {self.layers} layers")
    return used


@architecture
class DecoderConfig:
  """A Llama-type decoder. The defaults are Vicuna-7B v1.5.

  attention_bias: a bias on the query, key and value projections and none on the output's, as Qwen2 has it.
  max_positions: how long a text it was made for; nothing is computed with it, other tools want to be told.
  sliding_window: how many tokens each sees, itself included (Mistral 7B, Jiang et al. 2023, section 2); 0: all.
  rope_factor: by which Llama 3.1 (Grattafiori et al. 2024) slows those of its rotary angles that turn less than
    rope_low times within rope_trained places; those that turn more than rope_high times stay, and between the two it
    goes over from one to the other. 1: none is slowed.
  """

  vocab_size: int = 32000
  width: int = 4096
  layers: int = 32
  heads: int = 32
  kv_heads: int = 32
  head_width: int = 128
  mlp_width: int = 11008
  rope_theta: float = 10000.0
  norm_eps: float = 1e-5
  tied_embeddings: bool = False
  attention_bias: bool = False
  max_positions: int = 4096
  sliding_window: int = 0
  rope_factor: float = 1.0
  rope_low: float = 1.0
  rope_high: float = 4.0
  rope_trained: int = 8192


@architecture
class LoraConfig:
  """Low-rank adapters (Hu et al. 2021) with PEFT's arithmetic: x A B * alpha / rank. Rank 0 means none."""

  rank: int = 0
  alpha: float = 256.0
  dropout: float = 0.05
  targets: tuple[str, ...] = LORA_TARGETS


@architecture
class ProjectorConfig:
  """From patch features to visual tokens.

  kind: "spatial" (LLaVA-SP: spatial tokens, then patch tokens) or "mlp2x_gelu" (LLaVA-1.5: patch tokens only); for
    images of any shape "hiwin" (LLaVA-UHD v2), "uhd_v1" (the resampler of its predecessor), "mlp144" or "perceiver"
    (what the paper compares with, figure 5); for tiles "pixel_shuffle" (InternVL: a token for 2 x 2 patches) or
    "spatial_shuffle" (spatial tokens of the tile's patches, then those).
  sfe: what LLaVA-SP's spatial tokens are made by: a "convolution" of each map, or in its ablations a "transformer" for
    each map (table 3) or sliding "windows" instead of maps (table 5); or by a "factorised" convolution, which is light.
  maps: "cropping" (centre crops that grow to the whole map) or "pooling" (the whole map, pooled to growing sizes).
  stride: patches by which a crop grows on each side; the sizes are 2 stride, 4 stride, ... up to the grid
    (paper, table 4).
  sizes: the map sizes themselves, smallest first, where they should not follow from the stride.
  window, window_strides: of "windows": patches along a side, and how many they are apart downwards and across.
  depth_multiplier: of "factorised": patterns by which each channel is summed over a map.
  token_order: of "transformer": "map" (a token is a cell of its map), or "released" (pooled maps are cut into tokens
    across cells and channels, which the released weights were trained with).
  dfi_kernel: kernel of the detail map of DFI (paper, table 6; its stride is 2); 0 leaves DFI out.
  conv_width: channels of a spatial token before the last linear layer.
  head_bias: bias of that layer: "released" (only cropping with DFI has one), "always" or "never".
  image_newline: a learned token that ends each row of a tiled image; data.image_aspect=anyres needs it.
  conv_init: "uniform" (+-1/sqrt(fan in), what the released code means to do) or "zeros" (what its construction inside
    transformers' fast initialisation really gives at full size).

  Of LLaVA-UHD's:
  pyramid: what makes maps finer than the tower's: "vdim", "bilinear", "deconv"; "convnext" has an encoder of its own
    instead of the tower; "none" has level 0 only.
  convnext_widths, convnext_depths: of its four stages; the defaults are CLIP-ConvNeXt-L's.
  levels: of the pyramid; level l has 2^l times the tower's cells along each side.
  query_grid: windows, and tokens of a slice, along each side.
  pooling: cells that a window is pooled to: "selective" by the image's shape (paper, eq. 3), "fixed" (3 x 3) or
    "pyramid" (finer at finer levels).
  head_width: of the attention inside a window.
  organisation: how the tokens of slices are laid out: "spatial" (the paper: one map of all slices, a newline after
    each of its rows) or "slices" (slice after slice, as the released v2 branch does).
  separators: "text" (the vocabulary's own comma and newline) or "released" (Llama's ids for them, whatever the
    vocabulary is, as the released code has it with Qwen2 too).
  """

  kind: str = "spatial"
  sfe: str = "convolution"
  maps: str = "cropping"
  stride: int = 2
  sizes: tuple[int, ...] = ()
  window: int = 12
  window_strides: tuple[int, ...] = (6, 12)
  depth_multiplier: int = 4
  token_order: str = "map"
  dfi_kernel: int = 16
  conv_width: int = 512
  head_bias: str = "released"
  conv_init: str = "uniform"
  image_newline: bool = False
  pyramid: str = "vdim"
  convnext_widths: tuple[int, ...] = (192, 384, 768, 1536)
  convnext_depths: tuple[int, ...] = (3, 3, 27, 3)
  levels: tuple[int, ...] = (0, 2)
  query_grid: int = 12
  pooling: str = "selective"
  head_width: int = 128
  organisation: str = "spatial"
  separators: str = "text"

  @property
  def variant(self) -> str:
    """What LLaVA-SP's spatial tokens are made of, in words."""
    return {"convolution": self.maps, "windows": "windows"}.get(self.sfe, f"{self.maps}, {self.sfe}")

  @property
  def any_aspect(self) -> bool:
    """Whether it takes images of any grid, and not only the tower's square one."""
    return self.kind in ANY_ASPECT


@architecture
class ModelConfig:
  """Everything that `models.mllm.Mllm` is built from.

  dtype: of the computation ("bfloat16", "float32"); norms, softmax, logits and losses are always float32.
  remat: what the decoder's backward pass recomputes: "none"; "named" (keeps most of the products' results); "offload"
    (the same, kept in the host's memory); "full" (keeps each layer's input only).
  attention: how it is computed: "auto" (what suits the device), "splash" (TPU), "cudnn" (NVIDIA GPU, 16 bits, rows that
    are not packed) or "xla" (anywhere).
  packed: whether a row may hold several samples; without them some devices have a quicker attention.
  int8_decoder: the kernels of the decoder's layers, which must be frozen, are stored in int8 with a scale for each
    output channel: half of bfloat16's memory. On the demo's decoder (width 128) that moves logits by 2.5 % of
    their own spread, and the likeliest token at 0.9 % of the places.
  """

  vision: VisionConfig = dataclasses.field(default_factory=VisionConfig)
  decoder: DecoderConfig = dataclasses.field(default_factory=DecoderConfig)
  projector: ProjectorConfig = dataclasses.field(default_factory=ProjectorConfig)
  lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
  dtype: str = "bfloat16"
  remat: str = "full"
  attention: str = "auto"
  packed: bool = True
  int8_decoder: bool = False


@recipe
class ModelRecipe:
  """Where the weights come from (Hugging Face folders), and what stands between the towers.

  projector_weights: a released projector (mm_projector.bin, model.bin, non_lora_trainables.bin or .safetensors) to
  start from instead of a random one.
  vdim_weights: of a projector's VDIM, where the stage "vdim" is not run in the same workdir: what that stage left in
  another one (WORKDIR/vdim/vdim.safetensors), or a released checkpoint.
  convnext_weights: of a projector's ConvNeXt: a folder or file of transformers', timm's or open_clip's; "": random.
  """

  vision: str = "weights/clip-vit-large-patch14-336"
  llm: str = "weights/vicuna-7b-v1.5"
  projector_weights: str = ""
  vdim_weights: str = ""
  convnext_weights: str = ""
  projector: ProjectorConfig = dataclasses.field(default_factory=ProjectorConfig)
  dtype: str = "bfloat16"
  frozen_dtype: str = "bfloat16"
  remat: str = "full"
  attention: str = "auto"  # or "splash", "cudnn", "xla": see ModelConfig
  int8_decoder: bool = False  # store the frozen decoder's kernels in int8: see ModelConfig


@recipe
class DataConfig:
  """One data set: a LLaVA JSON or JSONL file and the folder its image paths are relative to; or another source that
  mllm_jax/data/sources knows.

  mix: further sources, each (path, image folder, share) with a share such as "0.5" (half of its samples), "2.0" (each
    twice), "first:1000" or "random:1000".
  on_bad_sample: what becomes of a sample that cannot be used: "error" stops the run, "skip" leaves its row empty,
    "replace" takes another sample, the same on every machine.
  max_bad_share: of the samples seen that may be so before the run stops nevertheless.

  "{workdir}" in a path stands for the run's folder. Samples longer than max_length are truncated after the visual
  tokens stand in them. max_images is the number of image crops a row has room for.

  enlarge: of "slices", in training alone: the share of the pictures, drawn once for all epochs, that are brought to the
    area of six slices if they would not have six. Where it is above 0, pictures whose path in the data names TextVQA
    are brought to 1024 pixels along the longer side instead. The released loader has 0.1.

  batching:
    "fixed": a row is a sample, padded to max_length.
    "group": a row is a sample. Each step is what the released sampler with modality grouping gives; inside it the
      samples are sorted by length, and each micro-batch is padded to the shortest of `buckets` that holds it. So it
      takes several micro-batches (accumulation) to save much.
    "pack": samples share rows of row_length places and max_images crops; batch_size counts rows.
  buckets: lengths that are compiled for "group", growing, the last max_length; () chooses eight that suit the data.
  row_length: places of a row for "pack"; 0: twice max_length, because samples that fill a third of max_length or more
    leave gaps in rows of max_length that no other fits. max_images should grow with it.
  """

  path: str = ""
  image_folder: str = ""
  template: str = "vicuna_v1"  # or another of data/templates.py, such as "plain", "chatml", "llava_llama_3", "jinja"
  max_length: int = 2048
  max_images: int = 1
  image_aspect: str = "pad"  # or "square" (cut), "anyres" (LLaVA-1.6's tiles), "tiles" (InternVL's), "slices" (UHD's)
  max_slices: int = 6  # of "slices" and "tiles": so many at most, and one crop more for the whole; 1: only the whole
  enlarge: float = 0.0  # of "slices": pictures that training brings to six slices' area
  mix: tuple[tuple[str, str, str], ...] = ()
  on_bad_sample: str = "error"  # or "skip", "replace"
  max_bad_share: float = 0.01
  batching: str = "fixed"  # or "group", "pack"
  buckets: tuple[int, ...] = ()
  row_length: int = 0


@recipe
class StageConfig:
  """One training stage. `parameters` is a table of (regular expression, learning rate); rate 0 freezes. Each
  parameter's path must be matched in full by exactly one row."""

  data: DataConfig = dataclasses.field(default_factory=DataConfig)
  lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
  parameters: tuple[tuple[str, float], ...] = ()
  batch_size: int = 256
  accumulation: int = 1  # micro-batches a step is computed in
  epochs: float = 1.0
  steps: int = 0  # 0: as many as the epochs make
  warmup_ratio: float = 0.03
  weight_decay: float = 0.0
  beta1: float = 0.9
  beta2: float = 0.999
  eps: float = 1e-8
  clip_norm: float = 0.0  # 0: no clipping, as the released runs in effect had none


@recipe
class VdimStage:
  """VDIM's own training, on images alone, before the language model comes in (LLaVA-UHD v2, section 3.2).

  data: a folder of image files (in folders too), or any source of samples with images. Of its fields only path,
    image_folder, mix, on_bad_sample and max_bad_share count.
  jitters: random views of each image in a step; the term that compares sampled pixels belongs to the first.
  projected: random directions that features are compared along; 0 compares them whole.
  crf_samples: pixels of an image that are compared with one another; 0 leaves that term out.
  normalisation: of the pixels: "imagenet", as the released run had it, or "clip": the tower's own.
  norm_targets: features are layer-normed, without parameters, before anything is done with them.
  supervision: "all" levels have a loss of their own and the stages are trained apart from each other, or the "last" one
    alone teaches all stages.
  optimizer: "nadam" with PyTorch's defaults, or "adam".
  clip_norm, clip_steps: the gradient's norm is bounded in so many first steps.

  The defaults are the released run's.
  """

  data: DataConfig = dataclasses.field(default_factory=DataConfig)
  batch_size: int = 16
  accumulation: int = 1  # micro-batches a step is computed in
  steps: int = 2000
  learning_rate: float = 1e-3
  optimizer: str = "nadam"
  clip_norm: float = 1e-4
  clip_steps: int = 10
  jitters: int = 2
  projected: int = 30
  crf_samples: int = 1000
  normalisation: str = "imagenet"
  norm_targets: bool = True
  supervision: str = "all"


@recipe
class MeshConfig:
  """Devices along each axis of a slice; one of them may be -1: all that are left.

  The dcn_ fields are slices along each axis, which is as many times as long then: slices are joined by a data centre's
  network, over which the batch is best split and parameters are not gathered. On one slice they are 1.

  cpu_devices: as how many devices a CPU counts, where there is no accelerator; 0: as many as XLA_FLAGS say, or one.
    XLA works on most of a small model's step with one core a device.
  """

  data: int = 1
  fsdp: int = -1
  tensor: int = 1
  dcn_data: int = -1
  dcn_fsdp: int = 1
  dcn_tensor: int = 1
  cpu_devices: int = 0


@recipe
class EvaluationConfig:
  """Questions asked after a stage: a LLaVA JSON whose samples may name a "category". An empty path asks none."""

  path: str = ""
  image_folder: str = ""
  batch_size: int = 64
  max_new_tokens: int = 16
  stages: str = "pretrain,finetune"  # that are followed by the questions
  blank: bool = True  # ask again with the pictures blanked, to see what the text alone gives


@recipe
class Config:
  """A whole run."""

  name: str = ""
  demo: bool = False  # write the digits data set into {workdir}/data first
  demo_shapes: bool = False  # with wide, tall and large pictures
  seed: int = 0
  stages: str = "pretrain,finetune"  # any of vdim,pretrain,finetune, in this order
  model: ModelRecipe = dataclasses.field(default_factory=ModelRecipe)
  vdim: VdimStage = dataclasses.field(default_factory=VdimStage)
  pretrain: StageConfig = dataclasses.field(default_factory=StageConfig)
  finetune: StageConfig = dataclasses.field(default_factory=StageConfig)
  evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
  mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
  log_every: int = 10
  checkpoint_every: int = 500
  keep_checkpoints: int = 2
  max_nonfinite: int = 5  # steps in a row whose loss or gradient is not finite, after which the run saves and stops
  save_model: bool = True  # at the end, the whole model with its frozen halves as {workdir}/model
  loader_threads: int = 4  # that decode and tokenize, in each process that does
  loader_workers: int = 0  # processes that decode and tokenize; 0: the trainer itself does
  wandb_project: str = ""


def to_dict(config: Any) -> dict[str, Any]:
  """A configuration as nested dictionaries that JSON can hold; `from_dict` is the inverse."""
  return dataclasses.asdict(config)


def from_dict(cls: type, content: dict[str, Any], where: str = "config") -> Any:
  """A configuration of class `cls` from what `to_dict` gave, or what JSON made of it.

  Raises ConfigError for a key that the class does not have, so that a file of another version is not half understood.
  """
  hints = typing.get_type_hints(cls)
  unknown = sorted(set(content) - set(hints))
  if unknown:
    raise ConfigError(f"{where} has no field {', '.join(unknown)}; it has {', '.join(hints)}")
  values = {
    name: from_dict(hints[name], value, f"{where}.{name}") if dataclasses.is_dataclass(hints[name]) else _frozen(value)
    for name, value in content.items()
  }
  return cls(**values)


def check_types(config: Any, where: str = "config") -> None:
  """Raises ConfigError where a field holds another type than it is declared with, such as "16" for 16."""
  for name, hint in typing.get_type_hints(type(config)).items():
    value, field = getattr(config, name), f"{where}.{name}"
    if dataclasses.is_dataclass(hint):
      if not isinstance(value, hint):
        raise ConfigError(f"{field} must be a {hint.__name__}, and is {value!r}")
      check_types(value, field)
      continue
    kind = typing.get_origin(hint) or hint
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
      raise ConfigError(f"{field} must be of type {kind.__name__}, and is {value!r}")


def _frozen(value: Any) -> Any:
  """JSON knows lists only; the fields are tuples."""
  return tuple(_frozen(item) for item in value) if isinstance(value, list) else value
