"""One probe: a linear head taught on frozen features, and tested."""

import collections
import dataclasses
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from mllm_jax import parameters
from mllm_jax.data.records import DataError
from mllm_jax.probes.examples import Data, Example
from mllm_jax.probes.features import Frozen

THREADS, AHEAD = 4, 2  # that decode; batches that are made before they are needed
MAX_BAD_SHARE, MINIMUM = 0.01, 100  # MJSynth has a few pictures that cannot be decoded
SHOWN = 4  # tests that are kept for the page
LOG_EVERY = 10


@dataclasses.dataclass(frozen=True)
class Settings:
  """Adam from `learning_rate` down half a cosine to 0 over `steps` of `batch_size` pictures. seed: of the order."""

  steps: int
  batch_size: int
  learning_rate: float
  seed: int = 0


@dataclasses.dataclass(frozen=True)
class Outcome:
  """metrics: by name. tested, unreadable: pictures. shown: (picture uint8 [H, W, 3], what is true, what was said)."""

  metrics: dict[str, float]
  tested: int
  unreadable: int
  head: dict[str, np.ndarray]
  shown: list[tuple[np.ndarray, Any, Any]]
  seconds: float


class Rows:
  """Batches of a task's rows. Pictures that cannot be used count nothing; `unreadable` says how many there were.

  Raises DataError where they are more than one in a hundred, or a batch has nothing else.
  """

  def __init__(self, task, examples: Sequence[Example], batch_size: int):
    self.task, self.examples, self.batch_size = task, examples, batch_size
    self.seen = self.unreadable = 0

  def batches(self, chosen: Iterable[np.ndarray]) -> Iterator[tuple[list[int], dict[str, Any]]]:
    """(which examples, {"patches": uint8 [B, P, 3 p p], "labels", "weights": float32 [B]}) for each of `chosen`; short
    ones are filled up with rows of weight 0."""
    with ThreadPoolExecutor(THREADS) as pool:
      made: collections.deque = collections.deque()
      for indices in chosen:
        made.append((indices.tolist(), [pool.submit(self._row, i) for i in indices.tolist()]))
        if len(made) > AHEAD:
          yield self._batch(*made.popleft())
      while made:
        yield self._batch(*made.popleft())

  def _row(self, index: int):
    try:
      return self.task.row(self.examples[index])
    except DataError as error:
      return error

  def _batch(self, indices: list[int], futures: list) -> tuple[list[int], dict[str, Any]]:
    rows = [future.result() for future in futures]
    good = [row for row in rows if not isinstance(row, DataError)]
    self.seen, self.unreadable = self.seen + len(rows), self.unreadable + len(rows) - len(good)
    if not good or (self.seen >= MINIMUM and self.unreadable > MAX_BAD_SHARE * self.seen):
      bad = next(row for row in rows[::-1] if isinstance(row, DataError)) if len(good) < len(rows) else ""
      raise DataError(f"{self.unreadable} of {self.seen} pictures cannot be used; of this batch: {bad}")
    weights = [float(not isinstance(row, DataError)) for row in rows] + [0.0] * (self.batch_size - len(rows))
    filled = [good[0] if isinstance(row, DataError) else row for row in rows] + good[:1] * (self.batch_size - len(rows))
    patches, labels = zip(*filled)
    labels = {name: np.stack([row[name] for row in labels]) for name in labels[0]}
    return indices, {"patches": np.stack(patches), "labels": labels, "weights": np.asarray(weights, np.float32)}


def order(count: int, settings: Settings) -> Iterator[np.ndarray]:
  """The examples of each step: all of them in an order of the seed's, then again in another."""
  rest, epoch = np.zeros(0, np.int64), 0
  for _ in range(settings.steps):
    while len(rest) < settings.batch_size:
      rest = np.concatenate([rest, np.random.default_rng([settings.seed, epoch]).permutation(count)])
      epoch += 1
    yield rest[: settings.batch_size]
    rest = rest[settings.batch_size :]


def schedule(settings: Settings) -> optax.Schedule:
  """The learning rate of each step, counted from 0."""
  return optax.cosine_decay_schedule(settings.learning_rate, settings.steps)


