"""Adapter: the model as lmms-eval knows one, in the two forms that it hands questions over in."""

import collections
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from loguru import logger
from tqdm import tqdm

from mllm_jax import distributed, sharding
from mllm_jax.build import load
from mllm_jax.config import MeshConfig
from mllm_jax.data.records import Turn
from mllm_jax.inference.engine import Engine
from mllm_jax.lmms_eval.answering import Question, answer, naming, weigh
from mllm_jax.lmms_eval.conversations import Conversation, of_messages, of_text
from mllm_jax.lmms_eval.settings import UNUSED, USED, settings

LONGEST = (
  1024  # LLaVA's longest setting (model_vqa); some tasks allow 49,152, which a model that repeats itself would use
)


class Asked(NamedTuple):
  """A request of lmms-eval's in either form.

  kwargs: the task's generation_kwargs. place: (task, split, number of the document). first: the document's
  conversation. later: in tasks of several rounds, with the rounds before: (the next conversation, or None after the
  last; what the task makes of the answers so far; what it wants to be told again).
  """

  kwargs: Mapping[str, Any]
  place: tuple[str, str, int]
  first: Callable[[Any], Conversation]
  later: Callable[..., tuple[Conversation | None, Sequence[str], Any]]


class Ranked(NamedTuple):
  """What lmms-eval knows of a given answer: what it compares, and whether a greedy answer is the given one."""

  value: float
  greedy: bool

  def strip(self) -> str:
    """Nothing: lmms-eval's cache takes this for a text and leaves empty ones; a kept one it would give back as text."""
    return ""


