"""Released projectors, recognised by the names and shapes of their tensors."""

import dataclasses

import pytest

from mllm_jax.config import ModelConfig, ProjectorConfig
from mllm_jax.models import projectors
from mllm_jax.models.projectors.maps import map_sizes
from mllm_jax.weights import spatial
from mllm_jax.weights.io import WeightsError
from mllm_jax.weights.recognise import projector_table

MLP = ProjectorConfig(kind="mlp2x_gelu")


def variants():
  """Projectors that `spatial.table` has names for, and the grids they are for."""
  for maps in ("cropping", "pooling"):
    for bias in ("released", "always", "never"):
      for dfi in (0, 4, 16):
        fields = dict(maps=maps, head_bias=bias, dfi_kernel=dfi, conv_width=8)
        for stride in (1, 2, 3, 4, 6, 12):
          yield ProjectorConfig(stride=stride, **fields), 24
        for sizes in ((24,), (8, 24), (4, 10), (2, 4, 6)):
          yield ProjectorConfig(sizes=sizes, **fields), 24
        for stride in (1, 2, 4):
          yield ProjectorConfig(stride=stride, **fields), 16
        yield ProjectorConfig(sizes=(9, 27), **fields), 27
  yield ProjectorConfig(maps="pooling", sizes=(1, 5, 24), dfi_kernel=0, conv_width=8), 24
  yield ProjectorConfig(sfe="windows", window=9, window_strides=(2, 2), dfi_kernel=0, conv_width=8), 24
  for maps in ("cropping", "pooling"):
    for fields in (dict(stride=2), dict(sizes=(4, 10))):
      yield ProjectorConfig(sfe="transformer", maps=maps, token_order="released", dfi_kernel=0, **fields), 24
  yield MLP, 24
  yield dataclasses.replace(MLP, image_newline=True), 24
  yield ProjectorConfig(conv_width=8, image_newline=True), 24


def shapes_by_name(config, grid):
  """What `spatial.recognise` is told of a file with the projector `config`: kernels have their real sizes."""
  if config.kind == "mlp2x_gelu":
    return {row.foreign: (4,) for row in projector_table(config, grid).rows}
  sides = {f"projector/sfe/kernels/{place}": side for place, side in enumerate(map_sizes(config, grid))}
  sides |= {"projector/dfi/kernel": config.dfi_kernel, "projector/sfe/kernel": config.window}
  side_of = lambda row: (8, 3, sides[row.ours], sides[row.ours]) if row.ours in sides else (4, 8)
  rows = spatial.table(config, grid).rows
  return {row.name(layer): side_of(row) for row in rows for layer in range(len(row.places) or 1)}


@pytest.mark.parametrize("prefix", ["", "model.", "base_model.model.model."])
def test_released_projectors_are_recognised(prefix):
  """From names and shapes alone: the configuration found has the table of the one the file was made with."""
  for config, grid in variants():
    shapes = {prefix + name: shape for name, shape in shapes_by_name(config, grid).items()}
    others = {"model.layers.0.mlp.up_proj.weight": (2, 2), "lm_head.weight": (4, 2)}
    told = config.maps if config.sfe == "transformer" else ""
    found = spatial.recognise(shapes | others, grid, maps=told)
    assert (found.kind, found.image_newline) == (config.kind, config.image_newline)
    if config.kind == "spatial":
      assert spatial.table(found, grid) == spatial.table(config, grid), (config, found)
      assert (found.sfe, found.dfi_kernel) == (config.sfe, config.dfi_kernel)
      assert found.conv_width == 8 or config.sfe == "transformer"
      assert map_sizes(found, grid) == map_sizes(config, grid)


def test_recognised_in_the_words_of_the_recipes():
  shapes = lambda names: {f"conv_{name}.weight": (512, 1024, size, size) for name, size in names}
  of_sizes = lambda *sizes: shapes((str(size), size) for size in sizes) | {"mm_projector.0.bias": (4096,)}
  assert spatial.recognise(of_sizes(4, 8, 12, 16, 20, 24), 24) == ProjectorConfig(dfi_kernel=0)
  assert spatial.recognise(of_sizes(8, 16, 24), 24) == ProjectorConfig(stride=4, dfi_kernel=0)
  assert spatial.recognise(of_sizes(24), 24) == ProjectorConfig(stride=12, dfi_kernel=0)
  assert spatial.recognise(of_sizes(8, 24), 24) == ProjectorConfig(sizes=(8, 24), dfi_kernel=0)
  counted = shapes((str(number), 2 * number) for number in range(1, 9))
  assert spatial.recognise(counted, 16) == ProjectorConfig(stride=1, dfi_kernel=0)
  pooled = shapes([("4.1", 4), ("8.1", 8), ("12.1", 12), ("16.1", 16), ("20.1", 20), ("24", 24), ("CM", 16)])
  assert spatial.recognise(pooled, 24) == ProjectorConfig(maps="pooling")
  with_bias = pooled | {"conv_linear.1.bias": (4096,)}
  assert spatial.recognise(with_bias, 24) == ProjectorConfig(maps="pooling", head_bias="always")
  windows = {"conv_CM.weight": (512, 1024, 12, 12), "conv_linear.1.weight": (4096, 512)}
  assert spatial.recognise(windows, 24) == ProjectorConfig(sfe="windows", window_strides=(2, 2), dfi_kernel=0)
  assert projectors.tokens_per_crop(ModelConfig(projector=spatial.recognise(windows, 24))) == 49 + 576


