"""The released names of LLaVA-UHD v2's projector and of VDIM: shapes, there and back, and every fault told."""

import dataclasses
import json
import re

import jax
import ml_dtypes
import numpy as np
import pytest
import released
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import save_file

from mllm_jax.config import ConfigError, DecoderConfig, ProjectorConfig, VisionConfig
from mllm_jax.weights import assemble, hiwin, mapping, mlp
from mllm_jax.weights.io import WeightsError, open_weights
from mllm_jax.weights.tables import LINEAR, SAME, Row, Table
from mllm_jax.weights.tensors import InMemory

SHAPES = json.loads((released.UHD / "state_dict_shapes.json").read_text())
SIZES = {
  "vicuna7b_mask7": (DecoderConfig(), (0, 1, 2)),
  "vicuna13b_mask5": (DecoderConfig(width=5120), (0, 2)),
  "qwen2_7b_mask5": (DecoderConfig(width=3584), (0, 2)),
}
VISION, DECODER = VisionConfig(width=16), DecoderConfig(width=256)
DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]


def config(**fields) -> ProjectorConfig:
  return ProjectorConfig(**{"kind": "hiwin", "levels": (0, 2)} | fields)


def shapes_of(projector: ProjectorConfig, vision=VISION, decoder=DECODER) -> dict[str, tuple[int, ...]]:
  return assemble.part_shapes("projector", {"vision": vision, "decoder": decoder, "projector": projector})


def arrays_of(projector: ProjectorConfig, dtype=np.float32) -> dict[str, np.ndarray]:
  draw = np.random.default_rng(0)
  return {path: draw.normal(0, 0.1, shape).astype(dtype) for path, shape in shapes_of(projector).items()}


class Shapes:
  """Arrays of which only the shape is known."""

  def __init__(self, shapes):
    self.shapes = shapes

  def names(self):
    return list(self.shapes)

  def shape(self, name):
    return self.shapes[name]

  def dtype(self, name):
    return np.dtype(np.float32)


def whole(projector: ProjectorConfig, dtype=np.float32, prefix: str = mlp.PREFIX) -> dict[str, np.ndarray]:
  """A projector as the released class saves it, with what it does not compute with."""
  table = dataclasses.replace(hiwin.table(projector), prefix=prefix)
  tensors = mapping.export(arrays_of(projector, dtype), table)
  extra = hiwin.placeholders(projector, VISION.width, DECODER.width)
  tensors |= {prefix + name: array.astype(dtype) for name, array in extra.items()}
  copy = "mm_projector.upsampler.model.0.vision_tower.vision_model.embeddings.class_embedding"
  return tensors | {prefix + copy: np.zeros(16, dtype)}


@pytest.mark.parametrize("size", SIZES)
def test_names_and_shapes_are_the_released_ones(size):
  decoder, levels = SIZES[size]
  projector = config(levels=levels)
  theirs = mapping.Theirs(Shapes(shapes_of(projector, VisionConfig(), decoder)), hiwin.table(projector))
  found = {name: theirs.shape(name) for name in theirs.names()}
  # The shapes of placeholders are those of small ones, with the widths put in their places.
  small = hiwin.placeholders(projector, 3, 5)
  full = {3: 1024, 5: decoder.width}
  found |= {mlp.PREFIX + name: tuple(full.get(n, n) for n in x.shape) for name, x in small.items()}
  wanted = {mlp.PREFIX + hiwin.STEM + name: tuple(shape) for name, shape in SHAPES[size].items()}
  assert len(wanted) == 58 and found == wanted


