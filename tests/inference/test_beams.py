"""Beam search against what transformers 5 answers with the same decoder: `generate(num_beams=N, max_new_tokens=12,
eos_token_id=END)` of a LlamaForCausalLM with the tiny model's weights, ids before the end."""

import dataclasses

import numpy as np
import pytest
from tiny_models import Plain, prompt

from mllm_jax.inference.beams import BeamSearch
from mllm_jax.inference.engine import Engine
from mllm_jax.inference.requests import Request
from mllm_jax.inference.settings import Sampling

PROMPTS = [[1, 7], [1, *range(20, 31)], [1, 9, 300, 5]]
EXPECTED = {  # (end, beams): the answer to each prompt
  (2, 3): [
    [288, 111, 146, 146, 146, 146, 146, 158, 121, 114, 269, 233],
    [64, 168, 11],
    [200, 299, 113, 67, 50, 67, 92, 299, 75, 181, 177, 137],
  ],
  (2, 5): [
    [288, 111, 146, 146, 146, 146, 146, 158, 121, 114, 269, 233],
    [86, 199, 69, 11, 287, 214, 114, 73, 290, 200],
    [200, 133, 133, 133, 133, 113, 73],
  ],
  (114, 3): [
    [288, 111, 146, 146, 146, 146, 146, 146, 158, 121],
    [64, 168, 11, 2, 199, 72, 275, 211, 228, 252, 158, 119],
    [200, 299, 113, 67, 50, 67, 92, 299, 75, 181, 177, 137],
  ],
  (114, 5): [
    [288, 111, 146, 146, 146, 146, 146, 158, 98, 97, 214, 2],
    [86, 199, 69, 11, 287, 214],
    [200, 133, 133, 133, 133, 113, 73, 2, 233, 273, 199, 99],
  ],
}


@pytest.mark.parametrize("end", [2, 114])
def test_answers_are_those_of_transformers(tiny, end):
  """All at once, the two widths and greedy ones side by side: rows of the cache change places under them."""
  requests = [Request(prompt(ids), 12, beams=beams) for beams in (3, 5) for ids in PROMPTS]
  greedy = [Request(prompt(ids), 9) for ids in PROMPTS]
  engine = Engine(tiny, Plain(end), rows=16)
  answers = engine.answer(requests + greedy)
  assert [list(answer.ids) for answer in answers[:6]] == EXPECTED[end, 3] + EXPECTED[end, 5]
  assert [answer.finish_reason == "stop" for answer in answers[:6]] == [len(a.ids) < 12 for a in answers[:6]]
  assert [answer.text for answer in answers] == [Plain().decode(answer.ids) for answer in answers]
  assert engine.answer(greedy) == answers[6:]


def test_a_stop_text_ends_beams_too(tiny):
  engine = Engine(tiny, Plain(), rows=16)
  request = Request(prompt(PROMPTS[2]), 12, stop=("[2]",), beams=5)  # as the end 2 does
  answer = engine.answer([request])[0]
  assert answer.text == Plain().decode(EXPECTED[2, 5][2]) and answer.finish_reason == "stop"
  assert answer.ids == (*EXPECTED[2, 5][2], 2)
  with pytest.raises(ValueError, match="temperature 0 alone"):
    dataclasses.replace(request, sampling=Sampling(1.0))


def test_the_best_by_the_token_wins_and_scores_end_the_search():
  """Two beams by hand: 0 ends. After one token "0" scores log 0.4; of "1" (log 0.5) all goes on to "1 0"."""
  search = BeamSearch(2, lambda ids: ids[-1] == 0, longest=9)
  logs = np.log(np.array([[0.5, 0.4, 0.06, 0.04]] * 2))
  assert search.advance(logs, np.array([[1, 0, 2, 3]] * 2)) == [0, 0]
  assert search.tokens == [1, 2] and search.best == (0,) and not search.done
  # "1 0": log(0.5 x 0.9) / 2 = -0.40 is better than log 0.4 = -0.92; the open beams are worse than both.
  logs = np.log(np.array([[0.9, 0.06, 0.03, 0.01], [0.97, 0.01, 0.01, 0.01]]))
  assert search.advance(logs, np.array([[0, 1, 2, 3], [0, 1, 2, 3]])) == [0, 0]
  assert search.best == (1, 0) and search.done
