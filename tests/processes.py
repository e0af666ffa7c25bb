"""How the tests' processes compile, and two of them of four CPU devices each on one machine."""

import os
import socket
from importlib.metadata import version
from pathlib import Path


def xla_flags(devices: int) -> str:
  """Most of a test's time would go into optimising code that runs once or twice."""
  flags = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
  if version("jaxlib").startswith("0.10."):
    flags += " --xla_cpu_use_fusion_emitters=false"  # these take as long again; later versions have nothing else
  return f"{flags} --xla_force_host_platform_device_count={devices}"


def free_port() -> int:
  with socket.socket() as found:
    found.bind(("127.0.0.1", 0))
    return found.getsockname()[1]


def environment(index: int, port: int) -> dict[str, str]:
  """Of one of the two."""
  return os.environ | {
    "XLA_FLAGS": xla_flags(4),
    "PYTHONPATH": str(Path(__file__).parents[1]),
    "JAX_PLATFORMS": "cpu",
    "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
    "JAX_NUM_PROCESSES": "2",
    "JAX_PROCESS_ID": str(index),
  }
