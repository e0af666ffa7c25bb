"""Tables and loading: there and back bit for bit, sharded, and every fault of a checkpoint told at once."""

import dataclasses
import re

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import save_file

from mllm_jax import parameters
from mllm_jax.config import DecoderConfig, LoraConfig, ModelConfig, ProjectorConfig, VisionConfig
from mllm_jax.models import mllm
from mllm_jax.weights import clip, llama, mapping, mlp, peft, spatial
from mllm_jax.weights.io import WeightsError, open_weights

BF16 = ml_dtypes.bfloat16
VISION = VisionConfig(image_size=56, patch_size=14, width=16, layers=3, heads=2, mlp_width=24)
DECODER = DecoderConfig(vocab_size=40, width=16, layers=3, heads=4, kv_heads=2, head_width=4, mlp_width=24)
LORA = LoraConfig(rank=2, alpha=4.0, targets=("q_proj", "down_proj"))
PROJECTOR = ProjectorConfig(stride=1, dfi_kernel=3, conv_width=8)
SMALL = ModelConfig(vision=VISION, decoder=DECODER, projector=PROJECTOR, lora=LORA)
TABLES = {
  "clip": ("vision/.*", clip.table(VISION), SMALL),
  "llama": ("decoder/(?!.*lora).*", llama.table(DECODER), SMALL),
  "peft": ("decoder/.*/lora/.*", peft.table(LORA), SMALL),
  "spatial": ("projector/.*", spatial.table(PROJECTOR, VISION.grid), SMALL),
}
for maps in ("cropping", "pooling"):
  bare = ProjectorConfig(maps=maps, stride=1, dfi_kernel=0, conv_width=8)
  TABLES[maps] = ("projector/.*", spatial.table(bare, VISION.grid), dataclasses.replace(SMALL, projector=bare))
for name, fields in {
  "windows": dict(sfe="windows", window=2, window_strides=(2, 2), conv_width=8),
  "transformer": dict(sfe="transformer", stride=1),
  "pooled transformer": dict(sfe="transformer", maps="pooling", stride=1, token_order="released"),
}.items():
  other = ProjectorConfig(dfi_kernel=0, **fields)
  TABLES[name] = ("projector/.*", spatial.table(other, VISION.grid), dataclasses.replace(SMALL, projector=other))
tied = dataclasses.replace(DECODER, tied_embeddings=True)
TABLES["tied"] = ("decoder/.*", llama.table(tied), ModelConfig(vision=VISION, decoder=tied, projector=PROJECTOR))
TABLES["mlp"] = ("projector/.*", mlp.table(), dataclasses.replace(SMALL, projector=ProjectorConfig(kind="mlp2x_gelu")))


def shapes_of(name):
  """{path: shape} of the part of a small model that a table speaks of."""
  pattern, _, config = TABLES[name]
  flat = parameters.flatten(mllm.abstract(config))[1]
  return {path: array.shape for path, array in flat.items() if re.fullmatch(pattern, path)}


def arrays_of(name, dtype=np.float32):
  generator = np.random.default_rng(0)
  return {path: generator.normal(size=shape).astype(dtype) for path, shape in shapes_of(name).items()}


def targets_of(arrays, dtype=np.float32, sharding=None):
  place = sharding or (lambda path, shape: None)
  return {path: jax.ShapeDtypeStruct(a.shape, dtype, sharding=place(path, a.shape)) for path, a in arrays.items()}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16])
@pytest.mark.parametrize("name", TABLES)
def test_there_and_back_bit_for_bit(tmp_path, name, dtype):
  table, arrays = TABLES[name][1], arrays_of(name, dtype)
  tensors = mapping.export(arrays, table)
  assert all(tensor.dtype == dtype for tensor in tensors.values())
  save_file(tensors, tmp_path / "model.safetensors")
  loaded = mapping.load(open_weights(tmp_path), table, targets_of(arrays, dtype))
  assert loaded.keys() == arrays.keys()
  for path, array in arrays.items():
    assert loaded[path].dtype == dtype
    np.testing.assert_array_equal(np.asarray(loaded[path]), array)


