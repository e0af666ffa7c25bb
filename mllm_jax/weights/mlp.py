"""LLaVA-1.5's MLP projector, as `mm_projector.bin` and whole LLaVA checkpoints hold it."""

import re

from mllm_jax.weights import parts
from mllm_jax.weights.tables import Row, Table, linear

# What the two linear layers are called, and what stands before it on export: by the official code, and by llava-hf.
PREFIX = "model."
NAMES = {
  "official": (("mm_projector.0", "mm_projector.2"), PREFIX),
  "llava-hf": (("multi_modal_projector.linear_1", "multi_modal_projector.linear_2"), ""),
}
# `base_model.` comes from PEFT, and `model.` once from the causal language model and once more from PEFT.
STRIP = (rf"^{parts.OUTER}", "")
IGNORED = (parts.LANGUAGE, parts.VISION)
HINTS = (
  (r"(conv|tfm)_.*|(query|key|value)_projector\..*|query_\d+", "the projector of LLaVA-SP: set projector.kind=spatial"),
  *parts.HINTS,
)


def renames(naming: str = "official") -> tuple[tuple[str, str], ...]:
  """What brings every name of the two layers to those of `naming`."""
  wanted, _ = NAMES[naming]
  return (
    STRIP,
    (r"\.base_layer\.weight$", ".weight"),  # of a layer that PEFT has put an adapter beside
    *(
      (rf"^{re.escape(name)}\.", wanted[place] + ".")
      for layers, _ in NAMES.values()
      if layers != wanted
      for place, name in enumerate(layers)
    ),
  )


def rows(path: str, naming: str = "official") -> tuple[Row, ...]:
  """The two linear layers, for an MLP that lies at `path` of our model."""
  first, second = NAMES[naming][0]
  return (*linear(first, f"{path}/fc1"), *linear(second, f"{path}/fc2"))


def newline(present: bool) -> tuple[Row, ...]:
  """The token between the rows of a tiled image, which every naming calls the same."""
  return (Row(parts.NEWLINE, f"projector/{parts.NEWLINE}"),) if present else ()


def table(naming: str = "official", image_newline: bool = False) -> Table:
  """The names of the projector `mlp2x_gelu`. Either naming is read; `naming`, "official" or "llava-hf", is exported."""
  return Table(rows("projector", naming) + newline(image_newline), IGNORED, renames(naming), HINTS, NAMES[naming][1])