@pytest.mark.parametrize("levels, stack", [(1, "JBU2xStack"), (2, "JBU4xStack"), (3, "JBU8xStack")])
def test_names_of_vdim(levels, stack):
  rows = hiwin.vdim_rows(levels, "")
  unused = {"fixup_proj.1.weight", "fixup_proj.1.bias"} if levels == 3 else set()
  assert {row.foreign for row in rows} | unused == SHAPES[stack].keys()
  shapes = shapes_of(config(levels=(0, levels)), VisionConfig())
  for row in rows:
    assert row.transform.shape(tuple(SHAPES[stack][row.foreign])) == shapes[row.ours], row.foreign


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("levels", [(0, 2), (0, 1, 2), (1,), (0, 1, 2, 3), (0,)])
def test_there_and_back_bit_for_bit(tmp_path, levels, dtype):
  projector = config(levels=levels, pyramid="vdim" if max(levels) else "none", query_grid=8)
  arrays, table = arrays_of(projector, dtype), hiwin.table(projector)
  tensors = whole(projector, dtype)
  save_file(tensors, tmp_path / "model.safetensors")
  weights = open_weights(tmp_path)
  loaded = mapping.load(weights, table, {p: jax.ShapeDtypeStruct(a.shape, dtype) for p, a in arrays.items()})
  for path, array in arrays.items():
    assert loaded[path].dtype == dtype and np.asarray(loaded[path]).tobytes() == array.tobytes(), path
  mask = {hiwin.RELEASED_MASK: sum(2**level for level in levels)}
  assert hiwin.recognise(weights, mask, "config.json") == dataclasses.replace(
    projector, organisation="slices", separators="released"
  )


def test_what_stands_where():
  arrays = arrays_of(config())
  tensors = released.group(mapping.export(arrays, hiwin.table(config())), "model.mm_projector.")
  ours = released.group(arrays, "projector/resampler/attention/")
  np.testing.assert_array_equal(tensors["query_3"], ours["queries"][2])
  np.testing.assert_array_equal(tensors["feature_4x_embedding"][0, 0], ours["level_embeddings"][1])
  assert "feature_2x_embedding" not in tensors
  for part, name in enumerate("qkv"):
    rows = slice(part * 256, (part + 1) * 256)
    np.testing.assert_array_equal(tensors["attn.in_proj_weight"][rows], ours[f"{name}_proj/kernel"].T)
    np.testing.assert_array_equal(tensors["attn.in_proj_bias"][rows], ours[f"{name}_proj/bias"])
  np.testing.assert_array_equal(tensors["proj"], arrays["projector/resampler/proj/kernel"])
  np.testing.assert_array_equal(tensors["features_4x_projector.weight"], ours["level_projectors/1/kernel"].T)
  stage = released.group(tensors, "upsampler.upsampler.up2.")
  kernel = arrays["projector/pyramid/stages/1/fixup/0/kernel"]
  np.testing.assert_array_equal(stage["fixup_proj.0.weight"][:, :, 0, 0], kernel.T)
  assert stage["range_temp"] == arrays["projector/pyramid/stages/1/range_temp"]


class Counting:
  """Counts the numbers that are read."""

  def __init__(self, weights):
    self.weights, self.elements = weights, 0

  def __getattr__(self, name):
    return getattr(self.weights, name)

  def read(self, name, index=()):
    array = self.weights.read(name, index)
    self.elements += array.size
    return array


def test_parts_and_stacks_in_pieces(tmp_path, monkeypatch):
  """Onto devices and out again piece by piece: nothing is read twice, and a third of a packed tensor reads a third."""
  table = Table(
    (
      *(Row("packed", path, LINEAR, part=(number, 3)) for number, path in enumerate("abc")),
      *(Row("bias", path * 2, SAME, part=(number, 3)) for number, path in enumerate("abc")),
      Row("set_{layer}", "sets", places=("x", "y")),
    )
  )
  draw = np.random.default_rng(0)
  arrays = {path: draw.normal(size=(8, 12)).astype(np.float32) for path in "abc"}
  arrays |= {path * 2: draw.normal(size=12).astype(np.float32) for path in "abc"}
  arrays["sets"] = draw.normal(size=(2, 3)).astype(np.float32)
  tensors = mapping.export(arrays, table)
  assert {name: x.shape for name, x in tensors.items()} == {
    "set_x": (3,), "set_y": (3,), "packed": (36, 8), "bias": (36,)
  }  # fmt: skip
  theirs = mapping.Theirs(InMemory(arrays), table)
  for start in range(0, 36, 7):  # pieces that lie across the parts
    rows, columns = slice(start, min(36, start + 7)), slice(2, 7)
    np.testing.assert_array_equal(theirs.read("packed", (rows, columns)), tensors["packed"][rows, columns])
    np.testing.assert_array_equal(theirs.read("bias", (rows,)), tensors["bias"][rows])
  monkeypatch.setattr(mapping, "READ_BYTES", 64)
  save_file(tensors, tmp_path / "model.safetensors")
  weights = Counting(open_weights(tmp_path))
  mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  target = lambda x: jax.ShapeDtypeStruct(
    x.shape, np.float32, sharding=NamedSharding(mesh, P("fsdp", "tensor") if x.shape == (8, 12) else P())
  )
  loaded = mapping.load(weights, table, {path: target(x) for path, x in arrays.items()})
  assert weights.elements == sum(x.size for x in arrays.values())
  for path, array in arrays.items():
    np.testing.assert_array_equal(np.asarray(loaded[path]), array)


