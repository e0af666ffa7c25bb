"""Scenes of handwritten digits, and the pictures of them.

A scene is one to five scans, each with a colour, a size and a place, on a dark ground. The picture is cut into a 3 x 3
raster of places and into patches of 14 pixels; no place holds two digits, and a digit's centre lies well inside one
patch. A picture of one tile has the 8 x 8 patches that the small vision tower sees. Wide, tall and large ones have more
tiles, and digits of as many pixels: shrunk to one tile such a picture can hardly be read.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable

import numpy as np
from PIL import Image

IMAGE_SIZE = 112
PATCH_SIZE = 14
GRID = IMAGE_SIZE // PATCH_SIZE
SIZES = range(15, 22)  # pixels along one side of a scan
JITTER = 4  # pixels between a digit's centre and the centre of its patch, at most, along each axis
MAX_OBJECTS = 5

COLOURS = {
  "red": (235, 45, 45),
  "orange": (255, 150, 30),
  "yellow": (250, 240, 60),
  "green": (60, 205, 70),
  "cyan": (50, 220, 230),
  "blue": (75, 115, 255),
  "pink": (255, 130, 205),
  "white": (245, 245, 245),
}
GROUNDS = {"black": (8, 8, 8), "gray": (75, 75, 75), "navy": (14, 18, 85), "brown": (78, 45, 16), "teal": (8, 72, 70)}
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")
SHAPES = ((1, 1), (2, 1), (1, 2), (3, 1), (1, 3), (2, 2))  # (columns, rows) of tiles


@dataclasses.dataclass(frozen=True)
class Object:
  """One scan in a scene. `x`, `y`: the centre in pixels; `row`, `column`: its place in the 3 x 3 raster."""

  scan: int
  digit: int
  colour: str
  row: int
  column: int
  x: int
  y: int
  size: int

  @property
  def place(self) -> str:
    return f"{ROWS[self.row]} {COLUMNS[self.column]}"

  @property
  def patch(self) -> int:
    """Index of the patch of a one-tile picture in which the centre lies, row by row."""
    return self.y // PATCH_SIZE * GRID + self.x // PATCH_SIZE

  @property
  def box(self) -> tuple[int, int, int, int]:
    """Left, top, right, bottom in pixels; right and bottom are outside."""
    left, top = self.x - self.size // 2, self.y - self.size // 2
    return left, top, left + self.size, top + self.size


@dataclasses.dataclass(frozen=True)
class Scene:
  """Objects in reading order of their places, on a ground of (columns, rows) tiles."""

  ground: str
  objects: tuple[Object, ...]
  shape: tuple[int, int] = (1, 1)


@dataclasses.dataclass(frozen=True)
class Digits:
  """The scans: `scans` uint8 [N, 8, 8] with values 0..16, `labels` [N], `held_out` bool [N]."""

  scans: np.ndarray
  labels: np.ndarray
  held_out: np.ndarray

  @functools.cached_property
  def train_indices(self) -> np.ndarray:
    return np.flatnonzero(~self.held_out)

  @functools.cached_property
  def held_out_indices(self) -> np.ndarray:
    return np.flatnonzero(self.held_out)


@functools.cache
def load_digits() -> Digits:
  """The scans that ship with the package (see assets/ATTRIBUTION.txt)."""
  with np.load(pathlib.Path(__file__).parent / "assets" / "digits.npz") as stored:
    return Digits(stored["scans"], stored["labels"], stored["held_out"])


def sample_scene(
  rng: np.random.Generator,
  scans: np.ndarray,
  *,
  count: int | None = None,
  jitter: int = JITTER,
  shape: tuple[int, int] = (1, 1),
) -> Scene:
  """A random scene of `count` objects (one to five where None) from the scan indices `scans`, of `shape` tiles."""
  labels = load_digits().labels
  count = int(rng.integers(1, MAX_OBJECTS + 1)) if count is None else count
  objects = []
  for cell in np.sort(rng.permutation(9)[:count]):
    row, column = divmod(int(cell), 3)
    scan = int(scans[rng.integers(len(scans))])
    x, y = (_centre(rng, third, jitter, tiles) for third, tiles in zip((column, row), shape))
    colour = list(COLOURS)[rng.integers(len(COLOURS))]
    size = int(rng.integers(SIZES.start, SIZES.stop))
    objects.append(Object(scan, int(labels[scan]), colour, row, column, x, y, size))
  return Scene(list(GROUNDS)[rng.integers(len(GROUNDS))], tuple(objects), shape)


def _centre(rng: np.random.Generator, third: int, jitter: int, tiles: int) -> int:
  """A digit's centre along one axis: that of a patch, and up to `jitter` pixels beside it."""
  patch = int(rng.choice(patches_of_third(third, tiles)))
  return patch * PATCH_SIZE + PATCH_SIZE // 2 + int(rng.integers(-jitter, jitter + 1))


@functools.cache
def patches_of_third(third: int, tiles: int) -> tuple[int, ...]:
  """Patches along one axis in which a digit of that row or column may be centred: those that lie in this third whole,
  but for the outermost, where a digit would stick out. Two thirds are a patch apart, lest digits touch."""
  count = tiles * GRID
  inside = lambda patch: third * count <= 3 * patch and 3 * (patch + 1) <= (third + 1) * count
  patches = [patch for patch in range(1, count - 1) if inside(patch)]
  return tuple(patch for patch in patches if tiles == 1 or inside(patch + 1))


@functools.cache
def scan_image(scan: int) -> Image.Image:
  """The scan as an 8 x 8 grey picture, white on black."""
  return Image.fromarray((load_digits().scans[scan].astype(np.float32) * (255 / 16)).round().astype(np.uint8))


@functools.cache
def glyph(scan: int, size: int) -> np.ndarray:
  """The scan enlarged to size x size, float32 in 0..1: how much of a pixel the ink covers."""
  return np.asarray(scan_image(scan).resize((size, size), Image.Resampling.BICUBIC), np.float32) / 255


def render(scene: Scene, glyphs: Callable[[int, int], np.ndarray] = glyph) -> np.ndarray:
  """The picture, uint8 [112 rows, 112 columns, 3]. `glyphs` gives the ink of (scan, size)."""
  columns, rows = scene.shape
  picture = np.empty((IMAGE_SIZE * rows, IMAGE_SIZE * columns, 3), np.float32)
  picture[:] = GROUNDS[scene.ground]
  for thing in scene.objects:
    left, top, right, bottom = thing.box
    ink = glyphs(thing.scan, thing.size)[..., None]
    area = picture[top:bottom, left:right]
    area += ink * (np.asarray(COLOURS[thing.colour], np.float32) - area)
  return (picture + 0.5).astype(np.uint8)
