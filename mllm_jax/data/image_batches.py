"""Batches of images alone, for VDIM's own training.

As in `pipeline`, which images make up step n is a pure function of the seed and n, on any number of processes.
"""

from collections.abc import Iterator
from typing import NamedTuple

import grain
import numpy as np
from PIL import Image

from mllm_jax.config import ConfigError, DataConfig
from mllm_jax.data import images
from mllm_jax.data.bad_samples import BadSamples, Made, make
from mllm_jax.data.order import FixedOrder
from mllm_jax.data.patches import patchify
from mllm_jax.data.records import DataError, Records, Sample
from mllm_jax.data.sources.json_file import JsonRecords
from mllm_jax.data.sources.mix import open_data

LONGEST = 100  # times its short side; a longer image would become a strip of gigabytes


class ImageBatch(NamedTuple):
  """Square images of the tower's size: patches uint8 [A, B, P, 3 p p]; weights float32 [A, B], 0 for a skipped one."""

  patches: np.ndarray
  weights: np.ndarray


class DistinctImages(Records):
  """Each image of a LLaVA file once, under the first sample that has it; samples without an image are left out.

  Every sample is read for it, once. Can be pickled.
  """

  def __init__(self, records: Records):
    self.source, self._records = records.source, records
    seen: set[str | bytes] = set()
    self._places: list[tuple[int, int]] = []
    for i in range(len(records)):
      try:
        sample = records[i]
      except DataError:
        self._places.append((i, 0))  # for on_bad_sample to deal with
        continue
      for number, image in enumerate(sample.images):
        if image not in seen:
          seen.add(image)
          self._places.append((i, number))
    if not self._places:
      raise DataError(f"{self.source}: no sample has an image; name data with images")

  def __len__(self) -> int:
    return len(self._places)

  def __getitem__(self, i: int) -> Sample:
    sample, number = self._places[self._index(i)]
    found = self._records[sample]
    return Sample(found.id, found.index, (found.images[number],), (), source=found.source)


def open_images(data: DataConfig, seed: int) -> Records:
  """The images that data.path and data.mix name. Raises as `mix.open_data` does."""
  records = open_data(data, seed)
  return DistinctImages(records) if isinstance(records, JsonRecords) else records


def centre_square(image: Image.Image, size: int) -> np.ndarray:
  """The short side brought to `size` pixels by taking the nearest, then the middle: uint8 [size, size, 3].

  As torchvision's Resize and CenterCrop do it, with which VDIM was trained. Raises DataError for a strip.
  """
  width, height = image.size
  short = min(width, height)
  if max(width, height) > LONGEST * short:
    raise DataError(f"an image of {width} x {height} is too long for its short side; take it out")
  across, down = (size * side // short for side in (width, height))
  resized = image.resize((across, down), Image.Resampling.NEAREST)
  left, top = round((across - size) / 2), round((down - size) / 2)
  return np.asarray(resized.crop((left, top, left + size, top + size)), np.uint8)


class ImageBatches:
  """The batches of the stage; iterating gives (ids of this process's images, ImageBatch) for each step.

  Each process holds its contiguous share of every micro-batch's rows; the ids are in the order of the flattened rows.

  Args:
    records: samples with images, of which the first counts.
    image_size, patch_size: of the tower.
    batch_size: images of a step, over all micro-batches and processes.
    accumulation: micro-batches a step is computed in.
    steps: how many; images are shuffled anew each time that all have been seen.
    seed: of the shuffling; not negative.
    process_index, process_count: this process among those that share a step.
    threads: that decode; 0 does so when an image is asked for.
    on_bad_sample: "error", "skip" (a row of weight 0) or "replace"; see `bad_samples`.
    bad_samples: is told of every image in the order of the batches; None puts up with any number of bad ones.

  Raises:
    ConfigError: batch_size cannot be shared evenly, or there are no steps.
    While iterating, DataError: an image that cannot be used.
  """

  def __init__(
    self,
    records: Records,
    *,
    image_size: int,
    patch_size: int,
    batch_size: int,
    steps: int,
    accumulation: int = 1,
    seed: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 4,
    on_bad_sample: str = "error",
    bad_samples: BadSamples | None = None,
  ):
    parts = accumulation * process_count
    if batch_size < 1 or accumulation < 1 or batch_size % parts or not 0 <= process_index < process_count:
      raise ConfigError(
        f"batch_size={batch_size} cannot be shared by {accumulation} micro-batches x {process_count} processes; "
        f"set a multiple of {parts}"
      )
    if steps < 1:
      raise ConfigError(f"steps={steps} must be 1 or more")
    self.steps = steps
    self._order = FixedOrder(len(records), 0, batch_size, 1.0, steps, seed)
    self._records, self._seed = records, seed
    self._image_size, self._patch_size = image_size, patch_size
    self._shape = (accumulation, batch_size // parts)
    self._process_index, self._process_count = process_index, process_count
    self._threads, self._policy, self._bad_samples = threads, on_bad_sample, bad_samples

  @property
  def samples(self) -> int:
    """Images of the data set."""
    return len(self._records)

  def iterate(self, start_step: int = 0) -> Iterator[tuple[list[str], ImageBatch]]:
    """The batches from start_step on, the same as in a run from the beginning."""
    count = self._shape[0] * self._shape[1]
    numbers = grain.MapDataset.range(start_step * count, self.steps * count)
    options = grain.ReadOptions(num_threads=self._threads, prefetch_buffer_size=2 * count if self._threads else 0)
    rows = iter(numbers.map(self._row).to_iter_dataset(options))
    if self._bad_samples:
      self._bad_samples.resume(start_step, start_step * count, self._process_count)
    try:
      for step in range(start_step, self.steps):
        made = [next(rows) for _ in range(count)]
        for place, each in enumerate(made if self._bad_samples else ()):
          self._bad_samples.note(each, step, place)
        yield [each.name for each in made], self._batch([each.value for each in made])
    finally:
      rows.close()

  def _row(self, number: int) -> Made[np.ndarray]:
    """The number-th image that this process takes, counted over all steps."""
    micro_batch, row = divmod(int(number), self._shape[1])
    place = (micro_batch * self._process_count + self._process_index) * self._shape[1] + row
    return make(self._records, self._order.samples(place)[0], self._patches, self._policy, self._seed)

  def _patches(self, sample: Sample) -> np.ndarray:
    """uint8 [P, 3 p p]. Raises DataError, naming the sample and its file."""
    if not sample.images:
      raise DataError(f"{sample.name} has no image; name data with images, or set data.on_bad_sample=skip")
    image = images.load(sample.images[0], sample_name=sample.name)
    try:
      return patchify(centre_square(image, self._image_size), self._patch_size)
    except DataError as error:
      raise DataError(f"{sample.name}: {error}") from error

  def _batch(self, rows: list[np.ndarray | None]) -> ImageBatch:
    shape = ((self._image_size // self._patch_size) ** 2, 3 * self._patch_size**2)
    filled = np.stack([np.zeros(shape, np.uint8) if row is None else row for row in rows])
    weights = np.array([row is not None for row in rows], np.float32)
    return ImageBatch(filled.reshape(*self._shape, *shape), weights.reshape(self._shape))
