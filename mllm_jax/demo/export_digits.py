"""Exports scikit-learn's bundled copy of the UCI optical digits to `assets/digits.npz`. Only this needs scikit-learn.

    python -m mllm_jax.demo.export_digits

The split is made here, once, and stored beside the scans: 1437 to train on, 360 held out, every digit in proportion.
"""

import pathlib

import numpy as np

ASSETS = pathlib.Path(__file__).parent / "assets"
HELD_OUT = 360
ATTRIBUTION = """\
digits.npz holds the 1797 test scans of "Optical Recognition of Handwritten Digits" by E. Alpaydin and C. Kaynak,
UCI Machine Learning Repository (1998), https://doi.org/10.24432/C50P49, licensed under Creative Commons Attribution 4.0
International (https://creativecommons.org/licenses/by/4.0/). They were taken from the copy bundled with scikit-learn
(sklearn.datasets.load_digits). The 8 x 8 scans with their 17 grey levels are unchanged; the split into training and
held-out scans ("held_out") was added here.
"""


def split(labels: np.ndarray, held_out: int, seed: int = 0) -> np.ndarray:
  """Bool [N], True for exactly `held_out` scans, drawn so that every digit has its share (largest remainders first)."""
  rng = np.random.default_rng(seed)
  counts = np.bincount(labels, minlength=10)
  exact = counts * held_out / len(labels)
  quota = np.floor(exact).astype(int)
  quota[np.argsort(quota - exact, kind="stable")[: held_out - quota.sum()]] += 1
  chosen = np.zeros(len(labels), bool)
  for digit in range(10):
    chosen[rng.permutation(np.flatnonzero(labels == digit))[: quota[digit]]] = True
  return chosen


def main() -> None:
  from sklearn.datasets import load_digits

  bundle = load_digits()
  labels = bundle.target.astype(np.uint8)
  ASSETS.mkdir(exist_ok=True)
  np.savez_compressed(
    ASSETS / "digits.npz", scans=bundle.images.astype(np.uint8), labels=labels, held_out=split(labels, HELD_OUT)
  )
  (ASSETS / "ATTRIBUTION.txt").write_text(ATTRIBUTION)


if __name__ == "__main__":
  main()
