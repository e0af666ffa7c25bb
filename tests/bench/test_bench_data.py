"""The benchmark of the data path, on a few pictures: what it prints is right, how fast it was is not asked."""

from mllm_jax.bench import data
from mllm_jax.bench.__main__ import main


def test_ratios_are_of_medians():
  speeds = {
    "mllm_jax": [data.Speed(300, 4.0), data.Speed(100, 5.0), data.Speed(200, 9.0)],
    "PyTorch": [data.Speed(100, 10.0)] * 3,
  }
  lines = data.table(speeds).splitlines()
  assert lines[0].split()[:3] == ["mllm_jax", "200.0", "samples/s"] and lines[0].endswith("(300, 100, 200)")
  assert lines[2].split() == ["ratio", "2.00", "2.00"]


def test_our_side_sees_every_sample(tmp_path):
  data.write(tmp_path, 12)
  speed = data.ours(tmp_path, 4, 3, 1)
  assert speed.samples > 0 and speed.cpu > 0


def test_it_is_listed(capsys):
  assert main([]) == 0 and "\n  data " in capsys.readouterr().out
