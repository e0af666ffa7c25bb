"""Eight fake CPU devices, and products in full float32, for every test."""

import os
import tempfile

from processes import xla_flags

# Both must be set before jax starts its backends.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags(8)}"
# What one test has compiled, another takes, also in another process: the folder lasts as long as the first of them.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  compiled = tempfile.TemporaryDirectory(prefix="mllm_jax_compiled_", ignore_cleanup_errors=True)
  os.environ |= {"JAX_COMPILATION_CACHE_DIR": compiled.name, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}

import jax  # noqa: E402

jax.config.update("jax_default_matmul_precision", "highest")