def test_what_the_transforms_do():
  arrays = arrays_of("clip") | arrays_of("spatial") | arrays_of("llama")
  tensors = {}
  for name in ("clip", "spatial", "llama"):
    tensors |= mapping.export({path: arrays[path] for path in shapes_of(name)}, TABLES[name][1])
  kernel = tensors["vision_model.embeddings.patch_embedding.weight"]
  assert kernel.shape == (16, 3, 14, 14)
  # Patch vectors run over rows, then columns, then colours.
  assert kernel[5, 2, 3, 7] == arrays["vision/patch_embedding/kernel"][(3 * 14 + 7) * 3 + 2, 5]
  assert tensors["model.conv_2.weight"].shape == (8, 16, 2, 2)
  assert tensors["model.conv_2.weight"][1, 2, 0, 1] == arrays["projector/sfe/kernels/0"][0, 1, 2, 1]
  weight = tensors["model.layers.2.mlp.up_proj.weight"]
  np.testing.assert_array_equal(weight, arrays["decoder/layers/up_proj/kernel"][2].T)
  assert "vision_model.encoder.layers.1.mlp.fc1.bias" in tensors and "model.query_projector.0.weight" in tensors


def test_onto_eight_devices(tmp_path):
  """Each device gets its slice, cast, and no more than the slice is read for it."""
  assert len(jax.devices()) == 8
  mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  for name in ("llama", "clip", "spatial"):
    table, arrays = TABLES[name][1], arrays_of(name, np.float16)
    save_file(mapping.export(arrays, table), tmp_path / f"{name}.safetensors")

    def place(path, shape):
      axes = [axis if length % mesh.shape[axis] == 0 else None for axis, length in zip(("fsdp", "tensor"), shape[-2:])]
      return NamedSharding(mesh, P(*[None] * (len(shape) - 2), *axes) if len(shape) > 1 else P())

    weights = CountingWeights(open_weights(tmp_path / f"{name}.safetensors"))
    loaded = mapping.load(weights, table, targets_of(arrays, BF16, place))
    for path, array in arrays.items():
      assert loaded[path].sharding == place(path, array.shape) and loaded[path].dtype == BF16
      np.testing.assert_array_equal(np.asarray(loaded[path]), array.astype(BF16))
    # The patch kernel's rows mix three of its foreign axes, so each of the four cuts of them reads the whole small
    # thing.
    again = 3 * arrays["vision/patch_embedding/kernel"].size if name == "clip" else 0
    assert weights.elements == sum(array.size for array in arrays.values()) + again
  assert loaded["projector/head/kernel"].addressable_shards[0].data.shape == (4, 8)


class CountingWeights:
  """Counts the numbers that are read."""

  def __init__(self, weights):
    self.weights, self.elements = weights, 0

  def __getattr__(self, name):
    return getattr(self.weights, name)

  def read(self, name, index=()):
    array = self.weights.read(name, index)
    self.elements += array.size
    return array


