"""LLaVA-type multimodal language models in JAX: see README.md, and train.py for what a run does.

model, processor = mllm_jax.load("models/llava15")
batch = processor(["What is in the picture?"], [["cat.jpg"]])
logits = model.logits(batch)
print(mllm_jax.generate(model, processor, "What is in the picture?", ["cat.jpg"]))
for text in mllm_jax.stream(model, processor, "Describe it.", ["cat.jpg"]):
  print(text, end="", flush=True)
"""

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["generate", "load", "stream"]


def __getattr__(name: str) -> Any:
  # Only what is asked for is imported: jax alone takes a second, and a command line answers a typing error without it.
  if name == "load":
    return importlib.import_module("mllm_jax.build").load
  if name == "generate":
    return importlib.import_module("mllm_jax.generate")  # the module itself can be called
  if name == "stream":
    return importlib.import_module("mllm_jax.generate").stream
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
