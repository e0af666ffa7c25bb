"""`python -m mllm_jax.compile --summary`: sizes and FLOPs as the papers print them."""

import json
from pathlib import Path

import pytest

from mllm_jax import build
from mllm_jax import compile as command
from mllm_jax.command_line import parse
from mllm_jax.compilation import summary
from mllm_jax.config import LoraConfig

CONFIGS = Path(__file__).parents[2] / "configs"
# LLaVA-UHD v2, table 1, in TFLOP. Its last two rows are of one crop less (see `summary`).
SIX_CROPS = ["--config.finetune.data.max_slices=5", "--config.model.projector.organisation=slices"]
TABLE_1 = [
  ("llava15", "vicuna-7b-v1.5", [], 576, 8.0),
  ("llava15", "vicuna-13b-v1.5", [], 576, 15.1),
  ("llava15", "qwen2-7b-instruct", [], 576, 8.2),
  ("uhd_v2", "vicuna-7b-v1.5", [], 1008, 17.5),
  ("uhd_v2", "vicuna-13b-v1.5", SIX_CROPS, 864, 26.4),
  ("uhd_v2_qwen2", "qwen2-7b-instruct", SIX_CROPS, 864, 14.3),
]


def summarise(name: str, *overrides: str) -> summary.Summary:
  return summary.summarise(parse(["compile", f"--config={CONFIGS / name}.py", *overrides])[0])


@pytest.mark.parametrize("name, llm, overrides, tokens, tflop", TABLE_1)
def test_flops_are_table_1s(name, llm, overrides, tokens, tflop):
  found = summarise(name, f"--config.model.llm=weights/{llm}", *overrides)
  assert found.visual_tokens == tokens
  assert sum(found.flops.values()) == pytest.approx(tflop * 1e12, rel=0.04)


def test_the_sum_of_llava_15_by_hand():
  """Products alone, by the sizes of Vicuna-7B and CLIP-L/14-336 without its last layer."""
  found = summarise("llava15")
  decoder = 576 * 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 32 * 4096 * 576 * 577
  vision = 577 * 23 * 12 * 1024**2 + 576 * 588 * 1024 + 2 * 23 * 1024 * 577**2
  projector = 576 * (1024 + 4096) * 4096
  assert found.flops == {"vision": 2 * vision, "projector": 2 * projector, "decoder": 2 * decoder}


@pytest.mark.parametrize("name, whole, sfe", [("sp_cropping", 1761.5, 1456.0), ("sp_pooling", 1761.5, 1456.0)])
def test_projectors_are_as_large_as_printed(name, whole, sfe):
  found = summarise(name)
  assert summary.mib(found.parameters["projector"]) == pytest.approx(whole, abs=0.06)
  assert summary.mib(found.projector["sfe"]) == pytest.approx(sfe, abs=0.06)
  assert sum(found.projector.values()) == found.parameters["projector"]


def test_convnext_costs_what_its_card_says():
  """timm's card of CLIP-ConvNeXt-L has 101.1 billion multiplications at 384 pixels; a slice is seen at 768."""
  convnext, bilinear = summarise("uhd_convnext"), summarise("uhd_bilinear")
  laterals = 576 * 1536 * 1024 + 16 * 576 * 384 * 1024
  more = convnext.flops["projector"] - bilinear.flops["projector"]
  assert more == pytest.approx(7 * 2 * (4 * 101.1e9 + laterals), rel=0.01)
  assert convnext.flops["vision"] == 0  # the tower's features are not looked at
  sizes = {name: summary.mib(count) * 2**19 for name, count in convnext.projector.items()}
  assert sizes["pyramid"] == pytest.approx(196.2e6 + 1920 * 1024, rel=0.003)  # ConvNeXt-L without its classifier


def test_tiles_are_counted_with_their_newlines():
  found = summarise(
    "llava15", "--config.finetune.data.image_aspect=anyres", "--config.model.projector.image_newline=True"
  )
  assert (found.image, found.crops, found.visual_tokens, found.places) == ((672, 672), 5, 2880, 2880 + 48)


def test_the_command_prints_and_writes_it(tmp_path, capsys):
  file = tmp_path / "summary.json"
  assert command.main(["compile", f"--config={CONFIGS / 'uhd_v1.py'}:demo", "--summary", f"--out={file}"]) == 0
  printed, content = capsys.readouterr().out, json.loads(file.read_text())
  assert "one image of 224 x 224 pixels: 5 crops, 80 visual tokens in 84 places" in printed and "GFLOP" in printed
  assert content["visual_tokens"] == 80 and content["flops"]["total"] == sum(
    content["flops"][part] for part in ("vision", "projector", "decoder")
  )
  sizes = content["parameters"]
  assert sizes["total"]["count"] == sum(sizes[part]["count"] for part in ("vision", "projector", "decoder"))
  assert sizes["vision"]["mib"] == sizes["vision"]["count"] * 2 / 2**20


@pytest.mark.parametrize(
  "options, words",
  [
    ([f"--config={CONFIGS / 'vdim.py'}", "--summary"], "trains VDIM alone"),
    ([f"--config={CONFIGS / 'llava15.py'}"], "--topology is missing"),
    ([f"--config={CONFIGS / 'llava15.py'}", "--summary", "--out=no/folder.json"], "a file in a folder that exists"),
    ([f"--config={CONFIGS / 'llava15.py'}", "--summary", "--config.model.llm=weights/nobody"], "weights/nobody"),
  ],
)
def test_what_to_put_right(options, words, capsys):
  assert command.main(["compile", *options]) == 2
  assert words in capsys.readouterr().err


def test_tiles_and_windows_are_counted():
  """13 tiles of 256 tokens; a Mistral whose window is shorter than the image."""
  found = summarise("internvl2")
  assert (found.crops, found.visual_tokens) == (13, 3328)
  config = parse(["compile", f"--config={CONFIGS / 'sp_mistral.py'}"])[0]
  model = build.architecture(config.model, LoraConfig())
  aspect, image = summary.largest_image(model, config.finetune.data)
  model.decoder.sliding_window = 100
  assert summary.forward_work(model, aspect, image, 582).pairs == 100 * 101 / 2 + 482 * 100
