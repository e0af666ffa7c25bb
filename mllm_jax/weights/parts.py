"""What a whole LLaVA checkpoint holds: a vision tower, a language model and a projector, each under several prefixes.

Each part has a table of its own, which reads its tensors and ignores the others'. The layouts:

- liuhaotian's and LLaVA-SP's: a plain Llama, with `model.vision_tower.vision_tower.vision_model.` and
  `model.mm_projector.` or `model.conv_...` beside its layers, all behind `base_model.` in files that PEFT wrote;
- llava-hf's: `vision_tower.vision_model.`, `language_model.model.`, `language_model.lm_head.`,
  `multi_modal_projector.`;
- InternVL's: `vision_model.`, `language_model.`, `mlp1.`;
- transformers' from 4.52 on: `model.vision_tower.`, `model.language_model.`, `lm_head.`,
  `model.multi_modal_projector.`, and from 5 on without `vision_model.`.

The expressions here match whole names as they stand in the file. A tensor of no part is matched by none of them, so
that every table reports it.
"""

from typing import TypeVar

from mllm_jax.config import ConfigError, DecoderConfig, VisionConfig, check_types
from mllm_jax.weights.known import WeightsError

SIZES = ("image_size", "patch_size", "vocab_size", "width", "layers", "heads", "kv_heads", "head_width", "mlp_width")
Architecture = TypeVar("Architecture", VisionConfig, DecoderConfig)

OUTER = r"(base_model\.)?(model\.)*"
VISION = (OUTER + r"(vision_tower|vision_model)\..*", "the vision tower, which has a table of its own")
PROJECTOR = (
  OUTER + r"((mm_projector|multi_modal_projector|mlp1|conv_\w+|tfm_\w+|(query|key|value)_projector)\..*"
  r"|query_\d+|image_newline)",
  "the projector, which has a table of its own",
)
LANGUAGE = (
  OUTER + r"(language_model\..*|layers\..*|embed_tokens\.weight|norm\.weight|lm_head\.weight)",
  "the language model, which has a table of its own",
)
NEWLINE = "image_newline"  # ends each row of a tiled image
HINTS = ((NEWLINE, "trained with tiled images: compare projector.image_newline"),)


def checked(config: Architecture, where: str) -> Architecture:
  """`config` itself, read out of the file and key that `where` names.

  Raises WeightsError where a field has another type than it must have, or a size is not positive.
  """
  try:
    check_types(config, where)
  except ConfigError as error:
    raise WeightsError(f"{error}; download the configuration again") from error
  wrong = {name: value for name, value in vars(config).items() if type(value) is int and name in SIZES and value < 1}
  if wrong:
    raise WeightsError(f"{where}: {wrong} must be positive; download the configuration again")
  return config
