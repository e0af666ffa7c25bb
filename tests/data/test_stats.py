import re

import numpy as np
import pytest

from mllm_jax.config import DataConfig, StageConfig
from mllm_jax.data.__main__ import main
from mllm_jax.data.lengths import LengthTable
from mllm_jax.data_commands import stats


def test_the_costs_of_a_table_that_can_be_reckoned_by_hand():
  places = np.array([40, 40, 20, 20, 60, 60, 100, 130], np.int32)
  ones = np.ones(8, np.int32)
  data = DataConfig(max_length=100, max_images=4, batching="pack", row_length=200)
  table = LengthTable(places, ones, places, ones)
  found = {
    cost.name: cost for cost in stats.costs(table, StageConfig(data=data, batch_size=8, accumulation=4), devices=2)
  }
  assert {cost.used for cost in found.values()} == {440}
  assert (found["fixed"].places, found["fixed"].steps) == (800, 1)
  # Two devices with four rows each, one of 100 on either.
  assert (found["released"].places, found["released"].padding) == (800, 1 - 440 / 800)
  assert found["pack"].rows == 3 and found["pack"].places == 600
  # Sorted and two by two: 100, 60, 40, 20, rounded up to 32ths of 100.
  assert 2 * 220 <= found["group"].places <= 2 * (220 + 4 * 4)


def test_a_histogram_counts_every_sample_once():
  places = np.array([1, 64, 65, 100, 100, 128, 500, 512])
  lines = stats.histogram(places, 512, bins=8).splitlines()[1:]
  counts = [int(line.split()[-2 if "█" in line else -1].replace(",", "")) for line in lines if line]
  assert counts == [2, 4, 0, 0, 0, 0, 0, 2]
  assert lines[1].endswith(" " + "█" * stats.BAR) and lines[0].endswith(" " + "█" * (stats.BAR // 2))


def run(*argv: str) -> int:
  return main(["stats", *argv])


def test_a_data_set_on_the_command_line(write_data, tokenizer_folders, capsys):
  turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A bus."}]
  asked = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A bus."}]
  path, folder = write_data(
    [
      {"id": i, "conversations": turns} if i % 4 else {"id": i, "image": f"{i}.png", "conversations": asked}
      for i in range(16)
    ]
  )
  options = [f"--path={path}", f"--image_folder={folder}", f"--llm={tokenizer_folders[False]}", "--tokens_per_image=9"]
  assert run(*options, "--batch_size=8", "--accumulation=2", "--images=8") == 0
  out = capsys.readouterr().out
  assert re.search(r"one image +4 +25.0%", out) and re.search(r"text only +12 +75.0%", out)
  assert all(re.search(rf"^{name} ", out, re.M) for name in ("released", "fixed", "group", "pack"))
  assert re.search(r"[\d.]+ samples/s decoded, resized and tokenized \(no worker processes\)", out)


def test_the_data_of_a_recipe(tmp_path, capsys):
  import tiny

  tiny.write_all(tmp_path)
  assert run(f"--config={tmp_path / 'recipe.py'}", "--stage=pretrain") == 0
  out = capsys.readouterr().out
  assert re.search(r"one image +40 +100.0%", out) and "fixed" in out
  assert run(f"--config={tmp_path / 'recipe.py'}", "--batch_size=12") == 2
  assert "batch_size=12 must be a multiple of --devices=8" in capsys.readouterr().err


@pytest.mark.parametrize(
  "argv, message",
  [
    ([], "which data? name a recipe with --config=FILE, or the data with --path=FILE"),
    (["--path=tests"], "whose lengths? name the language model's folder with --llm=DIR"),
    (["--config=nowhere.py"], "nowhere.py"),
    (["--synthetic=1000", "--images=3"], "--synthetic has none"),
    (["--synthetic=-5"], "--synthetic=-5 must be 0 or more"),
    (["--synthetic=1000", "--devices=0"], "--devices=0 must be 1 or more"),
  ],
)
def test_what_is_missing_is_said(argv, message, capsys):
  assert run(*argv) == 2
  assert message in capsys.readouterr().err


def test_synthetic_lengths_have_the_mixture_they_promise():
  table = stats.synthetic_lengths(20_000)
  assert abs((table.images == 0).mean() - 0.06) < 0.01
  assert (table.places[table.images == 1] > 582 + 45).all() and (table.signed_words != 0).all()
