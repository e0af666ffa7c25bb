"""An engine without a model: what it answers is made of the request alone, word by word."""

import hashlib
import time

from mllm_jax.inference.requests import Answer, Event, Request

WORDS = "a cat sits on the mat and looks at two dogs with grey ears \N{SNOWMAN} über".split()


class FakeEngine:
  """pause: seconds of a step. broken: the step that raises. words: of an answer, where not made of the request."""

  def __init__(self, rows=2, max_length=2048, *, pause=0.0, words=None, broken=None, warming=0.0):
    self.rows, self.max_length = rows, max_length
    self.pause, self.words, self.broken, self.warming = pause, words, broken, warming
    self.steps = self.tickets = 0
    self.queue: dict[int, Request] = {}
    self.rows_used: dict[int, list] = {}  # ticket -> [request, words that are left, words that were said]
    self.cancelled, self.warmed = [], []

  @property
  def waiting(self):
    return len(self.queue)

  @property
  def running(self):
    return len(self.rows_used)

  def warm_up(self):
    time.sleep(self.warming)
    return [lambda number=number: self.warmed.append(number) for number in range(3)]

  def submit(self, request):
    if request.prompt_tokens + request.max_new_tokens > self.max_length:
      raise ValueError(f"{request.prompt_tokens} + {request.max_new_tokens} exceed {self.max_length}")
    self.tickets += 1
    self.queue[self.tickets] = request
    return self.tickets

  def cancel(self, ticket):
    if self.queue.pop(ticket, None) or self.rows_used.pop(ticket, None):
      self.cancelled.append(ticket)

  def step(self):
    self.steps += 1
    if self.steps == self.broken:
      raise RuntimeError("out of memory")
    time.sleep(self.pause)
    while self.queue and len(self.rows_used) < self.rows:
      ticket = next(iter(self.queue))
      request = self.queue.pop(ticket)
      self.rows_used[ticket] = [request, words(request, self.words), []]
    events = []
    for ticket, (request, left, said) in list(self.rows_used.items()):
      word = left.pop(0)
      said.append(word)
      stopped = any(stop in word for stop in request.stop)
      piece = "" if stopped else word if len(said) == 1 else " " + word
      answer = None
      if stopped or not left or len(said) == request.max_new_tokens:
        text = " ".join(said[:-1] if stopped else said)
        reason = "stop" if stopped or not left else "length"
        answer = Answer(text, tuple(range(len(said))), reason)
        del self.rows_used[ticket]
      events.append(Event(ticket, piece, answer))
    return events


def words(request, count=None):
  """What the answer to a request is made of: its prompt, its pictures, and its seed where it is drawn."""
  row = request.row
  digest = hashlib.sha256(row.tokens.tobytes() + row.patches.tobytes() + row.grids.tobytes())
  digest.update(repr((request.sampling, request.seed if request.sampling.temperature else 0)).encode())
  count = count or 3 + digest.digest()[0] % 6
  return [digest.hexdigest()[:8], *(WORDS[digest.digest()[i % 32] % len(WORDS)] for i in range(1, count))]
