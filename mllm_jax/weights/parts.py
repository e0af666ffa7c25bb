"""What a whole LLaVA checkpoint holds: a vision tower, a language model and a projector, each under several prefixes.

Each part has a table of its own, which reads its tensors and ignores the others'. The layouts:

- liuhaotian's and LLaVA-SP's: a plain Llama, with `model.vision_tower.vision_tower.vision_model.` and
  `model.mm_projector.` or `model.conv_...` beside its layers, all behind `base_model.` in files that PEFT wrote;
- llava-hf's: `vision_tower.vision_model.`, `language_model.model.`, `language_model.lm_head.`,
  `multi_modal_projector.`;
- transformers' from 4.52 on: `model.vision_tower.`, `model.language_model.`, `lm_head.`,
  `model.multi_modal_projector.`, and from 5 on without `vision_model.`.

The expressions here match whole names as they stand in the file. A tensor of no part, such as image_newline, is matched
by none of them, so that every table reports it.
"""

OUTER = r"(base_model\.)?(model\.)*"
VISION = (OUTER + r"vision_tower\..*", "the vision tower, which has a table of its own")
PROJECTOR = (
  OUTER + r"(mm_projector|multi_modal_projector|conv_\w+|(query|key|value)_projector)\..*",
  "the projector, which has a table of its own",
)
LANGUAGE = (
  OUTER + r"(language_model\..*|layers\..*|embed_tokens\.weight|norm\.weight|lm_head\.weight)",
  "the language model, which has a table of its own",
)
HINTS = ((r"(model\.)*image_newline", "the checkpoint was trained with tiled images, which are not read here"),)
