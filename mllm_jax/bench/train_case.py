"""What `python -m mllm_jax.bench train` times, and this project's side of it.

The case is the second stage of configs/sp_cropping.py in one of three sizes, and a batch of the shape that the recipe
makes. This project's side is the trainer's own step, on one device, with random weights that are made there.
"""

import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax import build, chips, flops, parameters, recipes, sharding
from mllm_jax.batch import Batch
from mllm_jax.bench import decode
from mllm_jax.config import MeshConfig, ModelConfig, ModelRecipe, ProjectorConfig, StageConfig
from mllm_jax.models import attention, projectors
from mllm_jax.models.mllm import abstract
from mllm_jax.training import optimizer as optimizer_lib
from mllm_jax.training import step as step_lib

FULL = ProjectorConfig(kind="spatial", maps="cropping", stride=2, dfi_kernel=16, conv_width=512)
DEMO = ProjectorConfig(kind="spatial", maps="cropping", stride=1, dfi_kernel=5, conv_width=64)
ROWS = 16  # of a device: the released recipe's 128 on its eight cards
BEFORE = 35  # tokens before the picture: Vicuna's system prompt and "USER: "
SCHEDULE_STEPS = 1000  # of the learning rate
TURN = 3  # steps


@dataclasses.dataclass(frozen=True)
class Case:
  """What both sides train. rates: the learning rate of every parameter by path, 0 where it is frozen."""

  name: str
  recipe: ModelRecipe
  stage: StageConfig
  model: ModelConfig
  shapes: dict[str, jax.ShapeDtypeStruct]
  rates: dict[str, float]

  def facts(self, batch: Batch, device_kind: str) -> dict[str, Any]:
    """What a side tells before its first turn. device_flops: that the device can do a second, 0 where not known."""
    chip = chips.lookup(device_kind)
    return {
      "model": self.name,
      "rows": self.stage.batch_size,
      "length": self.stage.data.max_length,
      "dtype": self.model.dtype,
      "remat": self.model.remat,
      "steps": TURN,
      "tokens": int((batch.segment_ids > 0).sum()),
      "flops": flops.counter(self.model, self.shapes, self.rates)(batch),
      "device": device_kind,
      "device_flops": chip.flops if chip else 0.0,
    }


def make_case(name: str, rows: int, length: int, remat: str, accelerator: bool) -> Case:
  """The case of these options, of which "" and 0 stand for what suits the device. Raises SystemExit where a row has no
  room for a picture."""
  name = name or ("7b" if accelerator else "demo")
  if name == "demo":
    config = recipes.demo("sp_cropping", DEMO)
  else:
    config = recipes.full_size("sp_cropping", FULL, "weights/vicuna-7b-v1.5", "vicuna_v1")
  dtype = "bfloat16" if accelerator else "float32"
  recipe = dataclasses.replace(config.model, dtype=dtype, frozen_dtype=dtype, remat=remat or config.model.remat)
  data = dataclasses.replace(config.finetune.data, max_length=length or config.finetune.data.max_length)
  stage = dataclasses.replace(config.finetune, batch_size=rows or ROWS, data=data)
  model = build.architecture(recipe, stage.lora, packed=data.batching == "pack")
  if name == "300m":
    smaller = dataclasses.replace(FULL, conv_width=128)
    model = dataclasses.replace(model, vision=decode.TOWER, decoder=decode.MODELS["300m"], projector=smaller)
  shortest = BEFORE + projectors.tokens_per_crop(model) + 2
  if data.max_length < shortest:
    raise SystemExit(f"--length={data.max_length}: a prompt, a picture and an answer take {shortest} at least")
  shapes = parameters.flatten(abstract(model))[1]
  return Case(name, recipe, stage, model, shapes, parameters.match(stage.parameters, list(shapes), "parameters"))


