"""Eight fake CPU devices, and products in full float32, for every test."""

import os

# Both must be set before jax starts its backends.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of a test's time would go into optimising code that runs once or twice.
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)

import jax  # noqa: E402

jax.config.update("jax_default_matmul_precision", "highest")
