"""VDIM alone, out of whatever holds one: the checkpoint of its own training as released, a model or a projector of
LLaVA-UHD v2 as released, or a folder of ours.
"""

import re

from flax import nnx

from mllm_jax import parameters, places
from mllm_jax.config import ProjectorConfig
from mllm_jax.models.projectors import pyramid
from mllm_jax.places import Place
from mllm_jax.weights import folder, hiwin, parts, vdim_file
from mllm_jax.weights.io import Weights, open_weights
from mllm_jax.weights.known import WeightsError, read_json
from mllm_jax.weights.mapping import Ours
from mllm_jax.weights.recognise import recognise
from mllm_jax.weights.tables import Table
from mllm_jax.weights.tensors import Chosen, Tensors

RUN_MODEL = "model"  # where a training run leaves its finished model
PREFIX = "upsampler."
# Lightning saves the stack as `upsampler`; the multimodal model wraps that once more.
WRAPPED = (rf"^({parts.OUTER}mm_projector\.)?(upsampler\.){{1,2}}(?=(up\d+|fixup_proj\w*)\.)", PREFIX)
REST = (rf"(?!{re.escape(PREFIX)}(up\d+|fixup_proj\w*)\.).*", "no part of VDIM")
CORRECTION = rf"{re.escape(PREFIX)}fixup_proj(_[248]x)?\.1\.(weight|bias)"


def table(levels: int) -> Table:
  """The names of a VDIM of so many stages in each of the released checkpoints."""
  # With three stages the released class builds one more correction, and never uses it.
  unused = ((rf"{re.escape(PREFIX)}fixup_proj\.1\..*", "never used"),) if levels == 3 else ()
  return Table(hiwin.vdim_rows(levels, PREFIX), (REST, *unused), (WRAPPED,), ((CORRECTION, hiwin.LEVELS),))


def open_vdim(path: Place, config: ProjectorConfig, width: int = 0) -> Tensors:
  """VDIM's parameters by our paths, `projector/pyramid/...`, as the model with this projector needs them; none is read.

  Args:
    path: the .ckpt of the released training or its weights saved alone, a released model's folder or mm_projector.bin,
      a folder of ours, or that of a training run.
    config: what it is for; pyramid and levels are looked at.
    width: of the tower's features; 0: whatever the checkpoint's is.

  Raises WeightsError where there is none at that path, or it has other levels or another width.
  """
  if config.pyramid != "vdim":
    raise WeightsError(f"{path} is to be read as VDIM, and projector.pyramid={config.pyramid!r} has none")
  weights, needed = find(path), max(config.levels)
  ours = [name for name in weights.names() if name.startswith(f"{hiwin.PYRAMID}/")]
  stages = {name.split("/")[3] for name in ours if name.startswith(f"{hiwin.PYRAMID}/stages/")}
  found = len(stages) or hiwin.vdim_levels(weights.names())
  if not found:
    some = ", ".join(weights.names()[:4])
    raise WeightsError(f"{weights.path} holds no VDIM; its {len(weights.names())} tensors begin with {some}")
  if found != needed:
    raise WeightsError(
      f"{weights.path} holds a VDIM of {found} levels above the tower's, and projector.levels={config.levels} need one "
      f"of {needed}; use another checkpoint or other levels"
    )
  stored = stored_width(weights)
  if width and stored and stored != width:
    raise WeightsError(
      f"{weights.path} holds a VDIM of features of width {stored}, and the tower's have {width}; it was trained for "
      "another tower"
    )
  shapes = expected(config, stored or width)
  if not ours:
    return Ours(weights, table(needed), shapes)
  wrong = sorted(name for name in {*ours, *shapes} if name not in ours or weights.shape(name) != shapes.get(name))
  if wrong:
    raise WeightsError(f"{weights.path} holds another VDIM than projector.levels={config.levels} need: {wrong[:6]}")
  return Chosen(weights, shapes)


def find(path: Place) -> Weights:
  """The opened checkpoint in which VDIM stands."""
  path = places.place(path)
  if places.is_file(path):
    return open_weights(path)
  names = places.names(path) if places.is_dir(path) else []
  if folder.MANIFEST in names:
    return open_weights(path)
  left = places.join(path, str(vdim_file.FILE))
  if names and places.is_file(left):
    return open_weights(left)
  if "config.json" in names and {"pretrain", "finetune"} <= set(read_json(places.join(path, "config.json"), "")):
    model = places.join(path, RUN_MODEL)
    if not places.is_file(places.join(model, folder.MANIFEST)):
      raise WeightsError(
        f"{path} is a training run without its finished model; finish it, or export its last checkpoint"
      )
    return open_weights(model)
  found = recognise(path).parts
  if not found.keys() & {"projector", "vdim"}:
    raise WeightsError(f"{path} holds no VDIM; it has {', '.join(found)}")
  return found["projector" if "projector" in found else "vdim"].weights


def stored_width(weights: Weights) -> int:
  """C of the features that a VDIM was trained for, 0 where its correction, which tells, is missing."""
  paths = [name for name in weights.names() if re.fullmatch(rf"{hiwin.PYRAMID}/fixup_proj/\d/kernel", name)]
  rename = table(1).rename
  paths += [name for name in weights.names() if re.fullmatch(CORRECTION, rename(name)) and name.endswith("weight")]
  return weights.shape(paths[0])[0] if paths and weights.shape(paths[0]) else 0


def expected(config: ProjectorConfig, width: int) -> dict[str, tuple[int, ...]]:
  """{path: shape} of the pyramid of a projector over features of this width."""
  make = lambda: pyramid.make(config.pyramid, config.levels, width, nnx.Rngs(0))
  flat = parameters.flatten(nnx.eval_shape(make))[1]
  return {f"{hiwin.PYRAMID}/{path}": array.shape for path, array in flat.items()}
