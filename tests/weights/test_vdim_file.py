"""VDIM in a run's own file."""

import numpy as np

from mllm_jax.weights import vdim_file


def test_the_same_content_gives_the_same_bytes(tmp_path):
  arrays = {"projector/pyramid/b": np.arange(3, dtype=np.float16), "projector/pyramid/a": np.ones((2, 2))}
  about = {f"text {number}": str(number) for number in range(8)}
  written = []
  for number, texts in enumerate([about, dict(reversed(about.items()))] * 4):
    vdim_file.write(tmp_path / f"{number}.safetensors", arrays, texts)
    written.append((tmp_path / f"{number}.safetensors").read_bytes())
  assert len(set(written)) == 1
  assert vdim_file.about(tmp_path / "0.safetensors") == about
  found = vdim_file.read(tmp_path / "0.safetensors", {"projector/pyramid/b": (3,)})
  assert found["projector/pyramid/b"].dtype == np.float32 and found["projector/pyramid/b"].tolist() == [0, 1, 2]
