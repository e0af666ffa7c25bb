"""A language model as judge, behind any endpoint that speaks OpenAI's chat completions."""

import dataclasses
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence

from mllm_jax.benchmarks.question import Judge, Question
from mllm_jax.data.records import DataError

KEY = "OPENAI_API_KEY"
AGAIN = {408, 409, 425, 429, 500, 502, 503, 504}  # statuses that may pass


@dataclasses.dataclass(frozen=True)
class Endpoint:
  """url: what "/chat/completions" stands behind, such as https://api.openai.com/v1. The key is taken from the
  environment's OPENAI_API_KEY, none is sent without it. tries: in all; wait: seconds before the second, doubled each
  time."""

  url: str
  model: str
  tries: int = 5
  wait: float = 1.0
  timeout: float = 120.0

  def judge(self, judge: Judge, question: Question, answer: str) -> str:
    """The verdict on an answer, word for word as the judge wrote it; where rules settle it, the answer itself.

    Raises DataError that names the question, where no readable verdict came after all tries.
    """
    messages = judge.ask(question, answer)
    if messages is None:
      return answer
    problem = ""
    for attempt in range(self.tries):
      if attempt:
        time.sleep(self.wait * 2 ** (attempt - 1))
      try:
        verdict = self._complete(messages)
      except urllib.error.HTTPError as error:
        problem = f"HTTP {error.code}: {error.read(500).decode('utf-8', 'replace')}"
        if error.code not in AGAIN:
          break
        continue
      except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        problem = f"{type(error).__name__}: {error}"
        continue
      if judge.credit(question, verdict) is not None:
        return verdict
      problem = f"a verdict that cannot be read: {verdict[:200]!r}"
    raise DataError(f"the judge {self.model} at {self.url}, question {question.id}: {problem}; run again to go on")

  def _complete(self, messages: Sequence[dict[str, str]]) -> str:
    body = json.dumps({"model": self.model, "messages": messages, "temperature": 0}).encode()
    headers = {"Content-Type": "application/json"}
    if os.environ.get(KEY):
      headers["Authorization"] = f"Bearer {os.environ[KEY]}"
    request = urllib.request.Request(f"{self.url.rstrip('/')}/chat/completions", body, headers)
    with urllib.request.urlopen(request, timeout=self.timeout) as response:
      content = json.load(response)["choices"][0]["message"]["content"]
    if not isinstance(content, str):
      raise ValueError("an answer without text")
    return content
