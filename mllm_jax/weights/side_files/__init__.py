"""What an exported folder holds beside its weights, so that other tools load it.

Three layouts. `write_hf` writes what transformers' `LlavaForConditionalGeneration` and `LlavaProcessor` read, and with
them the servers that are built on the two; `write_official` what the released code of LLaVA and LLaVA-SP reads,
and `write_internvl` what InternVL 2's does.
"""

from mllm_jax.weights.side_files.hf import extra_tensors, write_hf
from mllm_jax.weights.side_files.internvl import write_internvl
from mllm_jax.weights.side_files.official import write_official
from mllm_jax.weights.side_files.tokenizer import HfVocabulary, hf_vocabulary

__all__ = ["HfVocabulary", "extra_tensors", "hf_vocabulary", "write_hf", "write_internvl", "write_official"]