class Simple(lmms):
  """Asked with a text and pictures.

  Args:
    pretrained: a model as `mllm_jax.load` takes it, or an engine.
    batch_size: questions answered at once.
    dtype: "bfloat16" or "float32"; None: as stored.
    max_new_tokens: more than so many are not made, however many a task allows.
    blank_line_ends: whether an answer ends before a blank line in tasks that do not say where it ends. lmms-eval wants
      that by default; its own adapter for LLaVA does not do it, and long answers would be cut.
    data, fsdp, tensor: devices along each axis of the mesh, as in `MeshConfig`; all of the devices, or one.
    parts: `load`'s vision, llm, projector, adapter and template.
    device, max_batch_size: lmms-eval hands them to every model; without effect.
  """

  is_simple = True

  def __init__(
    self,
    pretrained: str | Engine,
    batch_size: int | str = 1,
    *,
    dtype: str | None = None,
    max_new_tokens: int = LONGEST,
    blank_line_ends: bool = False,
    data: int = 1,
    fsdp: int = 1,
    tensor: int = 1,
    device: str | None = None,
    max_batch_size: int | None = None,
    **parts: str,
  ):
    del device, max_batch_size
    super().__init__()
    if isinstance(pretrained, str):
      distributed.start()
      one = data == fsdp == tensor == 1 and jax.process_count() == 1
      mesh = None if one else sharding.make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor))
      model, processor = load(pretrained, mesh, dtype, **parts)
      pretrained = Engine(model, processor, rows=int(batch_size), mesh=mesh)
    self.engine = pretrained
    self._limits = dict(max_new_tokens=max_new_tokens, blank_line_ends=blank_line_ends)

  def generate_until(self, requests: Sequence[Instance]) -> list[str]:
    """The answers, in the order of the requests.

    Raises:
      ValueError: a document that cannot be asked; the message names it.
    """
    asked = [self._asked(*request.args) for request in requests]
    return self._answer([(each, lambda each=each: each.first(self._document(each))) for each in asked])

  def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[list[str]]:
    """Of each request, its answers round by round. All requests that have a further round go through it together."""
    asked = [self._asked(*request.args) for request in requests]
    results, infos = [[] for _ in asked], [None] * len(asked)
    open_ = {i: lambda each=each: each.first(self._document(each)) for i, each in enumerate(asked)}
    rounds = 0
    while open_:
      rounds += 1
      texts = self._answer([(asked[i], conversation) for i, conversation in open_.items()])
      following = {}
      for i, text in zip(open_, texts):
        conversation, outputs, infos[i] = asked[i].later(
          self._document(asked[i]),
          previous_output=[*results[i], text],
          round_idx=rounds,
          previous_round_info=infos[i],
        )
        results[i] = list(outputs)
        if conversation is not None:
          following[i] = lambda conversation=conversation: conversation
      open_ = following
    return results

  def loglikelihood(self, requests: Sequence[Instance]) -> list[GenerationResult]:
    """Of each request a `Ranked`, handed over in the one way in which lmms-eval 0.7.3 leaves it as it is.

    A given answer is what the model would say, its end among it; outer spaces are the template's matter. Options of a
    question (output_type multiple_choice) have the negative logarithm of their probability, since the smallest is taken
    for the model's choice; other given answers the logarithm itself, of which perplexity is made.

    Raises:
      ValueError: a document that cannot be asked; the message names it.
    """
    questions = [self._given(*request.args) for request in requests]
    with tqdm(total=len(questions), desc="likelihoods", disable=jax.process_index() != 0) as bar:
      found = weigh(self.engine, questions, bar.update)
    signs = [1 if callable(request.args[1]) else -1 for request in requests]
    ranked = [Ranked(sign * each.log_probability, each.greedy) for sign, each in zip(signs, found)]
    return [GenerationResult(each) for each in ranked]

  def _given(self, context, answer, doc_to_visual, number, task, split) -> Question:
    def conversation() -> Conversation:
      document = self.task_dict[task][split][number]
      turns, pictures, system = of_text(context, doc_to_visual(document))
      text = answer(document) if callable(answer) else answer
      return Conversation([*turns, Turn("gpt", text.strip())], pictures, system)

    return Question(f"{task}, split {split}, document {number}", conversation, {})

  def _asked(self, context, kwargs, doc_to_visual, *rest) -> Asked:
    """From what a request holds; in tasks of several rounds doc_to_text stands behind doc_to_visual."""
    *doc_to_text, number, task, split = rest

    def later(document, **rounds):
      visuals, text, over, outputs, info = doc_to_text[0](document, **rounds)
      return None if over else of_text(text, visuals), outputs, info

    return Asked(kwargs, (task, split, number), lambda document: of_text(context, doc_to_visual(document)), later)

  def _document(self, asked: Asked) -> Any:
    task, split, number = asked.place
    return self.task_dict[task][split][number]

  def _answer(self, asked: Sequence[tuple[Asked, Callable[[], Conversation]]]) -> list[str]:
    unknown = {key for each, _ in asked for key in each.kwargs} - USED - UNUSED
    if unknown:
      logger.warning(f"generation_kwargs without effect here: {', '.join(sorted(unknown))}")
    questions, times = [], collections.Counter()
    for each, conversation in asked:
      name = "{}, split {}, document {}".format(*each.place)
      # Of a document that is asked several times, each answer has draws of its own.
      seed = zlib.crc32(f"{name}, {times[each.place]}".encode())
      times[each.place] += 1
      with naming(name):
        fields = settings(each.kwargs, **self._limits) | {"seed": seed}
      questions.append(Question(name, conversation, fields))
    with tqdm(total=len(questions), desc="answers", disable=jax.process_index() != 0) as bar:
      return [each.text.strip() for each in answer(self.engine, questions, bar.update)]


class Chat(Simple):
  """Asked with messages, as tasks with examples or a system text need it. The same as `Simple` where there are none."""

  is_simple = False

  def _asked(self, context, doc_to_messages, kwargs, number, task, split) -> Asked:
    def later(document, **rounds):
      messages, over, outputs, info = doc_to_messages(document, **rounds)
      return None if over else of_messages(messages), outputs, info

    return Asked(kwargs, (task, split, number), lambda document: of_messages(doc_to_messages(document)), later)
