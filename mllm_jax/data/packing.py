"""Packing: which samples share a row, so that next to no place is padding.

Rows are filled out of a window over the shuffled samples. The sample that has waited longest opens a row; more that
have waited long follow while there is ample room; then the one or two samples of the window that fit the rest best
close it. The window is refilled after each row, so that there is a choice up to the end of an epoch.
"""

import collections

import numpy as np

WINDOW = 4096  # samples to choose from
# Room that the longest waiting must leave, in mean lengths: less leaves no choice of two samples that close a row.
AMPLE = 1.7


def pack(
  places: np.ndarray, crops: np.ndarray, order: np.ndarray, row_length: int, row_crops: int, window: int = WINDOW
) -> list[tuple[int, ...]]:
  """Rows of samples, each sample of `order` in one; a row takes at most row_length places and row_crops crops.

  places, crops: int [N], what each sample takes. order: int [n], samples as they come in.

  Raises:
    ValueError: a sample that fits no row.
  """
  places, crops = np.asarray(places, np.int64), np.asarray(crops, np.int64)
  too_big = order[(places[order] > row_length) | (crops[order] > row_crops)]
  if len(too_big):
    i = int(too_big[0])
    raise ValueError(
      f"sample {i} takes {places[i]} places and {crops[i]} crops; a row has {row_length} and {row_crops}"
    )
  waiting = _Window(places, crops, row_length)
  coming = iter(order.tolist())
  rows = []
  while True:
    for sample in coming:
      waiting.add(sample)
      if len(waiting) == window:
        break
    if not len(waiting):
      return rows
    rows.append(_fill(waiting, row_length, row_crops))


def _fill(waiting: "_Window", room: int, crops: int) -> tuple[int, ...]:
  """Takes one row's samples out of the window."""
  row = []

  def take(sample: int) -> None:
    nonlocal room, crops
    row.append(sample)
    room -= int(waiting.places[sample])
    crops -= int(waiting.crops[sample])

  while len(waiting):
    oldest, left = waiting.oldest(), AMPLE * waiting.mean_length
    if not row or (room - waiting.places[oldest] >= left and waiting.crops[oldest] <= crops):
      take(waiting.pop(int(waiting.places[oldest]), int(waiting.crops[oldest])))
      continue
    closing = waiting.best_fit(room, crops)
    if not closing:
      break
    for kind in closing:
      take(waiting.pop(*kind))
  return tuple(row)


class _Window:
  """The samples at hand, the longest waiting first, and how many there are of each kind (places, crops)."""

  def __init__(self, places: np.ndarray, crops: np.ndarray, row_length: int):
    self.places, self.crops = places, crops
    self._row_length = row_length
    self._shortest = int(places.min(initial=row_length))
    self._total, self._size = 0, 0
    self._queue: collections.deque[int] = collections.deque()
    self._gone: set[int] = set()
    self._of_kind: dict[tuple[int, int], collections.deque[int]] = collections.defaultdict(collections.deque)
    self._there: dict[int, np.ndarray] = {}  # {crops: bool [row_length + 1], whether there is one of each length}

  def __len__(self) -> int:
    return self._size

  @property
  def mean_length(self) -> float:
    return self._total / self._size

  def add(self, sample: int) -> None:
    places, crops = int(self.places[sample]), int(self.crops[sample])
    if crops not in self._there:
      self._there[crops] = np.zeros(self._row_length + 1, bool)
    self._there[crops][places] = True
    self._of_kind[places, crops].append(sample)
    self._queue.append(sample)
    self._total += places
    self._size += 1

  def oldest(self) -> int:
    while self._queue[0] in self._gone:
      self._gone.remove(self._queue.popleft())
    return self._queue[0]

  def pop(self, places: int, crops: int) -> int:
    """Takes out the longest waiting sample of a kind."""
    alike = self._of_kind[places, crops]
    sample = alike.popleft()
    self._there[crops][places] = bool(alike)
    self._gone.add(sample)
    self._total -= places
    self._size -= 1
    return sample

  def best_fit(self, room: int, crops: int) -> list[tuple[int, int]]:
    """The kinds of the one or two samples that fill `room` best; of equally good choices the first."""
    if room < self._shortest:
      return []
    lengths = {
      c: found for c in sorted(self._there) if c <= crops and len(found := np.flatnonzero(self._there[c][: room + 1]))
    }
    best, kinds = 0, []
    for c, found in lengths.items():
      if found[-1] > best:
        best, kinds = int(found[-1]), [(int(found[-1]), c)]
    for first, firsts in lengths.items():
      for second, seconds in lengths.items():
        if second < first or first + second > crops:
          continue
        short = firsts[: np.searchsorted(firsts, room - seconds[0], side="right")]  # the others have no partner
        if not len(short):
          continue
        partners = seconds[np.searchsorted(seconds, room - short, side="right") - 1]
        sums = short + partners
        if first == second:
          halves = np.flatnonzero(partners == short)
          sums[[i for i in halves.tolist() if len(self._of_kind[int(short[i]), first]) < 2]] = 0
        i = int(sums.argmax())
        if sums[i] > best:
          best, kinds = int(sums[i]), [(int(short[i]), first), (int(partners[i]), second)]
    return kinds
