"""Where things lie: the mesh of devices, and the table from a parameter's path to its PartitionSpec.

Axes: `data` replicates the parameters, `fsdp` shards them and the batch, `tensor` shards the width of single layers.
The batch is split over data and fsdp together.
"""

import math
import re
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mllm_jax.batch import Batch
from mllm_jax.config import ConfigError, MeshConfig

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# Stacked layers have a leading axis of layers, which is never sharded: a scan over it would gather everything at once.
RULES: tuple[tuple[str, P], ...] = (
  (r".*/layers/(q_proj|k_proj|v_proj|gate_proj|up_proj|fc1)/kernel", P(None, "fsdp", "tensor")),
  (r".*/layers/(o_proj|out_proj|down_proj|fc2)/kernel", P(None, "tensor", "fsdp")),
  (r".*/layers/(q_proj|k_proj|v_proj|gate_proj|up_proj)/lora/a", P(None, "fsdp", None)),
  (r".*/layers/(q_proj|k_proj|v_proj|gate_proj|up_proj)/lora/b", P(None, "fsdp", "tensor")),
  (r".*/layers/(o_proj|down_proj)/lora/a", P(None, "tensor", "fsdp")),
  (r".*/layers/(o_proj|down_proj)/lora/b", P(None, None, "fsdp")),
  (r"decoder/embedding", P("tensor", "fsdp")),
  (r"decoder/head", P("fsdp", "tensor")),
  (r"vision/patch_embedding/kernel", P(None, "fsdp")),
  (r"vision/(class|position)_embedding", P()),
  (r"vision/layers/(attention|mlp)_scale", P()),
  # Over both axes along the input channels: the few spatial tokens they give stay whole (see rows_only). DFI's own
  # layers are small, and are not sharded for the same reason.
  (r"projector/(sfe/(kernels|depthwise)/\d+|sfe/kernel|dfi/kernel)", P(None, None, ("fsdp", "tensor"), None)),
  (r"projector/dfi/(query|key|value)/kernel", P()),
  (r"projector/sfe/pointwise/\d+/kernel", P(("fsdp", "tensor"), None)),
  (r"projector/sfe/queries", P()),
  (r"projector/sfe/.*/layers/.*(q_proj|k_proj|v_proj|fc1)/kernel", P(None, "fsdp", "tensor")),
  (r"projector/sfe/.*/layers/.*(out_proj|fc2)/kernel", P(None, "tensor", "fsdp")),
  (r"projector/(.*/)?(head|fc1|fc2)/kernel", P("fsdp", "tensor")),
  (r"projector/(patch_mlp/)?(in|out)_proj/kernel", P("fsdp", "tensor")),
  (r"projector/image_newline", P()),
  # VDIM is a million parameters, and stays whole like its maps (see rows_only); a deconvolution's kernel is [C, 4 C].
  (r"projector/pyramid/(stages/\d+/(range_proj|fixup)|fixup_proj)/\d+/kernel", P()),
  (r"projector/pyramid/stages/\d+/(range_temp|sigma_spatial)", P()),
  (r"projector/pyramid/stages/\d+/kernel", P("fsdp", "tensor")),
  # Few arrays of ConvNeXt's are large but its MLPs', which the first rules spread; the maps stay whole.
  (r"projector/pyramid/(convnext/.*(kernel|gamma)|laterals/\d/kernel)", P()),
  (r"heads/(downsamplers/\d+/(tap_scale|tap_bias|saliency/kernel)|scales/\d+/linear/kernel)", P()),
  (r"projector/resampler/(.*/)?(queries|pos_embed|level_embeddings)", P()),
  (r"projector/resampler/(.*/)?(level_projectors/\d+|q_proj|k_proj|v_proj|kv_proj)/kernel", P("fsdp", "tensor")),
  (r"projector/resampler/(.*/)?out_proj/kernel", P("tensor", "fsdp")),
  (r"projector/resampler/(merge|proj)/kernel", P("fsdp", "tensor")),
  (r".*/(bias|scale)", P()),
)


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
  """The mesh of all devices; over several slices, an axis' parts within a slice lie side by side in it.

  Raises ConfigError where the configured axes do not make up the devices of a slice, or the slices.
  """
  devices = jax.devices() if devices is None else devices
  slices = len({getattr(device, "slice_index", 0) for device in devices})
  inner = _sizes(config, "", len(devices) // slices, "devices at hand" if slices == 1 else "devices of a slice")
  outer = _sizes(config, "dcn_", slices, "slices")
  # Auto: the compiler propagates shardings. (make_mesh's own default is Explicit, where every gather must name its
  # output.)
  types = (jax.sharding.AxisType.Auto,) * len(AXES)
  if slices == 1:
    return jax.make_mesh(inner, AXES, devices=devices, axis_types=types)
  # Split: an axis need not be as long as one of a slice's torus.
  arranged = mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)
  return Mesh(arranged, AXES, axis_types=types)


