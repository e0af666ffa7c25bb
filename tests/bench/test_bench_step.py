"""The benchmark of a step's host time: its state is as the real one's; how fast it was is not asked."""

import numpy as np
import pytest

from mllm_jax.bench import step
from mllm_jax.bench.__main__ import main
from mllm_jax.config import DecoderConfig, VisionConfig


def test_arrays_of_the_7b_model():
  stacked, single = step.paths(True), step.paths(False)
  assert len(single) == len(set(single)) and "decoder/layers/31/q_proj/lora/a" in single
  # Of the tower the last layer is not used.
  layers = {"decoder": DecoderConfig().layers, "vision": VisionConfig().layers - 1}
  of_layers = [path for path in stacked if "/layers/" in path]
  assert len(single) == len(stacked) - len(of_layers) + sum(layers[path.partition("/")[0]] for path in of_layers)


def test_a_turn_takes_real_steps(tmp_path):
  side = step.Side(True, tmp_path / "stacked")
  assert side.take(2, rows=8, length=8) > 0
  assert int(side.state.step) == 2 and set(side.frozen) | set(side.state.trainable) == set(step.paths(True))
  # Two gradients of 1e-3: 1 - 0.9^2 of them.
  np.testing.assert_allclose([float(x[0]) for x in side.state.optimizer[0].mu.values()], 1.9e-4, rtol=1e-5)
  assert (tmp_path / "stacked" / "metrics.jsonl").read_text().count("\n") == 1  # the last step's


def test_it_is_listed(capsys):
  assert main([]) == 0 and "\n  step " in capsys.readouterr().out


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "x"])
def test_counts_are_of_one_or_more(value, capsys):
  with pytest.raises(SystemExit) as error:
    main(["step", f"--steps={value}"])
  assert error.value.code == 2 and f"--steps: {value} must be" in capsys.readouterr().err
