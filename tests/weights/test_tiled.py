"""Models of tiled images in the words of the released code, LLaVA-1.6's and LLaVA-SP's."""

import dataclasses
import json

import layouts
import numpy as np
import pytest
from PIL import Image

import mllm_jax
from mllm_jax.config import DataConfig, ProjectorConfig
from mllm_jax.data import images
from mllm_jax.data.aspects import Anyres, Square
from mllm_jax.weights import assemble
from mllm_jax.weights.known import WeightsError
from mllm_jax.weights.side_files.official import image_aspect

PROJECTORS = {
  "mlp": ProjectorConfig(kind="mlp2x_gelu", image_newline=True),
  "spatial": ProjectorConfig(stride=1, dfi_kernel=0, conv_width=4, image_newline=True),
}


def folder_of(path, projector, **fields):
  """(model, its folder as the released code writes it, with these fields of config.json)."""
  model = dataclasses.replace(layouts.model(), projector=projector)
  tower = layouts.vision_folder(path / "clip", model)
  folder = layouts.official_folder(path / "model", model, str(tower))
  content = json.loads((folder / "config.json").read_text())
  (folder / "config.json").write_text(json.dumps(content | fields))
  return model, folder


@pytest.mark.parametrize("name", PROJECTORS)
def test_a_released_model_is_read_and_asked_with_tiles(tmp_path, name):
  side = layouts.model().vision.image_size
  aspect = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"}
  grids = [[side, 2 * side], [2 * side, side], [2 * side, 2 * side], [3 * side, side], [side, 3 * side]]
  model, folder = folder_of(tmp_path, PROJECTORS[name], **aspect, image_grid_pinpoints=grids)
  assert image_aspect(model, cut=False) == {"image_aspect_ratio": "anyres", "image_grid_pinpoints": grids}
  loaded, processor = mllm_jax.load(str(folder))
  expected = layouts.arrays(model, "projector")["projector/image_newline"]
  np.testing.assert_array_equal(loaded.projector.image_newline[...], expected)
  assert loaded.config.projector.image_newline and isinstance(processor.aspect, Anyres)


@pytest.mark.parametrize("field, cut", [("square", True), ("pad", False)])
def test_a_released_model_is_asked_as_its_own_code_would(tmp_path, field, cut):
  projector = dataclasses.replace(PROJECTORS["mlp"], image_newline=False)
  model, folder = folder_of(tmp_path, projector, image_aspect_ratio=field)
  assert image_aspect(model, cut) == {"image_aspect_ratio": field}
  _, processor = mllm_jax.load(str(folder))
  assert isinstance(processor.aspect, Square) and processor.aspect.cut == cut
  wide = Image.fromarray(np.arange(3 * 60 * 90, dtype=np.uint8).reshape(60, 90, 3))
  (crop,) = processor.aspect.crops(wide)
  expected = (images.crop_to_square if cut else images.preprocess)(wide, model.vision)
  np.testing.assert_array_equal(crop, expected)


@pytest.mark.parametrize(
  "processor, noted, found",
  [
    ({"do_center_crop": True}, 1, {}),  # llava-hf's own
    ({"do_center_crop": True, "do_pad": True}, 0, {}),
    ({"do_center_crop": True, "do_pad": False}, 0, {"image_aspect": "square"}),  # ours
    ({"image_processor_type": "SiglipImageProcessor", "do_pad": False}, 0, {"image_aspect": "square"}),
    ({"do_pad": False}, 0, {}),
    (None, 0, {}),
  ],
)
def test_pictures_are_cut_where_a_processor_says_so_outright(tmp_path, processor, noted, found):
  folder = layouts.llava_hf_folder(tmp_path / "model", layouts.model())
  (folder / "preprocessor_config.json").unlink(missing_ok=True)
  if processor is not None:
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
  stored = assemble.open_model(str(folder))
  assert stored.manifest.images == found
  assert sum("cuts pictures to a square" in note for note in stored.notes) == noted


@pytest.mark.parametrize(
  "fields,told",
  [
    ({"image_aspect_ratio": "anyres"}, "mm_patch_merge_type='flat'"),
    ({"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial"}, "mm_patch_merge_type='spatial'"),
    ({"image_aspect_ratio": "anyres_max_9", "mm_patch_merge_type": "spatial_unpad"}, "anyres_max_9"),
    (
      {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad", "image_grid_pinpoints": [[336, 336]]},
      r"image_grid_pinpoints=\[\[336, 336\]\]",
    ),
  ],
)
def test_other_ways_of_tiling_are_refused(tmp_path, fields, told):
  _, folder = folder_of(tmp_path, PROJECTORS["mlp"], **fields)
  with pytest.raises(WeightsError, match=told):
    assemble.open_model(str(folder))


def test_tiles_need_the_token(tmp_path):
  from mllm_jax import processors
  from mllm_jax.config import ConfigError

  with pytest.raises(ConfigError, match="image_aspect=anyres needs model.projector.image_newline=True"):
    processors.make_aspect(layouts.model(), None, DataConfig(image_aspect="anyres"))
  with pytest.raises(ConfigError, match="image_aspect='wide' is unknown; known: pad, square, anyres, tiles, slices"):
    processors.make_aspect(layouts.model(), None, DataConfig(image_aspect="wide"))
  with pytest.raises(ConfigError, match="image_aspect=slices needs a projector .*hiwin.*kind is 'mlp2x_gelu'"):
    processors.make_aspect(layouts.model(), None, DataConfig(image_aspect="slices"))
