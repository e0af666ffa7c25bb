"""Processor: a conversation and its images become one row. Training and inference share it and so cannot differ."""

import copy
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

from mllm_jax.config import VisionConfig
from mllm_jax.data import chat, images, layout
from mllm_jax.data.aspects import Aspect
from mllm_jax.data.enlarging import Enlarging
from mllm_jax.data.patches import patchify
from mllm_jax.data.records import IMAGE_PLACEHOLDER, DataError, Sample, Turn

if TYPE_CHECKING:
  from mllm_jax.batch import Batch


class Row(NamedTuple):
  """One row of a `Batch`: the same fields without the leading B."""

  tokens: np.ndarray
  targets: np.ndarray
  loss_weights: np.ndarray
  segment_ids: np.ndarray
  positions: np.ndarray
  visual_index: np.ndarray
  patches: np.ndarray
  grids: np.ndarray


class Processor:
  """Makes rows of fixed shape; can be pickled and used by several threads.

  Args:
    tokenizer: from `chat.load_tokenizer`.
    aspect: how images of any shape become crops for the vision tower.
    template: a name in `chat.TEMPLATES`.
    max_length: places in a training row.
    max_images: crops a row has room for (K); an image takes one, or up to `aspect.most_crops`.
    enlarging: changes the sizes of training samples' images before they are cut; never those of a prompt.

  Raises:
    DataError: an unknown template, or one that needs special tokens which the tokenizer does not have.
  """

  def __init__(
    self,
    tokenizer: chat.ChatTokenizer,
    aspect: Aspect,
    template: str,
    max_length: int,
    max_images: int,
    enlarging: Enlarging | None = None,
  ):
    self.tokenizer = tokenizer
    self.aspect = aspect
    self.template = template
    self.max_length = max_length
    self.max_images = max_images
    self.enlarging = enlarging
    chat.end_id(template, tokenizer)  # raises where the two do not fit, before any sample is read

  @property
  def vision(self) -> VisionConfig:
    """The vision tower that the crops are for."""
    return self.aspect.vision

  @property
  def tokens_per_crop(self) -> int:
    """T: visual tokens of one crop."""
    return self.aspect.tokens_per_crop

  @property
  def end_id(self) -> int:
    """The token that ends an answer."""
    return chat.end_id(self.template, self.tokenizer)

  def row(self, sample: Sample, seed: int = 0) -> Row:
    """A training row of max_length places; a sample without images has black patches and grids of 0.

    `seed` is that of `enlarging`.

    Raises:
      DataError: the sample has a problem that `records.check` reports, an image cannot be decoded, or no trained-on
        token is left in max_length places. The message names the sample.
    """
    try:
      encoded = chat.encode(sample.turns, self.template, self.tokenizer, len(sample.images), sample.system)
      self._check_room(len(sample.images))
      pictures = self.pictures(sample, seed)
      places = self.places(encoded, [picture.size for picture in pictures], self.max_length)
      if not places.loss_weights.any():
        raise DataError(self._nothing_left(encoded, [picture.size for picture in pictures]))
      patches, grids = self._patches(pictures)
    except DataError as error:
      raise DataError(f"{sample.name}: {error}") from error
    return Row(*layout.pad(places, self.max_length), patches, grids)

  def pictures(self, sample: Sample, seed: int = 0) -> list[Image.Image]:
    """A training sample's images as they are cut into crops. Raises DataError for one that cannot be used."""
    loaded = [images.load(path) for path in sample.images]
    sizes = self.training_sizes(sample, [picture.size for picture in loaded], seed)
    return [
      picture if picture.size == size else picture.resize(size, Image.Resampling.BICUBIC)
      for picture, size in zip(loaded, sizes, strict=True)
    ]

  def training_sizes(self, sample: Sample, sizes: Sequence[tuple[int, int]], seed: int) -> Sequence[tuple[int, int]]:
    """The (widths, heights) of `pictures`, from those of the sample's images."""
    return sizes if self.enlarging is None else self.enlarging.sizes(sample, sizes, seed)

  def empty_row(self) -> Row:
    """A training row of padding alone, which stands where a sample is skipped."""
    nothing = layout.RowArrays(*(np.zeros(0, dtype) for dtype in layout.DTYPES))
    return Row(*layout.pad(nothing, self.max_length), *self._patches([]))

  def packed_row(self, samples: Sequence[Sample], length: int, seed: int = 0) -> Row:
    """A training row of `length` places that samples share, each cut to max_length; without any, a row of padding.

    Raises:
      DataError: as from `row`, or the samples have more crops than max_images. The message names the sample.
      ValueError: they take more than `length` places.
    """
    rows = [self.with_room(len(sample.images)).row(sample, seed) for sample in samples]
    return join_rows(rows, length, self.max_images, self.aspect)

  def prompt(
    self,
    turns: Sequence[Turn],
    pictures: Sequence[Image.Image],
    max_length: int | None = None,
    system: str | None = None,
  ) -> Row:
    """A row whose last human turn waits for its answer; nothing in it is trained on.

    Args:
      turns: ending with a human turn; `<image>` once in the human turns for each picture.
      pictures: in the order of the placeholders; any mode that `images.to_rgb` knows.
      max_length: places of the row, the rest padded; None makes it as long as the prompt.
      system: replaces the template's system text.

    Raises:
      DataError: placeholders and pictures do not match, too many pictures, or a prompt longer than max_length, which is
        never cut because its end is what asks for the answer.
    """
    places = self._prompt_places(turns, [picture.size for picture in pictures], system)
    length = len(places.tokens) if max_length is None else max_length
    if len(places.tokens) > length:
      raise DataError(
        f"the prompt takes {len(places.tokens)} places and there are {length}; shorten it or raise max_length"
      )
    return Row(*layout.pad(places, length), *self._patches([images.to_rgb(picture) for picture in pictures]))

  def prompt_length(self, turns: Sequence[Turn], sizes: Sequence[tuple[int, int]], system: str | None = None) -> int:
    """How many places `prompt` takes with pictures of these (widths, heights). Raises DataError as that."""
    return len(self._prompt_places(turns, sizes, system).tokens)

  def __call__(
    self, conversations: Sequence, images: Sequence[Sequence] | None = None, max_length: int | None = None
  ) -> "Batch":
    """Conversations and their pictures as a Batch [B, ...] of NumPy arrays.

    Args:
      conversations: for each row a question, or its turns: `Turn`s, or dictionaries as in LLaVA's files ({"from",
        "value"}) or as in chat APIs ({"role", "content"}). Human and model alternate, human first. One that ends with
        a human turn waits for its answer; one that ends with the model's is a training row. `<image>` stands for a
        picture in the human turns; without any, the pictures come first.
      images: for each row its pictures, as paths or PIL images; None for none.
      max_length: places of every row; None makes them as long as the longest.

    Raises:
      DataError: names the row: turns, placeholders and pictures do not match, or it is longer than max_length.
    """
    pictures_of = [[] for _ in conversations] if images is None else images
    if len(pictures_of) != len(conversations):
      raise DataError(f"{len(conversations)} conversations and pictures for {len(pictures_of)}; give one list for each")
    roomy = self.with_room(max([len(pictures) for pictures in pictures_of], default=0))
    rows = []
    for number, (conversation, pictures) in enumerate(zip(conversations, pictures_of)):
      try:
        turns = as_turns(conversation, len(pictures))
        rows.append(roomy._conversation(turns, [as_picture(picture) for picture in pictures], max_length))
      except DataError as error:
        raise DataError(f"conversation {number}: {error}") from error
    length = max(len(row.tokens) for row in rows)
    return collate([pad_row(row, max_length or length) for row in rows])

  def with_room(self, n_images: int) -> "Processor":
    """The same processor for rows with as many crops as any `n_images` pictures need, at least one."""
    roomy = copy.copy(self)
    roomy.max_images = max(1, n_images * self.aspect.most_crops)
    return roomy

  def image_cost(self, width: int, height: int) -> tuple[int, int]:
    """(crops, places) of an image of this size."""
    return self.aspect.crops_of(width, height), self.aspect.places_of(width, height)

  def places(
    self, encoded: chat.Encoded, sizes: Sequence[tuple[int, int]], max_length: int | None = None
  ) -> layout.RowArrays:
    """A conversation with its images, of these (widths, heights), cut to max_length places; without padding."""
    rows, tokens, start = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)], 0
    for size in sizes:
      places = self.aspect.places(*size)
      rows.append(np.where(places.rows >= 0, places.rows + np.int32(start), places.rows))
      tokens.append(places.tokens)
      start += self.aspect.crops_of(*size) * self.tokens_per_crop
    lengths = [len(table) for table in rows[1:]]
    return layout.expand(encoded, lengths, max_length, np.concatenate(rows), np.concatenate(tokens))

  def _prompt_places(
    self, turns: Sequence[Turn], sizes: Sequence[tuple[int, int]], system: str | None
  ) -> layout.RowArrays:
    ids = chat.encode_prompt(turns, self.template, self.tokenizer, len(sizes), system)
    return self.places(chat.Encoded(ids, np.zeros(len(ids), bool)), sizes)

  def _conversation(self, turns: Sequence[Turn], pictures: Sequence[Image.Image], max_length: int | None) -> Row:
    """A prompt, or a training row, as long as it is."""
    if turns[-1].role == "human":
      return self.prompt(turns, pictures, max_length)
    encoded = chat.encode(turns, self.template, self.tokenizer, len(pictures))
    places = self.places(encoded, [picture.size for picture in pictures])
    if max_length is not None and len(places.tokens) > max_length:
      raise DataError(f"it takes {len(places.tokens)} places and there are {max_length}; raise max_length")
    return Row(*places, *self._patches([images.to_rgb(picture) for picture in pictures]))

  def _check_room(self, crops: int) -> None:
    if crops > self.max_images:
      kind = "images" if self.aspect.most_crops == 1 else "crops"
      raise DataError(f"{crops} {kind}, and a row has room for {self.max_images}; raise data.max_images")

  def _patches(self, pictures: Sequence[Image.Image]) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [K, P, 3 p p] and int32 [K, 2]; what no picture uses stays 0."""
    self._check_room(sum(self.aspect.crops_of(*picture.size) for picture in pictures))
    patches, grids = empty_patches(self.max_images, self.aspect)
    side, k = self.vision.patch_size, 0
    for picture in pictures:
      for crop in self.aspect.crops(picture):
        cut = patchify(crop, side)
        patches[k, : len(cut)], grids[k] = cut, (crop.shape[0] // side, crop.shape[1] // side)
        k += 1
    return patches, grids

  def _nothing_left(self, encoded: chat.Encoded, sizes: Sequence[tuple[int, int]]) -> str:
    if not encoded.trained_on.any():
      return "no answer that is not empty, so nothing to train on; add one or take the sample out"
    text, visual = len(encoded.ids) - len(sizes), sum(self.image_cost(*size)[1] for size in sizes)
    return (
      f"no trained-on token is left in {self.max_length} places ({text} text and {visual} visual tokens); "
      "raise data.max_length or take the sample out"
    )


ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}


def as_turns(conversation: str | Sequence, n_images: int) -> list[Turn]:
  """Turns out of what `Processor.__call__` takes, with a placeholder for each picture in front if there is none.

  Raises:
    DataError: an empty conversation, a turn of another form, or a role that is not human's or the model's.
  """
  turns = []
  for turn in [{"from": "human", "value": conversation}] if isinstance(conversation, str) else conversation:
    if isinstance(turn, Turn):
      role, text = turn.role, turn.text
    elif isinstance(turn, Mapping):
      role, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    else:
      role = text = None
    if role not in ROLES or not isinstance(text, str):
      raise DataError(
        f"{str(turn)[:80]!r} is no turn; use {{'from': 'human' or 'gpt', 'value': text}} or {{'role': 'user' or "
        "'assistant', 'content': text}"
      )
    turns.append(Turn(ROLES[role], text))
  if not turns:
    raise DataError("it has no turns")
  if not any(IMAGE_PLACEHOLDER in turn.text for turn in turns if turn.role == "human"):
    turns[0] = Turn(turns[0].role, f"{IMAGE_PLACEHOLDER}\n" * n_images + turns[0].text)
  return turns


def as_picture(picture: str | os.PathLike | Image.Image) -> Image.Image:
  """A picture from a file, or as it is. Raises DataError where the file cannot be read."""
  return picture if isinstance(picture, Image.Image) else images.load(os.fspath(picture))


def pad_row(row: Row, length: int) -> Row:
  """A row with padding on the right up to `length` places."""
  places = layout.RowArrays(*row[: len(layout.RowArrays._fields)])
  return Row(*layout.pad(places, length), row.patches, row.grids)


def join_rows(rows: Sequence[Row], length: int, max_images: int, aspect: Aspect) -> Row:
  """Puts rows of one sample each behind one another, without their padding, as segments 1, 2, ... of one row.

  Positions restart in every segment; crops stand in the order of the samples, and visual_index counts on through their
  table of `aspect.tokens_per_crop` tokens each.

  Raises:
    DataError: the crops are more than max_images.
    ValueError: the rows take more than `length` places.
  """
  patches, grids = empty_patches(max_images, aspect)
  parts, crops = [[] for _ in layout.RowArrays._fields], 0
  for segment, row in enumerate(rows, start=1):
    used = int(row.grids.any(axis=1).sum())
    if crops + used > max_images:
      raise DataError(f"{crops + used} images, and a row has room for {max_images}; raise data.max_images")
    patches[crops : crops + used], grids[crops : crops + used] = row.patches[:used], row.grids[:used]
    places = layout.take_segment(layout.RowArrays(*row[: len(parts)]), segment, crops * aspect.tokens_per_crop)
    for part, values in zip(parts, places, strict=True):
      part.append(values)
    crops += used
  joined = [np.concatenate(part) if part else np.zeros(0, np.int32) for part in parts]
  joined = layout.RowArrays(*joined)._replace(loss_weights=joined[2].astype(np.float32))
  return Row(*layout.pad(joined, length), patches, grids)


def empty_patches(crops: int, aspect: Aspect) -> tuple[np.ndarray, np.ndarray]:
  """The patches uint8 [crops, P, 3 p p] and grids int32 [crops, 2] of no picture at all."""
  return np.zeros((crops, aspect.patches, aspect.vision.patch_values), np.uint8), np.zeros((crops, 2), np.int32)


def collate(rows: Iterable[Row]) -> "Batch":
  """Stacks rows of equal shape into a Batch of NumPy arrays [B, ...]."""
  from mllm_jax.batch import Batch  # with jax: a second and 130 MB, which worker processes do without

  return Batch(**{field: np.stack(values) for field, values in zip(Row._fields, zip(*rows, strict=True), strict=True)})
