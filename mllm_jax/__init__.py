"""LLaVA-type multimodal language models in JAX: see README.md, and train.py for what a run does."""

__version__ = "0.1.0"
