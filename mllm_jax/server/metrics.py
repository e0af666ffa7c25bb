"""Metrics in Prometheus' text format."""

import bisect
import collections
from collections.abc import Mapping

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Histogram:
  """How many durations were no longer than each of SECONDS."""

  def __init__(self):
    self._counts = [0] * (len(SECONDS) + 1)
    self._sum = 0.0

  def add(self, seconds: float) -> None:
    self._counts[bisect.bisect_left(SECONDS, seconds)] += 1
    self._sum += seconds

  def lines(self, name: str) -> list[str]:
    """The cumulative buckets, the sum and the count."""
    total, lines = 0, []
    for bound, count in zip([*map(str, SECONDS), "+Inf"], self._counts, strict=True):
      total += count
      lines.append(f'{name}_bucket{{le="{bound}"}} {total}')
    return [*lines, f"{name}_sum {self._sum:.6f}", f"{name}_count {total}"]


class Metrics:
  """What was asked and answered. Used by one thread.

  statuses: of chat requests; 499 where the client went away. tokens: "prompt" (visual ones among them), "visual" and
  "completion".
  """

  def __init__(self):
    self.statuses: collections.Counter[int] = collections.Counter()
    self.tokens: collections.Counter[str] = collections.Counter()
    self.first_token = Histogram()
    self.total = Histogram()

  def text(self, gauges: Mapping[str, tuple[str, float]]) -> str:
    """Everything, and gauges as name -> (help, value)."""
    lines = _head("mllm_requests_total", "counter", "Chat requests by the status of their answer (499: client gone).")
    lines += [f'mllm_requests_total{{status="{status}"}} {n}' for status, n in sorted(self.statuses.items())]
    lines += _head("mllm_tokens_total", "counter", "Tokens of prompts (visual ones among them) and of answers.")
    lines += [f'mllm_tokens_total{{kind="{kind}"}} {n}' for kind, n in sorted(self.tokens.items())]
    for name, (what, value) in gauges.items():
      lines += [*_head(name, "gauge", what), f"{name} {value}"]
    for name, what, histogram in (
      ("mllm_time_to_first_token_seconds", "From a request's arrival to its first token.", self.first_token),
      ("mllm_request_seconds", "From a request's arrival to its last token.", self.total),
    ):
      lines += [*_head(name, "histogram", what), *histogram.lines(name)]
    return "\n".join(lines) + "\n"


def _head(name: str, kind: str, what: str) -> list[str]:
  return [f"# HELP {name} {what}", f"# TYPE {name} {kind}"]
