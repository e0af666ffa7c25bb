"""Compiling a stage for a topology, and what there is to say about it, for people and for machines."""

import dataclasses
import math
import re
import resource
import time
from typing import Any

import jax

from mllm_jax import build, flops, sharding
from mllm_jax.compilation import abstract_step, hlo, topologies
from mllm_jax.compilation.roofline import Roofline, roofline
from mllm_jax.config import Config
from mllm_jax.training import vdim_step

SHOWN = 8  # collectives in the printed report; the file has all
# What XLA says when a program does not fit: "(20.49G) exceeds available HBM (15.75G)", "Used 17.5G of 15.75G hbm".
TOO_LARGE = re.compile(r"\(?([\d.]+)([KMGT])\)? (?:exceeds available HBM|of) \(?([\d.]+)([KMGT])")


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes of a chip: what the step is given, what it needs besides, its code; and what there is."""

  arguments: float
  temporaries: float
  code: float
  limit: float

  @property
  def peak(self) -> float:
    return self.arguments + self.temporaries + self.code

  @property
  def over(self) -> float:
    """By how much it does not fit, or 0."""
    return max(0.0, self.peak - self.limit)


@dataclasses.dataclass(frozen=True)
class StageReport:
  """A stage compiled for a topology. FLOPs, bytes and collectives are of a step and one chip; where it does not fit,
  cost and roofline are None. seconds, cpu_seconds, host_memory: of compiling."""

  stage: str
  topology: topologies.Topology
  settings: dict[str, Any]
  memory: Memory
  model_flops: float
  samples: int
  cost: hlo.Cost | None
  roofline: Roofline | None
  seconds: float
  cpu_seconds: float
  host_memory: int

  @property
  def fits(self) -> bool:
    return self.memory.over == 0

  def to_json(self) -> dict[str, Any]:
    content = dataclasses.asdict(self)
    content["memory"] |= {"peak": self.memory.peak, "over": self.memory.over}
    content["topology"]["chips"] = self.topology.chips
    content["fits"] = self.fits
    if self.cost:
      content["executed_over_model"] = self.cost.flops / self.model_flops
      content["intensity"] = self.cost.flops / max(self.cost.bytes, 1)
      content["samples_per_s"] = self.samples / self.roofline.step if self.roofline.step else None
      content["cost"]["collectives"] = [
        dataclasses.asdict(c) | {"sent": c.sent * c.times} for c in self.cost.collectives
      ]
    return content


def compile_stage(config: Config, name: str, topology: topologies.Topology, devices: list) -> StageReport:
  """Compiles a stage's real step, with nothing loaded. Raises ConfigError or WeightsError as the trainer would."""
  started, cpu = time.perf_counter(), time.process_time()
  mesh = sharding.make_mesh(config.mesh, devices)
  stage = getattr(config, name)
  step = abstract_step.make(config, name, mesh)
  model_flops = stage_flops(config, name, step) / topology.chips
  arguments = sum(map(local_bytes, jax.tree.leaves(step.arguments)))
  cost = line = None
  try:
    compiled = step.lower().compile()
  except jax.errors.JaxRuntimeError as error:
    memory = too_large(str(error), arguments)
    if memory is None:
      raise
  else:
    stats = compiled.memory_analysis()
    outputs = max(0, stats.output_size_in_bytes - stats.alias_size_in_bytes)
    memory = Memory(
      stats.argument_size_in_bytes,
      stats.temp_size_in_bytes + outputs,
      stats.generated_code_size_in_bytes,
      topology.chip.memory,
    )
    cost = hlo.read(compiled.as_text())
    line = roofline(cost, topology.chip, model_flops)
  settings = {
    "mesh": dict(mesh.shape),
    "mesh_config": dataclasses.asdict(config.mesh),
    "batch_size": stage.batch_size,
    "accumulation": stage.accumulation,
    "remat": config.model.remat,
    "length": step.batch.tokens.shape[-1] if name != "vdim" else 0,
  }
  return StageReport(
    name,
    topology,
    settings,
    memory,
    model_flops,
    stage.batch_size,
    cost,
    line,
    time.perf_counter() - started,
    time.process_time() - cpu,
    resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
  )