def test_the_maps_of_transformer_blocks_must_be_named():
  config = ProjectorConfig(sfe="transformer", token_order="released", dfi_kernel=0)
  shapes = shapes_by_name(config, 24)
  with pytest.raises(WeightsError, match="run/model.bin has transformer blocks.*--maps=cropping or --maps=pooling"):
    spatial.recognise(shapes, 24, "run/model.bin")
  assert spatial.recognise(shapes, 24, maps="cropping") == config
  assert spatial.recognise(shapes, 24, maps="pooling") == dataclasses.replace(config, maps="pooling")
  with pytest.raises(WeightsError, match="no variant with transformer blocks.*leave out 'pooling'"):
    spatial.recognise(shapes_by_name(ProjectorConfig(), 24), 24, maps="pooling")


@pytest.mark.parametrize(
  "fields, told",
  [
    (dict(sfe="factorised"), "projector.sfe=factorised is none of the released code's"),
    (dict(sfe="windows"), r"projector.window_strides=\(6, 12\).*2 patches apart both ways"),
    (dict(sfe="windows", window_strides=(2, 2), dfi_kernel=4), "projector.dfi_kernel=4.*without DFI"),
    (dict(sfe="transformer", maps="pooling"), "projector.token_order=map.*token_order=released is read and written"),
  ],
)
def test_what_has_no_released_names_is_refused(fields, told):
  with pytest.raises(WeightsError, match=told):
    spatial.table(ProjectorConfig(**dict(dfi_kernel=0) | fields), 24)


@pytest.mark.parametrize(
  "extra, told",
  [
    ({"tfm_4.encoder.norm.weight": (1024,), "query_4": (1, 1, 1024)}, "tfm_4.encoder.*query_4"),
    ({"conv_small.weight": (512, 1024, 12, 12)}, "conv_small.weight.*several detail maps"),
    ({"conv_4.3.weight": (512, 1024, 2, 2)}, r"conv_4.3.weight \(512, 1024, 2, 2\).*stacked small"),
    ({"conv_6.weight": (512, 1024, 5, 5)}, r"conv_6.weight \(512, 1024, 5, 5\)"),
    ({"conv_26.weight": (512, 1024, 26, 26)}, "conv_26.weight.*"),
    ({"conv_7.weight": (512, 1024, 7, 7)}, "conv_7.weight.*"),
    ({"query_projector.0.weight": (512,)}, "query_projector.0.weight"),
    ({"conv_12.1.weight": (512, 1024, 12, 12)}, "conv_4.weight.*conv_8.weight"),
    ({"vision_resampler.0.weight": (3,)}, "vision_resampler"),
  ],
)
def test_what_fits_no_variant_is_named(extra, told):
  shapes = {f"conv_{size}.weight": (512, 1024, size, size) for size in (4, 8, 24)}
  with pytest.raises(WeightsError, match=f"run/model.bin holds the projector of no variant.*{told}"):
    spatial.recognise(shapes | extra, 24, "run/model.bin")


def test_files_without_a_projector_or_without_its_maps():
  with pytest.raises(WeightsError, match="no tensor of a projector"):
    spatial.recognise({"model.layers.0.mlp.up_proj.weight": (2, 2)}, 24)
  with pytest.raises(WeightsError, match="conv_CM.weight.*conv_linear.1.weight"):
    spatial.recognise({"conv_CM.weight": (512, 1024, 12, 12), "conv_linear.1.weight": (4096, 1024)}, 24)
  with pytest.raises(WeightsError, match="tfm_5.norm.*; and 14 more$"):
    spatial.recognise({f"tfm_{number}.norm.weight": (4,) for number in range(20)}, 24)