def load(tmp_path, tensors, projector):
  save_file(tensors, tmp_path / "model.safetensors")
  return mapping.Ours(open_weights(tmp_path), hiwin.table(projector), shapes_of(projector))


def test_faults_are_told_with_sizes(tmp_path):
  tensors = whole(config())
  del tensors["model.mm_projector.query_2"], tensors["model.mm_projector.ln_post.bias"]
  tensors["model.mm_projector.query_5"] = np.zeros((144, 256), np.float32)
  tensors["model.mm_projector.attn.in_proj_weight"] = np.zeros((770, 256), np.float32)
  tensors["model.mm_projector.attn.in_proj_bias"] = np.zeros((384,), np.float32)
  tensors["model.mm_projector.feature_1x_embedding"] = np.zeros((1, 256), np.float32)
  with pytest.raises(WeightsError) as raised:
    load(tmp_path, tensors, config())
  for part in (
    "missing: model.mm_projector.query_2, for projector/resampler/attention/queries (4, 144, 256)",
    "missing: model.mm_projector.ln_post.bias, for projector/resampler/out_norm/bias (256,)",
    "unexpected: model.mm_projector.query_5 (144, 256)",
    "in_proj_weight is (770, 256) in the file, and projector/resampler/attention/k_proj/kernel needs (256, 256) of it "
    "after transposing by (1, 0), the second of 3 equal parts",
    "in_proj_bias is (384,) in the file, and projector/resampler/attention/v_proj/bias needs (256,) of it, the third",
    "feature_1x_embedding is (1, 256) in the file",
    "leaving out axes of length 1",
  ):
    assert part in str(raised.value), raised.value


def test_another_vdim_is_told(tmp_path):
  with pytest.raises(WeightsError, match=r"up3.*VDIM has as many stages as the highest level"):
    load(tmp_path, whole(config(levels=(0, 1, 2, 3))), config())
  with pytest.raises(WeightsError, match=r"needs \(4, 144, 256\)|another; compare projector.query_grid"):
    load(tmp_path, whole(config(query_grid=8)), config())


def recognised(tensors, content=None):
  return hiwin.recognise(InMemory(tensors), content or {}, "FILE")


def test_levels_in_use_are_told_by_the_mask_or_by_what_was_trained():
  tensors = whole(config(levels=(0, 1, 2)))
  assert recognised(tensors).levels == (0, 1, 2)
  assert recognised(tensors, {"feature_scale_mask": 5}).levels == (0, 2)
  assert recognised(tensors, {"feature_scale_mask": 4}).levels == (2,)
  only = recognised(tensors, {"feature_scale_mask": 1})
  assert (only.levels, only.pyramid) == ((0,), "none")
  assert recognised(whole(config(levels=(1, 2)))).levels == (1, 2)
  untrained = {name: np.zeros_like(x) if "embedding" in name else x for name, x in tensors.items()}
  assert recognised(untrained).levels == (0, 2)
  asked = recognised(tensors, {"slice_organisation": "spatial", "slice_separators": "text"})
  assert (asked.organisation, asked.separators) == ("spatial", "text")
  assert (recognised(tensors).organisation, recognised(tensors).separators) == ("slices", "released")


