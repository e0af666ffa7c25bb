"""Whole runs with packed rows and with grouped ones: killed and started again, they end with the same losses."""

import random
import signal
import time
from pathlib import Path

import pytest
import tiny
from test_train import losses, rows, start

OPTIONS = {
  "pack": ("--config.pretrain.data.max_images=3", "--config.pretrain.data.row_length=256", "--config.loader_workers=1"),
  "group": ("--config.pretrain.data.buckets=(90, 128)", "--config.pretrain.accumulation=2"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
  path = tmp_path_factory.mktemp("tiny")
  tiny.write_all(path)
  return path


@pytest.mark.parametrize("batching", ["pack", "group"])
def test_a_run_killed_and_started_again_ends_with_the_same_losses(folder, batching):
  options = (
    f"--config.pretrain.data.batching={batching}",
    *OPTIONS[batching],
    "--config.stages=pretrain",
    "--config.evaluation.path=",
    "--config.save_model=False",
  )
  whole, killed = folder / f"{batching}_whole", folder / f"{batching}_killed"
  process = start(folder, whole, *options)
  out, err = process.communicate()
  assert process.returncode == 0, err
  assert "packed rows" in out if batching == "pack" else "packed rows" not in out
  assert (whole / "pretrain" / "lengths.npz").is_file()

  rng = random.Random(0)
  for number in (signal.SIGKILL, signal.SIGTERM, None):
    process = start(folder, killed, *options)
    seen, limit = len(rows(killed)), rng.randint(2, 4)
    while number is not None and process.poll() is None and len(rows(killed)) < seen + limit:
      time.sleep(0.02)
    if number is not None:
      process.send_signal(number)
    out, err = process.communicate()
    assert process.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 128 + 15, None: 0}[number], err
  assert "continuing after step" in out
  assert losses(killed) == losses(whole) and len(losses(whole)) == 12

  process = start(folder, killed, *(option for option in options if ".data." not in option))
  _, err = process.communicate()
  assert process.returncode == 2 and f"recipe.data.batching: {batching} in the checkpoint, fixed now" in err
