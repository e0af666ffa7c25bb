"""Grouping: the released sampler, which makes steps of one modality, and the lengths that its micro-batches are padded
to."""

from collections.abc import Callable, Sequence

import numpy as np

BUCKETS = 8  # compiled lengths where the configuration names none
GRID = 32  # buckets are multiples of 1/32 of the longest row


def released_order(
  lengths: Sequence[int], batch_size: int, world_size: int, permute: Callable[[int], np.ndarray]
) -> np.ndarray:
  """The order of one epoch in LLaVA's `LengthGroupedSampler` with group_by_modality_length.

  Every full megabatch of batch_size * world_size samples is of one modality. Inside it the samples are dealt, longest
  first, to `world_size` chunks of about equal total length. What is left of both modalities comes last.

  Args:
    lengths: words of a sample with an image, minus the words of one without; not 0.
    batch_size: samples of one device's micro-batch.
    world_size: devices times micro-batches of a step.
    permute: a random permutation of n things; asked for the images, the texts and the megabatches, or once where all
      samples are of one modality.

  Returns:
    int64 [N].

  Raises:
    ValueError: a length of 0, whose modality is unknown.
  """
  lengths = np.asarray(lengths, np.int64)
  if not lengths.all():
    raise ValueError("a sample of length 0 belongs to no modality")
  megabatch = batch_size * world_size
  if (lengths > 0).all() or (lengths < 0).all():
    # As released: where all are texts the lengths stay negative, and the shortest come first.
    return np.concatenate(_megabatches(lengths, world_size, megabatch, permute))
  full, last = [], []
  for modality in (np.flatnonzero(lengths > 0), np.flatnonzero(lengths < 0)):
    batches = [modality[batch] for batch in _megabatches(np.abs(lengths[modality]), world_size, megabatch, permute)]
    full += batches[:-1]
    last.append(batches[-1])
  shuffled = [full[i] for i in permute(len(full))]
  return np.concatenate([*shuffled, np.sort(np.concatenate(last))])


def _megabatches(
  lengths: np.ndarray, world_size: int, megabatch: int, permute: Callable[[int], np.ndarray]
) -> list[np.ndarray]:
  """Megabatches of random samples, each made of chunks of about equal length."""
  order = np.asarray(permute(len(lengths)), np.int64)
  result = []
  for start in range(0, len(order), megabatch):
    batch = order[start : start + megabatch]
    longest_first = batch[np.argsort(-lengths[batch], kind="stable")]
    result.append(np.concatenate(_even_chunks(longest_first, lengths[longest_first].tolist(), world_size)))
  return result


def _even_chunks(indices: np.ndarray, lengths: list[int], chunks: int) -> list[np.ndarray]:
  """Deals indices to the chunk that is shortest so far, the first of several; a full chunk takes no more."""
  if len(indices) % chunks:
    return [indices[i::chunks] for i in range(chunks)]
  room = len(indices) // chunks
  places, totals = [[] for _ in range(chunks)], [0] * chunks
  for place, length in enumerate(lengths):
    shortest = totals.index(min(totals))
    places[shortest].append(place)
    totals[shortest] = totals[shortest] + length if len(places[shortest]) < room else float("inf")
  return [indices[chunk] for chunk in places]


def longest_first(order: np.ndarray, places: np.ndarray, batch_size: int) -> np.ndarray:
  """The samples of an epoch as steps [steps, batch_size], in each the longest first; -1 fills up the last step.

  A step's loss and gradient are sums, so how its samples are ordered changes nothing but how much padding its
  micro-batches need.
  """
  steps = -(-len(order) // batch_size)
  filled = np.concatenate([order, np.full(steps * batch_size - len(order), -1, np.int64)]).reshape(steps, batch_size)
  length = np.where(filled < 0, -1, places[filled])
  return np.take_along_axis(filled, np.argsort(-length, axis=1, kind="stable"), axis=1)


def choose_buckets(needed: np.ndarray, max_length: int, longest: int, count: int = BUCKETS) -> tuple[int, ...]:
  """At most `count` lengths, multiples of max_length / 32, that pad `needed` least; the last holds `longest`.

  needed: int [n], the lengths that micro-batches need, at most max_length each.
  """
  grid = -(-max_length * np.arange(1, GRID + 1) // GRID)
  grid = grid[: int(np.searchsorted(grid, longest)) + 1]
  cumulative = np.concatenate([[0], np.cumsum(np.bincount(np.searchsorted(grid, needed), minlength=len(grid)))])
  # best[e]: (padded places, buckets) of the micro-batches up to grid[e - 1] with the buckets allowed so far.
  best: list[tuple[float, tuple[int, ...]]] = [(0, ()), *[(float("inf"), ())] * len(grid)]
  for _ in range(count):
    extended = best[:1]
    for end in range(1, len(grid) + 1):
      length = int(grid[end - 1])
      extended.append(
        min(
          (best[start][0] + int(cumulative[end] - cumulative[start]) * length, (*best[start][1], length))
          for start in range(end)
        )
      )
    best = [min(pair) for pair in zip(best, extended)]
  return best[-1][1]