def make_batch(case: Case, lengths: np.ndarray | None = None) -> Batch:
  """A host batch [1, B, ...] of random conversations about a picture each; the second half of what follows the picture
  is trained on. lengths [B]: tokens of each row, with padding after them; None: whole rows."""
  draw = np.random.default_rng(0)
  vision, shape = case.model.vision, (case.stage.batch_size, case.stage.data.max_length)
  place = np.broadcast_to(np.arange(shape[1]), shape)
  ends = np.broadcast_to(shape[1] if lengths is None else np.asarray(lengths)[:, None], (shape[0], 1))
  behind = BEFORE + projectors.tokens_per_crop(case.model)
  real, visual = place < ends, (place >= BEFORE) & (place < behind)
  tokens = np.where(real & ~visual, draw.integers(3, case.model.decoder.vocab_size, shape), 0)
  answer = real & (place >= (behind + ends) // 2)
  following = lambda x: np.pad(x[:, 1:], ((0, 0), (0, 1)))
  whole = np.full((shape[0], 1, 2), vision.grid)
  fields = Batch(
    tokens=tokens,
    targets=following(np.where(answer, tokens, 0)),
    loss_weights=following(answer),
    segment_ids=real,
    positions=np.where(real, place, 0),
    visual_index=np.where(visual, place - BEFORE, -1),
    patches=draw.integers(0, 256, (shape[0], 1, vision.grid**2, vision.patch_values), np.uint8),
    grids=whole,
  )
  dtypes = Batch(*[np.int32] * 2, np.float32, *[np.int32] * 3, np.uint8, np.int32)
  return jax.tree.map(lambda x, dtype: x[None].astype(dtype), fields, dtypes)


class Ours:
  """The trainer's step. `flat` is for tests: every parameter by path."""

  def __init__(self, case: Case, batch: Batch, flat: dict[str, jax.Array] | None = None):
    self.mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    self.device = self.mesh.devices.flat[0]
    dtypes = build.stored_dtypes(case.recipe, case.shapes, case.rates)
    targets = build.placed({path: (x.shape, dtypes[path]) for path, x in case.shapes.items()}, self.mesh)
    flat = random_parameters(targets) if flat is None else flat
    trainable = {path: x for path, x in flat.items() if case.rates[path]}
    self.frozen = {path: x for path, x in flat.items() if not case.rates[path]}
    optimizer = optimizer_lib.make(case.stage, trainable)
    self.state = step_lib.initial_state(optimizer, trainable, self.mesh)
    shardings = step_lib.state_shardings(optimizer, trainable, self.mesh)
    rates = {path: case.rates[path] for path in trainable}
    graphdef = parameters.flatten(abstract(case.model))[0]
    step = step_lib.make_step(graphdef, case.stage, rates, SCHEDULE_STEPS, 0, self.mesh, optimizer, shardings)
    del flat, trainable  # the state has its own
    self.batch = sharding.to_device(batch, self.mesh, leading=1)
    with jax.set_mesh(self.mesh):
      self.compiled = step.lower(self.state, self.frozen, self.batch).compile()
      attend = attention_of(case.model)
    self.facts = case.facts(batch, self.device.device_kind) | {
      "platform": self.device.platform,
      "attention": attend,
      "loss": self.step(),
    }

  def step(self) -> float:
    """Takes one step. Returns its loss; raises RuntimeError where that or its gradient is not finite."""
    self.state, metrics = self.compiled(self.state, self.frozen, self.batch)
    if jax.block_until_ready(metrics["skipped"]):
      raise RuntimeError(f"the loss ({metrics['loss']}) or its gradient is not finite")
    return float(metrics["loss"])

  def turn(self) -> float:
    """Seconds of TURN steps, handed over as the trainer does: the host waits for the last."""
    start = time.perf_counter()
    for _ in range(TURN):
      self.state, _ = self.compiled(self.state, self.frozen, self.batch)
    jax.block_until_ready(self.state)
    return time.perf_counter() - start

  def peak(self) -> tuple[int, str]:
    """Most bytes of the device so far, and how that is known."""
    plan = self.compiled.memory_analysis()
    planned = plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes
    planned -= plan.alias_size_in_bytes
    counted = (self.device.memory_stats() or {}).get("peak_bytes_in_use")
    if counted is None:
      return planned, "as the step is compiled"
    return counted, f"of the device, by its allocator; as the step is compiled {parameters.readable(planned)}"


def attention_of(model: ModelConfig) -> str:
  """How decoder and tower attend, as the dispatcher chooses under the mesh that is set."""
  dtype, choose = jnp.dtype(model.dtype), functools.partial(attention.choose, model.attention)
  decoder = choose(packed=model.packed, dtype=dtype, head_width=model.decoder.head_width)
  tower = choose(packed=False, dtype=dtype, head_width=model.vision.width // model.vision.heads)
  return decoder if decoder == tower else f"{decoder}, the tower's {tower}"


def random_parameters(targets: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
  """Every parameter by path, each made where it shall lie and in its type; on several devices each makes its shard."""
  flat = {}
  for index, (path, x) in enumerate(targets.items()):
    value = 1.0 if path.endswith("/scale") else 0.0 if path.endswith(("/bias", "/lora/b")) else None
    flat[path] = _draw(x.shape, x.dtype, x.sharding, value)(jax.random.fold_in(jax.random.key(0), index))
  return flat


@functools.cache
def _draw(shape, dtype, place, value):
  """The compiled function key -> array of normal numbers with deviation 0.02, or of one value."""
  if value is not None:
    return jax.jit(lambda key: jnp.full(shape, value, dtype), out_shardings=place)
  return jax.jit(lambda key: (0.02 * jax.random.normal(key, shape)).astype(dtype), out_shardings=place)
