"""LLaVA-1.5's MLP projector, as `mm_projector.bin` and whole LLaVA checkpoints hold it."""

from mllm_jax.weights.mapping import Row, Table, linear

# `base_model.` comes from PEFT, and `model.` once from the causal language model and once more from PEFT.
RENAMES = ((r"^(base_model\.)?(model\.)*", ""),)
PREFIX = "model."
IGNORED = (
  (
    r"(layers\..*|embed_tokens\.weight|norm\.weight|lm_head\.weight)",
    "the language model, which has a table of its own",
  ),
  (r"vision_tower\..*", "the vision tower, which has a table of its own"),
)
HINTS = (
  (r"conv_.*|(query|key|value)_projector\..*", "the projector of LLaVA-SP: set projector.kind=spatial"),
  (r"image_newline", "the checkpoint was trained with tiled images, which are not read here"),
)


def rows(path: str) -> tuple[Row, ...]:
  """The two linear layers, for an MLP that lies at `path` of our model."""
  return (*linear("mm_projector.0", f"{path}/fc1"), *linear("mm_projector.2", f"{path}/fc2"))


def table() -> Table:
  """The names of the projector `mlp2x_gelu`."""
  return Table(rows("projector"), IGNORED, RENAMES, HINTS, PREFIX)
