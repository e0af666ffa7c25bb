"""One training step: loss, gradient, update; and the state that it carries from step to step."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mllm_jax import parameters, sharding
from mllm_jax.batch import Batch
from mllm_jax.config import StageConfig
from mllm_jax.training import optimizer as optimizer_lib
from mllm_jax.training.loss import summed_cross_entropy


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Everything that a step changes, and that a checkpoint holds.

  step: int32, steps taken, applied or not. trainable: {path: float32 array}. optimizer: the moments.
  skipped, skipped_in_row: int32, steps whose loss or gradient was not finite, so far and just now in a row.
  """

  step: Any
  trainable: dict[str, Any]
  optimizer: Any
  skipped: Any
  skipped_in_row: Any


def state_shardings(optimizer: optax.GradientTransformation, trainable: dict[str, Any], mesh: Mesh) -> TrainState:
  """The sharding of each leaf of the state: moments lie where their parameter does."""
  specs, whole = sharding.parameter_shardings(trainable, mesh), sharding.replicated(mesh)
  moments = optax.tree_utils.tree_map_params(
    optimizer,
    lambda _, spec: spec,
    jax.eval_shape(optimizer.init, trainable),
    specs,
    transform_non_params=lambda _: whole,
  )
  return TrainState(whole, specs, moments, whole, whole)


def initial_state(optimizer: optax.GradientTransformation, trainable: dict[str, jax.Array], mesh: Mesh) -> TrainState:
  """The state before the first step. `trainable` may be arrays, or shapes under `jax.eval_shape`."""

  def make(trainable):
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, trainable, optimizer.init(trainable), zero, zero)

  return jax.jit(make, out_shardings=state_shardings(optimizer, trainable, mesh))(trainable)


def loss_and_tokens(model: nnx.Module, batch: Batch, dropout_key: jax.Array | None) -> tuple[jax.Array, jax.Array]:
  """(summed loss, number of trained tokens) of a batch [B, ...], float32 scalars."""
  loss = summed_cross_entropy(model.decoder, model.hidden(batch, dropout_key), batch.targets, batch.loss_weights)
  return loss, batch.loss_weights.sum()


def make_step(
  graphdef: nnx.GraphDef,
  stage: StageConfig,
  learning_rates: dict[str, float],
  steps: int,
  seed: int,
  mesh: Mesh,
  optimizer: optax.GradientTransformation,
  shardings: TrainState,
) -> Callable:
  """The compiled function (state, frozen, batch [A, B, ...]) -> (state, metrics); the state is donated.

  The A micro-batches' summed gradients are added in float32 and divided by all their trained tokens once: the result is
  the same however the batch is cut. (Averaging the micro-batches' means, as is often done, weighs tokens by the length
  of their neighbours.) A step whose loss or gradient is not finite changes nothing but the counters.
  """
  gradient = _gradient(graphdef, mesh)
  apply = _apply(stage, learning_rates, steps, optimizer)

  def step(state: TrainState, frozen: dict[str, jax.Array], batch: Batch):
    keys = _dropout_keys(seed, state.step, stage.accumulation)
    if stage.accumulation == 1:
      return apply(state, gradient(state.trainable, frozen, jax.tree.map(lambda x: x[0], batch), keys[0]))

    def add(total, xs):
      return jax.tree.map(jnp.add, total, gradient(state.trainable, frozen, *xs)), None

    return apply(state, jax.lax.scan(add, _zero(state.trainable), (batch, keys))[0])

  return jax.jit(step, donate_argnums=0, out_shardings=(shardings, sharding.replicated(mesh)))