def _sizes(config: MeshConfig, prefix: str, count: int, what: str) -> tuple[int, ...]:
  """The size of each axis, of which at most one is left open."""
  sizes = {axis: getattr(config, prefix + axis) for axis in AXES}
  given = ", ".join(f"mesh.{prefix}{axis}={size}" for axis, size in sizes.items())
  free = [axis for axis, size in sizes.items() if size == -1]
  known = math.prod(size for size in sizes.values() if size != -1)
  if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
    raise ConfigError(f"{given}: sizes must be 1 or more, and at most one of them -1")
  if free and count % known == 0:
    sizes[free[0]] = count // known
  elif known != count or free:
    raise ConfigError(f"{given} does not make up the {count} {what}; let one axis be -1")
  return tuple(sizes.values())


def row_share(mesh: Mesh, process: int) -> tuple[int, int]:
  """(which, of how many) share of a batch's rows a process has to make. Processes that an axis tensor runs through have
  the same share; where devices are joined as the hardware is, a share's rows need not lie side by side.

  Raises ConfigError where two processes have some rows in common and others not.
  """
  groups = mesh.devices.reshape(-1, mesh.shape["tensor"])
  rows: dict[int, set[int]] = {}
  for row, group in enumerate(groups):
    for device in group:
      rows.setdefault(device.process_index, set()).add(row)
  shares = sorted({tuple(sorted(each)) for each in rows.values()})
  if sum(map(len, shares)) != len(groups) or len({len(share) for share in shares}) != 1:
    sizes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    raise ConfigError(
      f"on a mesh of {sizes} the processes share some rows of a batch and not others; let mesh.tensor x "
      "mesh.dcn_tensor divide the devices of a process, or be a multiple of them"
    )
  return shares.index(tuple(sorted(rows[process]))), len(shares)


def first_of_share(mesh: Mesh, process: int) -> bool:
  """Whether no process before this one makes the same rows: that one alone writes down what is bad among them."""
  return row_share(mesh, process)[0] not in [row_share(mesh, other)[0] for other in range(process)]


def partition_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> P:
  """The spec of the first rule that matches the path. A dimension that its mesh axis does not divide stays whole.

  Raises ConfigError for a path that no rule knows, so that no parameter is replicated by oversight.
  """
  for pattern, spec in RULES:
    if re.fullmatch(pattern, path):
      parts = lambda axis: math.prod(mesh.shape[name] for name in (axis if isinstance(axis, tuple) else (axis,)))
      fits = lambda size, axis: axis is not None and size % parts(axis) == 0
      return P(*(axis if fits(size, axis) else None for size, axis in zip(shape, spec)))
  raise ConfigError(f"sharding.RULES has no rule for the parameter {path}; add one")


def parameter_shardings(flat: dict[str, Any], mesh: Mesh) -> dict[str, NamedSharding]:
  """{path: NamedSharding} for arrays or shapes by path."""
  return {path: NamedSharding(mesh, partition_spec(path, array.shape, mesh)) for path, array in flat.items()}


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, P())


def batch_shards(mesh: Mesh) -> int:
  """In how many parts the rows of a batch are split."""
  return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def to_device(batch: Batch, mesh: Mesh, *, leading: int = 0) -> Batch:
  """This process' rows of a host batch as global arrays split over the mesh; the `leading` axes stay whole."""
  sharding = NamedSharding(mesh, P(*(None,) * leading, BATCH_AXES))
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)


def rows_only(x: jax.Array) -> jax.Array:
  """Pins an activation [B, ...] to be split over its rows and nothing else, inside `jax.set_mesh(mesh)`; elsewhere no
  change.

  Where small activations meet kernels sharded over both fsdp and tensor, the compiler may otherwise split their last
  axis; jax 0.10 then computes wrong gradients for a concatenation along that axis (seen in DFI on a 2 x 2 x 2 mesh).
  """
  if not jax.sharding.get_abstract_mesh().axis_names:
    return x
  return jax.lax.with_sharding_constraint(x, P(BATCH_AXES))
