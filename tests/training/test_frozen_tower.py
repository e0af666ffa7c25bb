"""The frozen vision tower runs forward only, once, and nothing inside it is kept."""

import jax
import jax.numpy as jnp
from steps import CONFIG, MeshConfig, make_batch

from mllm_jax import parameters, sharding
from mllm_jax.models.mllm import abstract
from mllm_jax.training import step as step_lib


def scans(jaxpr) -> list:
  """Every scan in a program, also in the functions that it calls."""
  found = []
  for equation in jaxpr.eqns:
    found += [equation] if equation.primitive.name == "scan" else []
    for value in equation.params.values():
      inner = getattr(value, "jaxpr", value)
      found += scans(inner) if hasattr(inner, "eqns") else []
  return found


def test_nothing_of_a_frozen_tower_is_differentiated():
  graphdef, flat = parameters.flatten(abstract(CONFIG))
  trained = {path for path in flat if path.startswith("projector/") or "/lora/" in path}
  bfloat16 = {path: jax.ShapeDtypeStruct(flat[path].shape, jnp.bfloat16) for path in flat.keys() - trained}
  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  gradient = step_lib._gradient(graphdef, mesh)
  with jax.set_mesh(mesh):
    traced = jax.make_jaxpr(gradient)(
      {path: flat[path] for path in trained}, bfloat16, make_batch(4), jax.random.key(0)
    )
  hidden = (4, CONFIG.vision.grid**2 + 1, CONFIG.vision.width)
  towers = [scan for scan in scans(traced.jaxpr) if any(out.aval.shape == hidden for out in scan.outvars)]
  assert len(towers) == 1 and not towers[0].params["reverse"]
  assert [out.aval.shape for out in towers[0].outvars] == [hidden]  # the last layer's result, and no layer's insides