def programs(task, graphdef, settings: Settings):
  """(optimizer, step, predict), both compiled once for a shape of batches.

  step: (head, optimizer's state, frozen parameters, batch) -> (head, state, loss). predict: (head, frozen, patches).
  """
  optimizer = optax.adam(schedule(settings))

  def read(frozen, patches):
    model: Frozen = parameters.unflatten(graphdef, frozen)
    return task.read(model(patches, task.grid))

  logits = lambda head, features: features @ head["kernel"] + head["bias"]

  def step(head, state, frozen, batch):
    features = read(frozen, batch["patches"])

    def mean_loss(head):
      losses = task.loss(logits(head, features), batch["labels"])
      return jnp.sum(losses * batch["weights"]) / jnp.maximum(batch["weights"].sum(), 1)

    loss, gradient = jax.value_and_grad(mean_loss)(head)
    updates, state = optimizer.update(gradient, state, head)
    return optax.apply_updates(head, updates), state, loss

  predict = lambda head, frozen, patches: task.predict(logits(head, read(frozen, patches)))
  return optimizer, jax.jit(step, donate_argnums=(0, 1)), jax.jit(predict)


def new_head(task, graphdef, frozen) -> dict[str, jax.Array]:
  """A head that says nothing yet: zeros, which a linear map may start from."""
  features = lambda flat: task.read(parameters.unflatten(graphdef, flat)(patches, task.grid))
  side = parameters.unflatten(graphdef, frozen).vision.config.patch_size
  patches = jnp.zeros((1, task.grid[0] * task.grid[1], 3 * side * side), jnp.uint8)
  width = jax.eval_shape(features, frozen).shape[-1]
  return {"kernel": jnp.zeros((width, task.outputs)), "bias": jnp.zeros(task.outputs)}


def run(task, data: Data, graphdef, frozen: dict[str, jax.Array], settings: Settings, stage: str, log) -> Outcome:
  """Trains and tests a head. `log` is a MetricsLog, whose rows have this `stage`. Raises DataError as `Rows`."""
  start = time.perf_counter()
  optimizer, step, predict = programs(task, graphdef, settings)
  head = new_head(task, graphdef, frozen)
  rows = Rows(task, data.train, settings.batch_size)
  head = teach(step, head, optimizer.init(head), frozen, rows, settings, stage, log)
  tests = Rows(task, data.test, settings.batch_size)
  metrics, shown = examine(predict, head, frozen, tests, stage)
  named = {name.replace(" ", "_"): value for name, value in metrics.items()}
  log.write({"stage": stage, "step": settings.steps, **named})
  return Outcome(
    metrics,
    tests.seen - tests.unreadable,
    rows.unreadable + tests.unreadable,
    {name: np.asarray(value) for name, value in head.items()},
    shown,
    time.perf_counter() - start,
  )


def teach(step, head, state, frozen, rows: Rows, settings: Settings, stage: str, log) -> dict[str, jax.Array]:
  """All steps, each on the next batch; every tenth is logged."""
  since, logged = time.perf_counter(), 0
  with tqdm(total=settings.steps, desc=stage, unit="step", dynamic_ncols=True) as bar:
    for number, (_, batch) in enumerate(rows.batches(order(len(rows.examples), settings)), 1):
      head, state, loss = step(head, state, frozen, batch)
      bar.update()
      if number % LOG_EVERY and number < settings.steps:
        continue
      value = float(loss)  # waits for the step
      rate = settings.batch_size * (number - logged) / (time.perf_counter() - since)
      learning_rate = float(schedule(settings)(number - 1))
      log.write({"stage": stage, "step": number, "loss": value, "learning_rate": learning_rate, "samples_per_s": rate})
      bar.set_postfix(loss=f"{value:.3f}", samples_per_s=f"{rate:.1f}")
      since, logged = time.perf_counter(), number
  return head


def examine(predict, head, frozen, rows: Rows, stage: str) -> tuple[dict[str, float], list]:
  """(metrics, the first tests as `Outcome.shown`) of a head on all rows."""
  total, shown, task, examples = 0, [], rows.task, rows.examples
  everything = np.arange(len(examples))
  chosen = [everything[i : i + rows.batch_size] for i in range(0, len(examples), rows.batch_size)]
  for indices, batch in tqdm(rows.batches(chosen), total=len(chosen), desc=f"{stage}, test", dynamic_ncols=True):
    said = np.asarray(predict(head, frozen, batch["patches"]))
    for place in np.flatnonzero(batch["weights"]).tolist():
      example = examples[indices[place]]
      labels = {name: values[place] for name, values in batch["labels"].items()}
      true, guess, counts = task.examine(example, labels, said[place])
      total = total + counts
      if len(shown) < SHOWN:
        shown.append((np.asarray(example.open()), true, guess))
  return task.score(total, rows.seen - rows.unreadable), shown