@pytest.mark.parametrize(
  "content, words",
  [
    ({"feature_scale_mask": 16}, "feature_scale_mask=16 must be from 1 to 15"),
    ({"feature_scale_mask": "5"}, "feature_scale_mask='5'"),
    ({"feature_scale_mask": 13}, "FILE: its VDIM has 2 levels above the tower's, and levels (0, 2, 3) need 3"),
    ({"feature_scale_mask": 3}, "its VDIM has 2 levels above the tower's, and levels (0, 1) need 1"),
    ({"slice_organisation": "spiral"}, "slice_organisation='spiral' is unknown; known: slices, spatial"),
  ],
)
def test_configurations_that_do_not_fit(content, words):
  with pytest.raises(WeightsError, match=re.escape(words)):
    recognised(whole(config()), content)


@pytest.mark.parametrize("shape, words", [((143, 256), "(143, 256)"), ((144, 200), "its width is 200"), ((9,), "(9,)")])
def test_positions_that_no_projector_has(shape, words):
  with pytest.raises(WeightsError, match=re.escape(words)):
    recognised(whole(config()) | {"model.mm_projector.pos_embed": np.zeros(shape, np.float32)})


def test_the_predecessor(tmp_path):
  v1 = config(kind="uhd_v1", pyramid="none", levels=(0,), organisation="slices", separators="released")
  arrays = arrays_of(v1)
  tensors = mapping.export(arrays, hiwin.table(v1))
  names = {"pos_embed", "query", "proj", "kv_proj.weight", "attn.in_proj_weight", "attn.in_proj_bias"}
  names |= {f"{name}.{kind}" for name in ("attn.out_proj", "ln_q", "ln_kv", "ln_post") for kind in ("weight", "bias")}
  assert tensors.keys() == {"model.mm_projector." + name for name in names}
  np.testing.assert_array_equal(tensors["model.mm_projector.query"], arrays["projector/resampler/attention/queries"][0])
  assert tensors["model.mm_projector.query"].shape == (144, 256) and recognised(tensors) == v1
  ours = mapping.Ours(InMemory(tensors), hiwin.table(v1), shapes_of(v1))
  for path, array in arrays.items():
    np.testing.assert_array_equal(ours.read(path), array)


def test_what_is_left_out_is_said():
  said = "\n".join(hiwin.notes(whole(config()), config()))
  for words in (
    "left out: kv_proj.weight, query (of the attention before",
    "feature_2x_embedding, feature_8x_embedding, features_2x_projector.bias, features_2x_projector.weight, "
    "features_8x_projector.bias, features_8x_projector.weight (of levels not in use)",
    "upsampler.model.1.norm.bias, upsampler.model.1.norm.weight (a norm",
    "vision_model.embeddings.class_embedding (a copy of the tower",
  ):
    assert words in said, said


def test_placeholders_are_as_the_class_initialises_them():
  found = hiwin.placeholders(config(), 16, 256)
  assert abs(found["mm_projector.query"].std() / 0.02 - 1) < 0.02  # of 36864 normals
  assert (
    not found["mm_projector.feature_2x_embedding"].any() and not found["mm_projector.features_8x_projector.bias"].any()
  )
  assert (found["mm_projector.upsampler.model.1.norm.weight"] == 1).all()
  assert "mm_projector.kv_proj.weight" not in hiwin.placeholders(config(), 256, 256)  # an identity there


def test_what_the_released_code_has_not_is_refused():
  assert hiwin.fields(config(levels=(0, 1, 2), query_grid=16)) == {
    "mm_projector_type": "adapt_spatial_resampler_v2_256",
    "feature_scale_mask": 7,
    "slice_organisation": "spatial",
    "slice_separators": "text",
  }
  for fields in ({"pooling": "fixed"}, {"head_width": 64}, {"query_grid": 10}, {"pyramid": "deconv"}):
    (name, value), *_ = fields.items()
    with pytest.raises(ConfigError, match=f"{name}={value!r}"):
      hiwin.fields(config(**fields))
  with pytest.raises(WeightsError, match="bilinear.*no names"):
    hiwin.table(config(pyramid="bilinear"))
