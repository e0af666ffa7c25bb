"""Settings: how a task wants its answers (`generation_kwargs`) becomes how a request is answered."""

from collections.abc import Mapping
from typing import Any

from mllm_jax.inference.settings import GREEDY, Sampling

USED = frozenset(("max_new_tokens", "until", "do_sample", "temperature", "top_p", "top_k", "num_beams"))
# How LLaVA's checkpoints prepare an image is theirs to say; lmms-eval's own adapter for them asks the checkpoint too.
UNUSED = frozenset(("image_aspect_ratio",))
# Where a task does not limit its answers; LLaVA's model_vqa_loader, which the papers' short answers come from.
MAX_NEW_TOKENS = 128
# lmms-eval puts this into every task that names no `until`. Answers to open questions have blank lines.
INJECTED = ["\n\n"]


def settings(kwargs: Mapping[str, Any], *, max_new_tokens: int, blank_line_ends: bool) -> dict[str, Any]:
  """The fields of a `Request` by a task's generation_kwargs; None stands for what is not given, other keys for nothing.

  Args:
    max_new_tokens: more than so many are not made, however many a task allows.
    blank_line_ends: whether an answer ends before a blank line where that is all that `until` names.

  Raises:
    ValueError: a value outside its range.
  """
  given = {key: value for key, value in kwargs.items() if value is not None}
  until = given.get("until", [])
  until = [until] if isinstance(until, str) else list(until)
  if until == INJECTED and not blank_line_ends:
    until = []
  return dict(
    max_new_tokens=min(given.get("max_new_tokens", MAX_NEW_TOKENS), max_new_tokens),
    sampling=_sampling(given),
    stop=tuple(text for text in until if text),
    beams=given.get("num_beams", 1),
  )


def _sampling(given: Mapping[str, Any]) -> Sampling:
  """As transformers' `generate` reads them, but top_k is 0 where it is not given. A temperature alone is drawn with."""
  temperature, top_p, top_k = given.get("temperature", 1.0), given.get("top_p", 1.0), given.get("top_k", 0)
  drawn = given.get("do_sample", "temperature" in given)
  if not drawn or not temperature or not top_p:  # a top_p of 0 keeps the likeliest token alone
    return GREEDY
  return Sampling(float(temperature), float(top_p), top_k)