class BucketedStep:
  """The step over micro-batches of several lengths: (state, frozen, A batches [1, B, ...]) -> (state, metrics).

  It computes what `make_step` does; but each micro-batch is a call of its own, compiled once for each length. The state
  is donated. The arguments are those of `make_step`.
  """

  def __init__(
    self,
    graphdef: nnx.GraphDef,
    stage: StageConfig,
    learning_rates: dict[str, float],
    steps: int,
    seed: int,
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
    shardings: TrainState,
  ):
    gradient = _gradient(graphdef, mesh)
    apply = _apply(stage, learning_rates, steps, optimizer)
    whole = sharding.replicated(mesh)

    def add(total, trainable, frozen, batch, step, index):
      key = _dropout_keys(seed, step, stage.accumulation)[index]
      new = gradient(trainable, frozen, jax.tree.map(lambda x: x[0], batch), key)
      return jax.tree.map(jnp.add, total, new)

    totals = (whole, whole, shardings.trainable)
    self._start = jax.jit(_zero, out_shardings=totals)
    self.add = jax.jit(add, donate_argnums=0, out_shardings=totals)
    self._apply = jax.jit(apply, donate_argnums=0, out_shardings=(shardings, whole))

  def __call__(self, state: TrainState, frozen: dict[str, jax.Array], batches: tuple[Batch, ...]):
    total = self._start(state.trainable)
    for index, batch in enumerate(batches):
      total = self.add(total, state.trainable, frozen, batch, state.step, index)
    return self._apply(state, total)


def _dropout_keys(seed: int, step: jax.Array, micro_batches: int) -> jax.Array:
  return jax.random.split(jax.random.fold_in(jax.random.key(seed), step), micro_batches)


def _zero(trainable: dict[str, jax.Array]):
  """(loss, trained tokens, gradient) of nothing."""
  zero = jnp.zeros((), jnp.float32)
  return zero, zero, jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), trainable)


def _gradient(graphdef: nnx.GraphDef, mesh: Mesh) -> Callable:
  """The function (trainable, frozen, batch [B, ...], dropout key) -> (summed loss, trained tokens, summed gradient)."""
  rows = NamedSharding(mesh, P(sharding.BATCH_AXES))

  def gradient(trainable, frozen, batch, key):
    def loss_fn(trainable):
      model = parameters.unflatten(graphdef, {**frozen, **trainable})
      return loss_and_tokens(model, jax.lax.with_sharding_constraint(batch, rows), key)

    (loss, tokens), grads = jax.value_and_grad(loss_fn, has_aux=True)(trainable)
    return loss, tokens, grads

  return gradient


def updated(
  state: TrainState,
  optimizer: optax.GradientTransformation,
  grads: dict[str, jax.Array],
  rates: dict[str, jax.Array],
  finite: jax.Array,
) -> TrainState:
  """The state after a step at these learning rates by path; where it is not `finite`, only the counters change."""
  updates, moments = optimizer.update(grads, state.optimizer, state.trainable)
  trainable = {path: value - rates[path] * updates[path] for path, value in state.trainable.items()}
  keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
  bad = 1 - finite.astype(jnp.int32)
  return TrainState(
    state.step + 1,
    keep(trainable, state.trainable),
    keep(moments, state.optimizer),
    state.skipped + bad,
    (state.skipped_in_row + 1) * bad,
  )


def _apply(
  stage: StageConfig, learning_rates: dict[str, float], steps: int, optimizer: optax.GradientTransformation
) -> Callable:
  """The function (state, what `_gradient` gave, summed over micro-batches) -> (state, metrics)."""
  factor = optimizer_lib.schedule(steps, stage.warmup_ratio)

  def apply(state: TrainState, totals):
    loss, tokens, grads = totals
    count = jnp.maximum(tokens, 1.0)
    loss, grads = loss / count, jax.tree.map(lambda g: g / count, grads)
    norm = parameters.norm(grads)
    if stage.clip_norm > 0:
      grads = jax.tree.map(lambda g: g * jnp.minimum(1.0, stage.clip_norm / (norm + 1e-6)), grads)
    scale = factor(state.step)
    rates = {path: learning_rates[path] * scale for path in state.trainable}
    state = updated(state, optimizer, grads, rates, jnp.isfinite(loss) & jnp.isfinite(norm))
    metrics = {
      "loss": loss,
      "grad_norm": norm,
      "learning_rate": scale * max(learning_rates.values()),
      "tokens": tokens,
      "skipped": state.skipped,
      "skipped_in_row": state.skipped_in_row,
    }
    return state, metrics

  return apply
