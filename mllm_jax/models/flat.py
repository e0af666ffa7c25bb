"""Flat maps: feature maps of any height and width on one padded shape.

A map of h x w cells is the first h * w of N rows, row by row; the rest is padding. So a batch holds maps of different
shapes, compiled once, and their area bounds the memory, not their longest side. A grid is the pair (h, w), an array
like any other; (0, 0) stands for no map at all.
"""

import jax
import jax.numpy as jnp

CUBIC = -0.75  # the coefficient of PyTorch's bicubic interpolation; jax.image.resize has -0.5


def coordinates(grids: jax.Array, length: int) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Where the places of flat maps lie: (row, column, whether it is a place of the map), each [..., length].

  grids: int32 [..., 2], at most `length` cells each. Padding has row and column 0.
  """
  height, width = grids[..., :1], grids[..., 1:]
  place = jnp.arange(length, dtype=jnp.int32)
  valid = place < height * width
  place = jnp.where(valid, place, 0)
  width = jnp.maximum(width, 1)
  return place // width, place % width, valid


def bicubic_matrix(places: jax.Array, target: jax.Array, source: jax.Array, columns: int) -> jax.Array:
  """Bicubic interpolation along one axis, as PyTorch computes it (align_corners False, no antialiasing), as a matrix.

  places: int32 [..., n], places of the target axis. target, source: int32, broadcastable to [...], how long the two
  axes are. Returns float32 [..., n, columns]: what each cell of a source axis of at most `columns` cells weighs. Beyond
  the ends the end cells are repeated. Equal lengths give exactly 0 and 1.
  """
  target, source = jnp.asarray(target)[..., None], jnp.asarray(source)[..., None]
  scale = source.astype(jnp.float32) / jnp.maximum(target, 1).astype(jnp.float32)
  position = (places.astype(jnp.float32) + 0.5) * scale - 0.5
  first = jnp.floor(position)
  cells = jnp.arange(columns)
  matrix = jnp.zeros((*position.shape, columns), jnp.float32)
  for tap in (-1, 0, 1, 2):
    cell = jnp.clip(first.astype(jnp.int32) + tap, 0, jnp.maximum(source - 1, 0))
    weight = _cubic(jnp.abs(position - first - tap))
    matrix = matrix + weight[..., None] * (cell[..., None] == cells)
  return matrix


def _cubic(distance: jax.Array) -> jax.Array:
  """Weight of a cell at this distance, 0..2 (Keys 1981)."""
  a, x = CUBIC, distance
  near = ((a + 2) * x - (a + 3)) * x * x + 1
  far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
  return jnp.where(x <= 1, near, far)


def bicubic_weight(cells: jax.Array, places: jax.Array, target: jax.Array, source: jax.Array) -> jax.Array:
  """What single cells weigh in `bicubic_matrix`, element by element; all arguments are broadcast to one shape."""
  position = (places.astype(jnp.float32) + 0.5) * (source / jnp.maximum(target, 1)).astype(jnp.float32) - 0.5
  first = jnp.floor(position)
  weight = 0.0
  for tap in (-1, 0, 1, 2):
    cell = jnp.clip(first.astype(jnp.int32) + tap, 0, jnp.maximum(source - 1, 0))
    weight = weight + jnp.where(cell == cells, _cubic(jnp.abs(position - first - tap)), 0)
  return weight


def from_cells(cells: jax.Array, grid: jax.Array, n: int) -> jax.Array:
  """A map whose cells were made n x n pixels each, row by row: [P, n * n, C] -> [n * n * P, C], padding 0.

  grid: int32 [2], (h, w) before. The pixels of a cell that lie beside each other stay so: whole lines of n are moved.
  """
  count, _, width = cells.shape
  line = jnp.arange(n * count, dtype=jnp.int32)
  valid = line < n * grid[0] * grid[1]
  columns = jnp.maximum(grid[1], 1)
  row, column = line // columns, line % columns
  place = jnp.where(valid, ((row // n) * columns + column) * n + row % n, 0)
  lines = jnp.where(valid[:, None], cells.reshape(n * count, n * width)[place], 0)
  return lines.reshape(n * n * count, width)


def lines_of_cells(grid: jax.Array, count: int, n: int) -> tuple[jax.Array, jax.Array]:
  """The way back of `from_cells`: the lines of n pixels of each cell, [P, n], and which cells are of the map, [P]."""
  row, column, valid = coordinates(grid, count)
  return (row[:, None] * n + jnp.arange(n)) * jnp.maximum(grid[1], 1) + column[:, None], valid


def masked(maps: jax.Array, grids: jax.Array) -> jax.Array:
  """Flat maps [..., P, C] of grids [..., 2] with zeros for padding, whatever stood there."""
  return jnp.where(coordinates(grids, maps.shape[-2])[2][..., None], maps, 0)
