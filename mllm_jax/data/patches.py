"""Patches: crops cut into the squares that the vision tower embeds, which is how they travel to the device.

So crops of any shape with as many patches have arrays of one shape.
"""

import numpy as np


def patchify(pixels: np.ndarray, side: int) -> np.ndarray:
  """Pixels [..., H, W, 3] as patches [..., H // side * (W // side), side * side * 3], row by row, each its pixels row
  by row. What fills no patch at the bottom and the right is left out, as by a convolution without padding
  (SigLIP-so400m's 384 pixels are 27 patches of 14 and 6 pixels)."""
  *axes, height, width, colours = pixels.shape
  rows, columns = height // side, width // side
  cut = pixels[..., : rows * side, : columns * side, :].reshape(*axes, rows, side, columns, side, colours)
  return np.moveaxis(cut, -3, -4).reshape(*axes, rows * columns, side * side * colours)


def unpatchify(patches: np.ndarray, grid: tuple[int, int], side: int) -> np.ndarray:
  """The pixels [rows * side, columns * side, 3] of one crop's patches [P, side * side * 3]; inverse of `patchify`."""
  rows, columns = grid
  cells = patches[: rows * columns].reshape(rows, columns, side, side, 3)
  return np.swapaxes(cells, 1, 2).reshape(rows * side, columns * side, 3)
