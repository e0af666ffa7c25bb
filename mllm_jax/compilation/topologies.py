"""Topologies by their Google Cloud accelerator names: v5e-16, v4-32, ...; and cpu-8, CPU devices of this machine.

Google counts v4 and v5p in TensorCores, of which a chip has two, and v5e and v6e in chips.
"""

import dataclasses
import math
import os
import re

from mllm_jax.chips import TPUS, Chip
from mllm_jax.config import ConfigError

CORES_A_CHIP = {"v4": 2, "v5p": 2, "v5e": 1, "v6e": 1}
PLANE = {  # v5e, v6e: a rectangle of chips
  1: (1, 1),
  4: (2, 2),
  8: (2, 4),
  16: (4, 4),
  32: (4, 8),
  64: (8, 8),
  128: (8, 16),
  256: (16, 16),
}
BLOCK = {  # v4, v5p: a box
  4: (2, 2, 1),
  8: (2, 2, 2),
  16: (2, 2, 4),
  32: (2, 4, 4),
  64: (4, 4, 4),
  128: (4, 4, 8),
  256: (4, 8, 8),
  512: (8, 8, 8),
  1024: (8, 8, 16),
}
LIBTPU = {
  "TPU_SKIP_MDS_QUERY": "1",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-1",
  "TPU_WORKER_HOSTNAMES": "localhost",
}
ALIASES = {"v5litepod": "v5e", "v6": "v6e"}


@dataclasses.dataclass(frozen=True)
class Topology:
  """`slices` slices of `shape` chips each. A chip of cpu-N has an N-th of this machine's memory and no known rates."""

  name: str
  chip: Chip
  shape: tuple[int, ...]
  slices: int = 1

  @property
  def chips(self) -> int:
    return math.prod(self.shape) * self.slices


def parse(name: str, slices: int = 1) -> Topology:
  """The topology of a Cloud name. Raises ConfigError that lists the known ones."""
  kind, _, number = name.partition("-")
  kind = ALIASES.get(kind, kind)
  if slices < 1:
    raise ConfigError(f"--slices={slices} must be 1 or more")
  if kind == "cpu" and re.fullmatch("[1-9][0-9]*", number):
    if slices > 1:
      raise ConfigError(f"--slices={slices}: {name} is one machine")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // int(number)
    return Topology(name, Chip("cpu", ("cpu",), memory, 0.0, 0.0), (int(number),))
  shapes = PLANE if CORES_A_CHIP.get(kind) == 1 else BLOCK
  sizes = (
    {f"{kind}-{chips * CORES_A_CHIP[kind]}": shape for chips, shape in shapes.items()} if kind in CORES_A_CHIP else {}
  )
  if f"{kind}-{number}" not in sizes:
    known = ", ".join(sizes) or "v4-32, v5e-16, v5p-64, v6e-16, ..., cpu-8"
    raise ConfigError(f"--topology={name} is unknown; known: {known}")
  return Topology(name, next(chip for chip in TPUS if chip.name == kind), sizes[f"{kind}-{number}"], slices)


def devices(topology: Topology) -> list:
  """Devices to compile for, which need not be there. Raises ConfigError where libtpu is missing for a TPU."""
  import jax

  if topology.chip.name == "cpu":
    try:
      jax.config.update("jax_num_cpu_devices", topology.chips)
    except RuntimeError:  # the backend has started; it may have enough of them
      pass
    found = jax.devices("cpu")
    if len(found) < topology.chips:
      raise ConfigError(f"--topology={topology.name}: this process has {len(found)} CPU devices already")
    return found[: topology.chips]
  try:
    import libtpu  # noqa: F401
  except ImportError as error:
    raise ConfigError(
      f"--topology={topology.name} needs TPU's compiler, which runs on any machine: pip install 'jax[tpu]'"
    ) from error
  # libtpu would ask the metadata server of a TPU VM, which is not there, complain about what it did not say, and keep
  # other processes off a TPU that it does not use.
  for name, value in LIBTPU.items():
    os.environ.setdefault(name, value)
  from jax.experimental import topologies

  options = {"num_slices": topology.slices} if topology.slices > 1 else {}
  if topology.chip.name == "v4":
    options["chip_config_name"] = "megacore"  # both cores of a chip as one device, as a TPU VM has them
  if topology.chips == topology.slices:
    options["chips_per_host_bounds"] = (1,) * 3
  shape = "x".join(map(str, topology.shape))
  return list(topologies.get_topology_desc(f"{topology.chip.name}:{shape}", "tpu", **options).devices)
