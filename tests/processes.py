"""Two processes of four CPU devices each on one machine."""

import os
import socket
from pathlib import Path


def free_port() -> int:
  with socket.socket() as found:
    found.bind(("127.0.0.1", 0))
    return found.getsockname()[1]


def environment(index: int, port: int) -> dict[str, str]:
  """Of one of the two."""
  return os.environ | {
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=4",
    "PYTHONPATH": str(Path(__file__).parents[1]),
    "JAX_PLATFORMS": "cpu",
    "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
    "JAX_NUM_PROCESSES": "2",
    "JAX_PROCESS_ID": str(index),
  }
