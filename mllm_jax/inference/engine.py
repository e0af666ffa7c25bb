"""Engine: answers to requests, many at once, each as if it were alone."""

import collections
import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from mllm_jax import parameters, sharding
from mllm_jax.data.processor import Processor, Row, pad_row
from mllm_jax.inference import likelihood
from mllm_jax.inference.features import FeatureCache, digests
from mllm_jax.inference.programs import parameters_of
from mllm_jax.inference.requests import Answer, Event, Request
from mllm_jax.inference.running import Running
from mllm_jax.inference.sampling import Draws
from mllm_jax.inference.settings import GREEDY
from mllm_jax.inference.sizes import GROUPS, Sizes, bucket
from mllm_jax.models import lora
from mllm_jax.models.mllm import Mllm

NOT_YET = -1  # in place of a token that the host has not seen


class _Step(NamedTuple):
  """What was begun for running requests: `places` of each among the `rows` of tokens [count, rows], of the last of
  these, and of candidates."""

  running: Sequence[Running]
  places: Sequence[Sequence[int]]
  rows: int
  count: int
  tokens: jax.Array
  last: jax.Array | None
  candidates: tuple[jax.Array, jax.Array] | None


class Engine:
  """A model that answers. Not thread-safe: one thread owns it.

  Requests wait until rows of the KV cache are free, are read in, and then get a token each at every step, whatever
  their settings. An answer depends on its own request alone; in float32 its tokens are the same in any company, in
  lower precision up to rounding, since other shapes may add in another order. The cache grows and shrinks with what
  runs, in a few sizes, each compiled once. Adapters are folded into their kernels, unless those are int8.

  Args:
    model: its arrays may be spread over devices.
    processor: decodes, and knows which tokens end an answer: the template's and the language model's own.
    rows: requests answered at once; a request with beams takes a row for each.
    max_length: places of a row, for prompt and answer together, which a server knows: prompts and cache then come in
      few sizes, so that `warm_up` has little to compile. None: no limit, and more sizes, which waste less.
    mesh: where rows are split over the batch axes of `mllm_jax.sharding`, which makes `rows` a multiple of their
      parts; with several processes each makes the same calls and gets every answer. None: the device of the model.
  """

  def __init__(
    self, model: Mllm, processor: Processor, *, rows: int = 8, max_length: int | None = None, mesh: Mesh | None = None
  ):
    if rows < 1:
      raise ValueError(f"rows is {rows}; it must be at least 1")
    self.mesh = mesh if mesh is not None and mesh.size > 1 else None
    self._shards = 1 if self.mesh is None else sharding.batch_shards(self.mesh)
    self.rows = -(-rows // self._shards) * self._shards
    self.max_length = max_length
    self.processor = processor
    self.end_ids = frozenset((processor.end_id, *processor.tokenizer.end_ids))
    if model.config.lora.rank and not model.config.int8_decoder:
      model = lora.merge(model)
    self._programs, self._flat, self._decoding = parameters_of(model, self.mesh)
    self._likelihoods = likelihood.program_for(parameters.flatten(model)[0], self.mesh)
    self._empty = self._programs.empty()
    self._cache, self._size = self._empty, (self._shards, 0)
    self._sizes = Sizes(self.rows, self._shards, max_length)
    self._features = FeatureCache()
    self._crops, self._blank = 0, None  # crops that every prompt has at least, and what stands for one that it has not
    self._tickets = itertools.count()
    self._waiting: collections.OrderedDict[int, Request] = collections.OrderedDict()
    self._running: dict[int, Running] = {}
    self._begun: _Step | None = None

  @property
  def waiting(self) -> int:
    """Requests that have no row yet."""
    return len(self._waiting)

  @property
  def running(self) -> int:
    """Requests that are being answered."""
    return len(self._running)

  def submit(self, request: Request) -> int:
    """Queues a request; the ticket that its events will bear.

    Raises:
      ValueError: prompt and answer could take more than max_length places, or there are more beams than rows.
    """
    longest = request.prompt_tokens + request.max_new_tokens
    if not request.prompt_tokens:
      raise ValueError("the prompt is empty; a row needs at least one token")
    if self.max_length is not None and longest > self.max_length:
      raise ValueError(
        f"the prompt takes {request.prompt_tokens} places and max_new_tokens is {request.max_new_tokens}, together "
        f"{longest}; there are {self.max_length}"
      )
    if request.beams > self.rows:
      raise ValueError(f"beams is {request.beams}, and there are {self.rows} rows")
    ticket = next(self._tickets)
    self._waiting[ticket] = request
    return ticket

  def cancel(self, ticket: int) -> None:
    """Forgets a request, and frees its rows. Does nothing about one that is finished or was never there."""
    self._waiting.pop(ticket, None)
    self._running.pop(ticket, None)
    if not self._running:
      # Whoever cancels may have interrupted a step, which had given the cache away and not got it back.
      self._begun = None
      self._cache, self._size = self._empty, (self._shards, 0)

  def step(self) -> list[Event]:
    """Reads in waiting requests as far as rows are free, which gives them their first token; where none could be, gives
    all running ones a token, or a few (see `Programs.at_once`). What became of each."""
    with self._on_mesh():
      return self._admit() or self._decode()

  def answer(self, requests: Sequence[Request], progress: Callable[[int, int], None] | None = None) -> list[Answer]:
    """Answers all requests, in their order; `progress` is told (answered, all) whenever some have been.

    Raises:
      ValueError: as `submit`, before any is answered.
      RuntimeError: other requests are under way.
    """
    self._idle()
    order = sorted(range(len(requests)), key=lambda i: -requests[i].prompt_tokens)  # of like length, side by side
    tickets = {}
    try:
      for i in order:
        tickets[self.submit(requests[i])] = i
      answers: dict[int, Answer] = {}
      while self._waiting or self._running:
        before = len(answers)
        answers |= {tickets[event.ticket]: event.answer for event in self.step() if event.answer is not None}
        if progress is not None and len(answers) > before:
          progress(len(answers), len(requests))
    finally:
      for ticket in tickets:
        self.cancel(ticket)
    return [answers[i] for i in range(len(requests))]

  def stream(self, request: Request) -> Iterator[Event]:
    """The events of one request, the last with its answer. Closing the iterator cancels it. Raises as `answer`, at the
    call."""
    self._idle()
    return self._stream(self.submit(request))

  def likelihoods(self, rows: Sequence[Row]) -> list[likelihood.Likelihood]:
    """How likely the model finds the answers in rows that `likelihood.answer_row` made, in their order.

    Raises ValueError where one takes more than max_length places.
    """
    longest = max((len(row.tokens) for row in rows), default=0)
    if self.max_length is not None and longest > self.max_length:
      raise ValueError(f"question and answer take {longest} places; there are {self.max_length}")
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].tokens))  # of like length, side by side
    found: dict[int, likelihood.Likelihood] = {}
    for start in range(0, len(order), self.rows):
      for part, count in self._sizes.grouped(order[start : start + self.rows]):
        group = [rows[i] for i in part]
        with self._on_mesh():
          made = likelihood.arrays(group, count, bucket(len(group[0].tokens), self._sizes.prompts))
          results = self._likelihoods(self._flat, *self._programs.on_devices(made), self._look(group, count))
        tokens = [int((row.loss_weights > 0).sum()) for row in group]
        sums, greedy = (x.tolist() for x in jax.device_get(results))
        found |= {i: likelihood.Likelihood(*fields) for i, *fields in zip(part, sums, tokens, greedy)}
    return [found[i] for i in range(len(rows))]

  def _stream(self, ticket: int) -> Iterator[Event]:
    try:
      while self._waiting or self._running:
        yield from self.step()
    finally:
      self.cancel(ticket)

  def _idle(self) -> None:
    if self._waiting or self._running:
      raise RuntimeError("other requests are under way; submit this one and call step")

  # ---- rows ----------------------------------------------------------------------------------------------------------

  def _admit(self) -> list[Event]:
    """Gives waiting requests rows, in their order, as long as there are enough for the next one."""
    taken = {slot for running in self._running.values() for slot in running.slots}
    free = [slot for slot in range(self.rows) if slot not in taken]
    admitted = []
    while self._waiting and next(iter(self._waiting.values())).beams <= len(free):
      ticket, request = self._waiting.popitem(last=False)
      slots, free = free[: request.beams], free[request.beams :]
      self._running[ticket] = Running(ticket, request, slots, self.processor.tokenizer.decode, self.end_ids)
      admitted.append(self._running[ticket])
    if not admitted:
      return []
    self._fit()
    admitted.sort(key=lambda running: running.request.prompt_tokens)
    return [event for group, size in self._sizes.grouped(admitted) for event in self._read(group, size)]

  def _fit(self) -> None:
    """Makes the cache as large as what runs needs, or smaller where it is twice that."""
    rows = max(slot for running in self._running.values() for slot in running.slots) + 1
    requests = [running.request for running in self._running.values()]
    places = max(
      max(bucket(each.prompt_tokens, self._sizes.prompts), each.prompt_tokens + each.max_new_tokens)
      for each in requests
    )
    size = self._sizes.of_cache(rows, places, self._size)
    if size != self._size:
      self._cache, self._size = self._programs.resize(self._cache, *size), size

  def _read(self, group: Sequence[Running], count: int) -> list[Event]:
    """Reads the prompts of a group, in `count` rows of one shape, and takes their first tokens."""
    places = bucket(max(running.request.prompt_tokens for running in group), self._sizes.prompts)
    rows = [_trimmed(running.request.row, running.request.prompt_tokens, places) for running in group]
    rows += rows[-1:] * (count - len(rows))
    prompts = np.stack([[row.tokens, row.visual_index, row.segment_ids] for row in rows], axis=1).astype(np.int32)
    slots = np.full(count, self.rows, np.int32)  # nowhere
    slots[: len(group)] = [running.slots[0] for running in group]
    settings = [(running.request.sampling, running.request.seed, 0) for running in group]
    draws = Draws.of(settings + [(GREEDY, 0, 0)] * (count - len(group)))
    put, features = self._programs.on_devices, self._look([running.request.row for running in group], count)
    tokens, candidates, read = self._programs.prefill(
      self._flat, put(prompts), features, put(draws), candidates=self._candidates(group)
    )
    self._cache = self._programs.write(self._cache, read, put(slots))
    places = [[i] * len(running.slots) for i, running in enumerate(group)]  # all beams begin as the one row
    return self._take(_Step(group, places, count, 1, tokens, None, candidates))

  def _look(self, rows: Sequence[Row], count: int) -> tuple[jax.Array, ...]:
    """The visual tokens of the rows' crops, as many for every row; those seen before are not looked at again."""
    known, crops = {}, [digests(row) for row in rows]
    new = {}
    for row, of_row in zip(rows, crops):
      for k, digest in enumerate(of_row):
        known[digest] = self._features.get(digest)
        if known[digest] is None:
          new[digest] = row.patches[k], row.grids[k]
    for part, size in self._sizes.grouped(list(new.items())):
      filled = part + part[-1:] * (size - len(part))
      arrays = self._programs.on_devices(tuple(np.stack(x) for x in zip(*(crop for _, crop in filled))))
      for (digest, _), tokens in zip(part, self._programs.encode(self._flat, *arrays)):
        known[digest] = tokens
        self._features.put(digest, tokens)
    most = max(map(len, crops))
    most = max(1 << (most - 1).bit_length() if most else 0, self._crops)
    if not most:
      return ()
    any_tokens = next(iter(known.values()), self._blank)  # stand where a row has no crop; nothing refers to them
    padded = [[known[digest] for digest in of_row] + [any_tokens] * (most - len(of_row)) for of_row in crops]
    return tuple(itertools.chain(*padded, [any_tokens] * (most * (count - len(rows)))))

  def _decode(self) -> list[Event]:
    """The next tokens of every running request but those admitted since the step under way was begun.

    The next step is begun before this one's tokens are looked at: it takes them where they were computed, so that no
    device waits for the host. What it computes for a request that they end is not used. A beam search chooses between
    the steps, so beside one no step is begun early.
    """
    if not self._running:
      return []
    step = self._begun or self._begin(None)
    beginning = all(each.search is None for each in self._running.values()) and step.rows == self._size[0]
    self._begun = self._begin(step) if beginning else None
    events = self._take(step)
    if not self._running:
      self._begun = None
    return events

  def _begin(self, before: _Step | None) -> _Step | None:
    """Begins a step of all running requests; None where those of the step `before` are all at their end.

    `before`: begun, its tokens not taken yet.
    """
    rows = self._size[0]
    pending = {each.ticket for each in before.running} if before is not None else set()
    last = np.zeros((rows, 2), np.int32)  # a free row writes into its first places, which a prompt will overwrite
    settings = [(GREEDY, 0, 0)] * rows
    running = []
    for each in self._running.values():
      count = each.count + (before.count if each.ticket in pending else 0)
      if count >= each.request.max_new_tokens:
        continue
      running.append(each)
      for slot, token in zip(each.slots, [NOT_YET] if each.ticket in pending else each.last):
        last[slot] = token, each.request.prompt_tokens + count - 1
        settings[slot] = (each.request.sampling, each.request.seed, count)
    if not running:
      return None
    inputs = self._programs.on_devices((last, Draws.of(settings)))
    known = self._programs.unknown(rows) if before is None else before.last
    candidates = self._candidates(running)
    count = 1 if candidates else self._programs.at_once
    tokens, last, likeliest, self._cache = self._programs.decode(
      self._decoding, *inputs, known, self._cache, candidates=candidates, count=count
    )
    return _Step(running, [each.slots for each in running], rows, count, tokens, last, likeliest)

  def _take(self, step: _Step) -> list[Event]:
    """Gives requests their next tokens, or their beams' candidates."""
    tokens, candidates = jax.device_get((step.tokens, step.candidates))
    sources, events = {}, []
    for each, own in zip(step.running, step.places):
      if each.ticket not in self._running:
        continue
      if each.search is None:
        for token in tokens[:, own[0]]:
          events.append(each.take(int(token)))
          if events[-1].answer is not None:
            break
      else:
        event, parents = each.search_on(*(x[np.array(own)] for x in candidates))
        events.append(event)
        beams = each.slots if len(set(own)) > 1 else each.slots[:1] * len(own)
        sources |= {slot: beams[parent] for slot, parent in zip(each.slots, parents)}
      if events[-1].answer is not None:
        del self._running[each.ticket]
    self._move(sources)
    return events

  def _move(self, sources: dict[int, int]) -> None:
    """Copies rows of the cache: {to: from}, the others stay."""
    if any(to != source for to, source in sources.items()):
      order = np.array([sources.get(slot, slot) for slot in range(self._size[0])], np.int32)
      self._cache = self._programs.permute(self._cache, self._programs.on_devices(order))

  def _candidates(self, running) -> int:
    """How many continuations of each row the widest beam search among these requests looks at."""
    beams = max((each.request.beams for each in running if each.search is not None), default=0)
    return beams * (1 + len(self.end_ids))

  def warm_up(self) -> list[Callable[[], None]]:
    """Compiles what requests of up to max_length places and one picture need, beams apart, so that none waits for it.
    Only while nothing runs. Raises RuntimeError without a max_length.

    Returns what compiles the rest, to be called whenever there is time: without it prompts that wait together are read
    one by one.
    """
    self._idle()
    if self.max_length is None:
      raise RuntimeError("an engine without max_length has no end of sizes to compile; give it one")
    sizes = [size for size in GROUPS if size == 1 or size * self._shards * 3 <= 4 * self.rows]
    # One number of crops for all prompts, so that there is one program and not one for each.
    self._crops = 1 << (self.processor.aspect.most_crops - 1).bit_length()
    for places in self._sizes.prompts:
      self._warm_up_reading(sizes[:1], places)
    programs, put = self._programs, self._programs.on_devices
    with self._on_mesh():
      for rows, places in itertools.product(self._sizes.rows, self._sizes.cache):
        cache, last = programs.resize(self._empty, rows, places), put(np.zeros((rows, 2), np.int32))
        draws, known = put(Draws.of([(GREEDY, 0, 0)] * rows)), programs.unknown(rows)
        programs.decode(self._decoding, last, draws, known, cache, candidates=0, count=programs.at_once)
    groups = [sizes[:count] for count in range(2, len(sizes) + 1)]
    return [functools.partial(self._warm_up_reading, *each) for each in itertools.product(groups, self._sizes.prompts)]

  def _warm_up_reading(self, groups: Sequence[int], places: int) -> None:
    """Compiles what reads as many prompts as the last of `groups` says, of so many places. These become the sizes of
    groups when it was done for all places."""
    programs, put = self._programs, self._programs.on_devices
    count, aspect = groups[-1] * self._shards, self.processor.aspect
    crops = np.zeros((count, aspect.patches, aspect.vision.patch_values), np.uint8), np.ones((count, 2), np.int32)
    prompts = np.stack([np.zeros((count, places)), np.full((count, places), -1), np.ones((count, places))])
    draws, slots = Draws.of([(GREEDY, 0, 0)] * count), np.full(count, self.rows, np.int32)
    with self._on_mesh():
      self._blank = programs.encode(self._flat, *put(crops))[0]
      features = (self._blank,) * (self._crops * count)
      _, _, read = programs.prefill(self._flat, put(prompts.astype(np.int32)), features, put(draws), candidates=0)
      for rows, size in itertools.product(self._sizes.rows, self._sizes.cache):
        if size >= places and 4 * rows >= 3 * count:
          programs.write(programs.resize(self._empty, rows, size), read, put(slots))
    if places == self._sizes.prompts[-1]:
      self._sizes.groups = groups

  def _on_mesh(self):
    return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)


def _trimmed(row: Row, length: int, places: int) -> Row:
  """A prompt of `length` tokens, padded anew."""
  return pad_row(row._replace(**{field: getattr(row, field)[:length] for field in row._fields[:6]}), places)
