"""One of two processes of two devices each that ask an engine together: two_processes.py INDEX PORT."""

import os
import sys

import numpy as np
from flax import nnx
from tiny_models import TINY, Plain, prompt

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import jax  # noqa: E402

from mllm_jax import parameters, sharding  # noqa: E402
from mllm_jax.config import MeshConfig  # noqa: E402
from mllm_jax.inference.engine import Engine  # noqa: E402
from mllm_jax.inference.requests import Request  # noqa: E402
from mllm_jax.models.mllm import Mllm  # noqa: E402


def main(index: int, port: str) -> None:
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.distributed.initialize(f"127.0.0.1:{port}", 2, index)
  model = Mllm(TINY, rngs=nnx.Rngs(3))
  picture = np.full((56, 56, 3), 90, np.uint8)
  requests = [Request(prompt([1, -200, *range(5, 6 + n)], picture), 3) for n in range(3)]
  alone = Engine(model, Plain(), rows=3).answer(requests)
  mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2))
  graphdef, flat = parameters.flatten(model)
  shardings = sharding.parameter_shardings(flat, mesh)
  place = lambda x, where: jax.make_array_from_callback(x.shape, where, lambda part: np.asarray(x)[part])
  spread = parameters.unflatten(graphdef, {path: place(x, shardings[path]) for path, x in flat.items()})
  assert Engine(spread, Plain(), rows=3, mesh=mesh).answer(requests) == alone
  print("the same")


if __name__ == "__main__":
  main(int(sys.argv[1]), sys.argv[2])
