"""Report: one HTML file that shows a run, with everything in it: no scripts, nothing fetched from elsewhere.

From top to bottom: the result in numbers, the loss of each stage, exact match by kind of question beside what the
text alone gives, held-out pictures with questions and answers, and the configuration.
"""

from mllm_jax.report.curves import read_log
from mllm_jax.report.page import write

__all__ = ["read_log", "write"]
