"""Accelerators: memory and peak rates of one chip.

TPU: Google Cloud's system architecture pages. NVIDIA: its data sheets, dense bfloat16. Bytes and operations in a second
of one chip; `ici` is what it can send to its slice's other chips over all its links at once, half of the bidirectional
figure that the pages give; `dcn` what it can send to other slices, its share of its host's network.
"""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """One chip. kinds: how `jax.Device.device_kind` begins. A rate that is not known is 0."""

  name: str
  kinds: tuple[str, ...]
  memory: int
  flops: float
  bandwidth: float
  ici: float = 0.0
  dcn: float = 0.0


V4 = Chip("v4", ("TPU v4",), 32 * GIB, 275e12, 1228e9, ici=150e9, dcn=6.25e9)
V5E = Chip("v5e", ("TPU v5 lite", "TPU v5e"), 16 * GIB, 197e12, 819e9, ici=200e9, dcn=3.125e9)
V5P = Chip("v5p", ("TPU v5p", "TPU v5"), 95 * GIB, 459e12, 2765e9, ici=600e9, dcn=6.25e9)
V6E = Chip("v6e", ("TPU v6 lite", "TPU v6e"), 32 * GIB, 918e12, 1640e9, ici=400e9, dcn=12.5e9)
TPUS = (V4, V5E, V5P, V6E)
GPUS = (
  Chip("A100 40 GB", ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"), 40 * GIB, 312e12, 1555e9, ici=300e9),
  Chip("A100 80 GB", ("NVIDIA A100",), 80 * GIB, 312e12, 2039e9, ici=300e9),
  Chip("H200", ("NVIDIA H200", "NVIDIA GH200"), 141 * 10**9, 989e12, 4800e9, ici=450e9),
  Chip("H100 PCIe", ("NVIDIA H100 PCIe",), 80 * GIB, 756e12, 2039e9),
  Chip("H100", ("NVIDIA H100",), 80 * GIB, 989e12, 3352e9, ici=450e9),
  Chip("L40S", ("NVIDIA L40S",), 48 * GIB, 362e12, 864e9),
  Chip("L4", ("NVIDIA L4",), 24 * GIB, 121e12, 300e9),
  Chip("A10", ("NVIDIA A10",), 24 * GIB, 125e12, 600e9),
  Chip("RTX 4090", ("NVIDIA GeForce RTX 4090",), 24 * GIB, 165e12, 1008e9),
  Chip("RTX 3090", ("NVIDIA GeForce RTX 3090",), 24 * GIB, 71e12, 936e9),
)


def lookup(device_kind: str) -> Chip | None:
  """The chip that a device's kind names, or None where it is not known. The longest beginning counts."""
  found = [(len(kind), chip) for chip in TPUS + GPUS for kind in chip.kinds if device_kind.startswith(kind)]
  return max(found, key=lambda pair: pair[0])[1] if found else None
