"""A tiny model, its batches and its training step, for the tests of this folder."""

import dataclasses

import jax
import numpy as np
from flax import nnx

from mllm_jax import parameters, recipes, sharding
from mllm_jax.batch import Batch
from mllm_jax.config import (
  DecoderConfig,
  LoraConfig,
  MeshConfig,
  ModelConfig,
  ProjectorConfig,
  StageConfig,
  VisionConfig,
)
from mllm_jax.models.mllm import Mllm, abstract
from mllm_jax.training import optimizer as optimizer_lib
from mllm_jax.training import step as step_lib

CONFIG = ModelConfig(
  vision=VisionConfig(image_size=112, width=32, layers=3, heads=4, mlp_width=64),
  decoder=DecoderConfig(vocab_size=64, width=32, layers=2, heads=4, kv_heads=2, head_width=8, mlp_width=48),
  projector=ProjectorConfig(stride=1, dfi_kernel=5, conv_width=16),
  lora=LoraConfig(rank=4, alpha=8.0, dropout=0.1),
  dtype="float32",
  remat="full",
)
TOKENS = 64 + 4


def make_batch(rows: int, seed: int = 0, places: int = 96) -> Batch:
  """`rows` rows; the last one is text only, and rows differ in how many tokens they train on."""
  rng = np.random.default_rng(seed)
  visual_index = np.full((rows, places), -1, np.int32)
  visual_index[:-1, 5 : 5 + TOKENS] = np.arange(TOKENS)
  trained = rng.random((rows, places)) < rng.random((rows, 1)) * 0.5
  segments = np.ones((rows, places), np.int32)
  segments[:, 90:] = 0
  patches = rng.integers(0, 256, (rows, 1, 64, 588)).astype(np.uint8)
  patches[-1] = 0
  grids = np.full((rows, 1, 2), 8, np.int32)
  grids[-1] = 0
  return Batch(
    tokens=rng.integers(0, 64, (rows, places)).astype(np.int32),
    targets=rng.integers(0, 64, (rows, places)).astype(np.int32),
    loss_weights=(trained & (visual_index < 0) & (segments > 0)).astype(np.float32),
    segment_ids=segments,
    positions=np.broadcast_to(np.arange(places, dtype=np.int32), (rows, places)),
    visual_index=visual_index,
    patches=patches,
    grids=grids,
  )


def initial_parameters(scale: float = 4.0) -> dict[str, np.ndarray]:
  """Parameters of a fresh model, the adapters' B not zero, and everything larger so that each part matters."""
  _, flat = parameters.flatten(Mllm(CONFIG, rngs=nnx.Rngs(0)))
  rng = np.random.default_rng(1)
  flat = {
    path: np.asarray(value) * (scale if path.endswith("kernel") or "embedding" in path else 1)
    for path, value in flat.items()
  }
  return {
    path: rng.normal(size=value.shape).astype(np.float32) * 0.1 if path.endswith("lora/b") else value.astype(np.float32)
    for path, value in flat.items()
  }


class Training:
  """A stage on a mesh; `step(batch)` gives the metrics as floats."""

  def __init__(
    self, mesh_config=MeshConfig(), devices=1, steps=20, dropout=0.1, dtype="float32", bucketed=False, **stage
  ):
    """`dtype` is that of the computation and of the frozen parameters; `bucketed` takes a `BucketedStep`."""
    config = dataclasses.replace(CONFIG, lora=dataclasses.replace(CONFIG.lora, dropout=dropout), dtype=dtype)
    self.stage = StageConfig(lora=config.lora, parameters=recipes.parameter_table(1e-3, 1e-3), **stage)
    self.mesh = sharding.make_mesh(mesh_config, jax.devices()[:devices])
    flat = initial_parameters()
    rates = parameters.match(self.stage.parameters, list(flat), "parameters")
    places = sharding.parameter_shardings(flat, self.mesh)
    flat = {path: jax.device_put(value, places[path]) for path, value in flat.items()}
    trainable = {path: value for path, value in flat.items() if rates[path]}
    self.frozen = {path: value.astype(dtype) for path, value in flat.items() if not rates[path]}
    graphdef, _ = parameters.flatten(abstract(config))
    optimizer = optimizer_lib.make(self.stage, trainable)
    self.shardings = step_lib.state_shardings(optimizer, trainable, self.mesh)
    self.state = step_lib.initial_state(optimizer, trainable, self.mesh)
    make = step_lib.BucketedStep if bucketed else step_lib.make_step
    self.compiled = make(
      graphdef, self.stage, {path: rates[path] for path in trainable}, steps, 0, self.mesh, optimizer, self.shardings
    )

  def step(self, batch: Batch) -> dict[str, float]:
    """One step of a batch [B, ...], cut into the stage's micro-batches."""
    return self.take(jax.tree.map(lambda x: x.reshape(self.stage.accumulation, -1, *x.shape[1:]), batch))

  def take(self, batch: Batch | tuple[Batch, ...]) -> dict[str, float]:
    """One step of what the compiled step takes."""
    with jax.set_mesh(self.mesh):
      self.state, metrics = self.compiled(self.state, self.frozen, sharding.to_device(batch, self.mesh, leading=1))
      return {key: value.item() for key, value in jax.device_get(metrics).items()}