def stage_flops(config: Config, name: str, step: abstract_step.AbstractStep) -> float:
  """Model FLOPs of a step on full rows."""
  vision = build.part_config(config.model.vision, "vision")
  stage = getattr(config, name)
  if name == "vdim":
    return flops.vdim_flops(vision, stage, step.flat, vdim_step.count_levels(config.model.projector))
  model = build.architecture(config.model, stage.lora)
  work = flops.full_work(step.batch, vision, model.decoder.sliding_window)
  return flops.step_flops(model, step.flat, step.rates, work)


def local_bytes(x: jax.ShapeDtypeStruct) -> int:
  """What one chip holds of an array."""
  return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize


def too_large(message: str, arguments: float) -> Memory | None:
  """What a program would have needed, from the compiler's refusal; None where it is another error."""
  found = TOO_LARGE.search(message)
  if "RESOURCE_EXHAUSTED" not in message or not found:
    return None
  size = lambda number, unit: float(number) * 1024 ** ("KMGT".index(unit) + 1)
  needed, limit = size(found[1], found[2]), size(found[3], found[4])
  whole = "temporaries" not in message  # then what it names is everything
  return Memory(arguments, needed - arguments if whole else needed, 0.0, limit)


# ---- for people ------------------------------------------------------------------------------------------------------


def gib(size: float) -> str:
  return f"{size / 2**30:,.2f} GiB" if size >= 2**27 else f"{size / 2**20:,.2f} MiB"


def flop(count: float) -> str:
  return f"{count / 1e12:,.2f} TFLOP" if count >= 1e11 else f"{count / 1e9:,.2f} GFLOP"


def text(report: StageReport) -> str:
  """The report of a stage, a screen long."""
  topology, memory, settings = report.topology, report.memory, report.settings
  mesh = " x ".join(f"{axis} {size}" for axis, size in settings["mesh"].items())
  slices = f" in {topology.slices} slices" if topology.slices > 1 else ""
  lines = [
    f"== {report.stage} on {topology.name}: {topology.chips} chips{slices} ({mesh}) ==",
    f"  batch        {settings['batch_size']} in {settings['accumulation']} micro-batch(es)"
    + (f" of {settings['length']} places" if settings["length"] else "")
    + f", remat {settings['remat']}",
    f"  memory       arguments {gib(memory.arguments)} + temporaries {gib(memory.temporaries)} + code "
    f"{gib(memory.code)} = {gib(memory.peak)} of {gib(memory.limit)} a chip",
  ]
  if not report.fits:
    lines.append(f"  does not fit: {gib(memory.over)} a chip too much")
  if report.cost:
    cost, line = report.cost, report.roofline
    lines += [
      f"  work         model {flop(report.model_flops)}, executed {flop(cost.flops)} a chip and step "
      f"(x {cost.flops / report.model_flops:.3f})",
      f"  bytes        {gib(cost.bytes)} to and from memory; {cost.flops / max(cost.bytes, 1):,.0f} FLOPs a byte",
      f"  collectives  {gib(sum(c.sent * c.times for c in cost.collectives))} sent",
    ]
    for c in cost.collectives[:SHOWN]:
      where = f"of {c.group} slices" if c.crosses else f"of {c.group}"
      lines.append(f"    {c.kind:19s} {gib(c.bytes):>12s} x {c.times:<6d} {where}: {gib(c.sent * c.times)} sent")
    if len(cost.collectives) > SHOWN:
      rest = sum(c.sent * c.times for c in cost.collectives[SHOWN:])
      lines.append(f"    and {len(cost.collectives) - SHOWN} smaller kinds and sizes: {gib(rest)} sent")
    if line.step:
      lines += [
        f"  at best      {line.step:.3g} s a step, bound by {line.bound} (compute {line.compute:.3g}, memory "
        f"{line.memory:.3g}, links {line.ici:.3g}" + (f", between slices {line.dcn:.3g}" if line.dcn else "") + ")",
        f"               {report.samples / line.step:,.1f} samples/s; MFU {line.mfu:.1%} at most",
      ]
  lines.append(
    f"  compiled in  {report.seconds:.0f} s ({report.cpu_seconds:.0f} s of CPU), host memory {gib(report.host_memory)}"
  )
  return "\n".join(lines)
