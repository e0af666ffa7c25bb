"""The fastest way to run a stage that fits: over micro-batches, what the backward pass recomputes, and the mesh."""

import copy
from collections.abc import Callable, Iterator

from mllm_jax.compilation import topologies
from mllm_jax.compilation.report import StageReport, compile_stage, gib
from mllm_jax.config import Config, ConfigError, MeshConfig
from mllm_jax.sharding import AXES

# From the fewest FLOPs to the least memory. "offload" is not tried: the roofline knows no rate between chip and host,
# and would take what goes there to be free.
REMATS = ("none", "named", "full")
MICRO_BATCHES = (1, 2, 4, 8, 16)


def meshes(chips: int) -> Iterator[MeshConfig]:
  """Parameters sharded over all chips; replicated twice; layers' widths over two and four."""
  yield MeshConfig(data=1, fsdp=-1, tensor=1)
  for data, tensor in ((2, 1), (1, 2), (1, 4)):
    if chips % (data * tensor) == 0 and chips > data * tensor:
      yield MeshConfig(data=data, fsdp=-1, tensor=tensor)


def candidate(config: Config, name: str, mesh: MeshConfig, remat: str, micro_batches: int) -> Config:
  config = copy.deepcopy(config)
  config.mesh.data, config.mesh.fsdp, config.mesh.tensor = mesh.data, mesh.fsdp, mesh.tensor
  config.model.remat = remat
  getattr(config, name).accumulation = micro_batches
  return config


def fit(
  config: Config, name: str, topology: topologies.Topology, devices: list, say: Callable[[str], None] = print
) -> StageReport | None:
  """Tries candidates, says how each does, and returns the fastest that fits, or None.

  Of each mesh and remat the fewest micro-batches that fit are taken, as more are never faster; a remat that makes more
  again is not tried where one that makes less has fitted in one micro-batch.
  """
  best: StageReport | None = None
  for mesh in meshes(topology.chips):
    for remat in REMATS:
      report = None
      for micro_batches in MICRO_BATCHES:
        try:
          report = compile_stage(candidate(config, name, mesh, remat, micro_batches), name, topology, devices)
        except ConfigError:  # this batch cannot be cut so
          break
        say(row(report))
        if report.fits:
          break
      if report is None or not report.fits:
        continue
      if best is None or _time(report) < _time(best):
        best = report
      if report.settings["accumulation"] == 1:
        break
  return best


def _time(report: StageReport) -> tuple[float, float]:
  return report.roofline.step, report.cost.flops


def row(report: StageReport) -> str:
  """One candidate in a line."""
  settings = report.settings
  mesh = "x".join(str(size) for size in settings["mesh"].values())
  result = (
    f"{report.roofline.step:7.3f} s ({report.roofline.bound}), MFU at most {report.roofline.mfu:.1%}"
    if report.fits
    else f"{gib(report.memory.over)} too much"
  )
  return (
    f"  mesh {mesh:9s} remat {settings['remat']:6s} micro-batches {settings['accumulation']:<3d} "
    f"{gib(report.memory.peak):>11s}  {result}"
  )


def overrides(report: StageReport) -> str:
  """The options that make a recipe so."""
  settings = report.settings
  return " ".join(
    [f"--config.mesh.{axis}={settings['mesh_config'][axis]}" for axis in AXES]
    + [f"--config.model.remat={settings['remat']}"]
    + [f"--config.{report.stage}.accumulation={settings['accumulation']}"]
  )