def test_layers_can_be_sharded_too(tmp_path):
  table, arrays = TABLES["clip"][1], arrays_of("clip")
  save_file(mapping.export(arrays, table), tmp_path / "model.safetensors")
  mesh = jax.make_mesh((2, 4), ("layers", "rest"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  place = lambda path, shape: NamedSharding(mesh, P("layers") if "layers" in path else P())
  loaded = mapping.load(open_weights(tmp_path), table, targets_of(arrays, np.float32, place))
  shard = loaded["vision/layers/fc1/kernel"].addressable_shards[-1]
  np.testing.assert_array_equal(shard.data, arrays["vision/layers/fc1/kernel"][1:2])


def test_what_is_of_no_use_is_not_read(tmp_path):
  """The whole CLIP model has a text half, a post-norm and a layer after the selected one; old Llamas have buffers."""
  arrays = arrays_of("clip")
  tensors = mapping.export(arrays, TABLES["clip"][1])
  unused = ["text_model.final_layer_norm.weight", "text_projection.weight", "visual_projection.weight", "logit_scale"]
  unused += ["vision_model.post_layernorm.bias", "vision_model.encoder.layers.2.mlp.fc1.weight"]
  tensors |= {name: np.zeros(3, np.float32) for name in unused}
  tensors["vision_model.embeddings.position_ids"] = np.arange(17)[None]
  save_file(tensors, tmp_path / "model.safetensors")
  loaded = mapping.load(open_weights(tmp_path), TABLES["clip"][1], targets_of(arrays))
  np.testing.assert_array_equal(loaded["vision/layers/fc1/kernel"], arrays["vision/layers/fc1/kernel"])
  # transformers 5 writes the names without their prefix.
  bare = {name.removeprefix("vision_model."): tensor for name, tensor in tensors.items()}
  save_file(bare, tmp_path / "model.safetensors")
  mapping.load(open_weights(tmp_path), TABLES["clip"][1], targets_of(arrays))

  for name in ("llama", "tied"):
    table, arrays = TABLES[name][1], arrays_of(name)
    tensors = mapping.export(arrays, table)
    extra = ["model.layers.1.self_attn.rotary_emb.inv_freq", "model.mm_projector.0.weight", "model.conv_4.weight"]
    extra += ["lm_head.weight"] if name == "tied" else []
    save_file(tensors | {key: np.zeros(2, np.float32) for key in extra}, tmp_path / "model.safetensors")
    mapping.load(open_weights(tmp_path), table, targets_of(arrays))


def test_all_faults_are_told_at_once(tmp_path):
  table, arrays = TABLES["llama"][1], arrays_of("llama")
  tensors = mapping.export(arrays, table)
  del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
  tensors["model.layers.3.mlp.up_proj.weight"] = tensors["model.extra"] = np.zeros((2, 3), np.float32)
  tensors["model.embed_tokens.weight"] = np.zeros((41, 16), np.float32)
  tensors["model.layers.0.mlp.gate_proj.weight"] = np.zeros((16, 24), np.float32)
  tensors["lm_head.weight"] = np.zeros((40, 16), np.int8)
  save_file(tensors, tmp_path / "model.safetensors")
  with pytest.raises(WeightsError) as raised:
    mapping.load(open_weights(tmp_path), table, targets_of(arrays))
  message = str(raised.value)
  for part in (
    "model.safetensors does not fit the model: 7 problems",
    "missing: model.norm.weight, for decoder/norm/scale (16,)",
    "missing: model.layers.1.mlp.up_proj.weight, for decoder/layers/up_proj/kernel (3, 16, 24)",
    "unexpected: model.layers.3.mlp.up_proj.weight (2, 3)",
    "unexpected: model.extra (2, 3)",
    "model.embed_tokens.weight is (41, 16) in the file, and decoder/embedding needs (40, 16)",
    "another vocabulary",
    "(16, 24) in the file, and decoder/layers/gate_proj/kernel needs (16, 24) of it after transposing",
    "it was saved transposed",
    "lm_head.weight holds int8; quantised checkpoints are not read",
  ):
    assert part in message, message


def test_the_wrong_variant_is_named(tmp_path):
  def fault(saved, wanted):
    save_file(mapping.export(arrays_of(saved), TABLES[saved][1]), tmp_path / "model.safetensors")
    with pytest.raises(WeightsError) as raised:
      mapping.load(open_weights(tmp_path), TABLES[wanted][1], targets_of(arrays_of(wanted)))
    return str(raised.value)

  assert "model.conv_2.1.weight (8, 16, 2, 2) (a name of the pooling variant; compare projector.maps)" in fault(
    "pooling", "cropping"
  )
  assert "model.conv_CM.weight (8, 16, 3, 3) (a part of DFI; compare projector.dfi_kernel)" in fault(
    "spatial", "cropping"
  )
  assert "projector.kind=spatial" in fault("spatial", "mlp")
  # DFI doubles the width of what the last layer takes.
  assert "one of the two has DFI and the other has none" in fault("cropping", "spatial")


@pytest.mark.parametrize("prefix", ["", "model.", "base_model.model.", "base_model.model.model."])
def test_prefixes_of_released_projectors(tmp_path, prefix):
  table, arrays = TABLES["spatial"][1], arrays_of("spatial")
  tensors = {prefix + name.removeprefix("model."): tensor for name, tensor in mapping.export(arrays, table).items()}
  save_file(tensors, tmp_path / "model.safetensors")
  mapping.load(open_weights(tmp_path), table, targets_of(arrays))
  if prefix:
    save_file(tensors | {"conv_2.weight": tensors[prefix + "conv_2.weight"]}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match="twice"):
      mapping.load(open_weights(tmp_path), table, targets_of(arrays))


def test_names_of_the_released_projectors():
  names = lambda grid=24, **fields: [row.foreign for row in spatial.table(ProjectorConfig(**fields), grid).rows]
  assert names(dfi_kernel=0)[:6] == [f"conv_{size}.weight" for size in (4, 8, 12, 16, 20, 24)]
  pooled = names(maps="pooling")
  assert pooled[4:7] == ["conv_20.1.weight", "conv_24.weight", "conv_CM.weight"]
  assert "conv_linear.1.bias" in names() and "conv_linear.1.bias" not in pooled
  assert names(16, stride=1, dfi_kernel=0)[:8] == [f"conv_{number}.weight" for number in range(1, 9)]
  assert names()[-4:] == [f"mm_projector.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")]


def test_export_needs_the_model_of_its_table():
  arrays = arrays_of("clip")
  arrays["vision/new"] = arrays.pop("vision/pre_norm/bias")
  with pytest.raises(WeightsError, match="no name for .*vision/new.*no array for .*vision/pre_norm/bias"):
    mapping.export(arrays, TABLES["clip"][1])
