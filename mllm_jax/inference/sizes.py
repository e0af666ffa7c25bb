"""The shapes that an engine computes in: few, since each is compiled once, and little of them padding."""

from collections.abc import Iterator, Sequence

GROUPS = (1, 4, 16)  # how many prompts are read, or crops looked at, together
# Places that a prompt is read in, of which few of a long one may be padding, and places of the cache.
PROMPT_PLACES = (16, 32, 64, 128, 256, 384, *(2**i * half // 2 for i in range(9, 30) for half in (2, 3)))
FEW_PROMPT_PLACES = tuple(2**i * half // 2 for i in range(7, 30) for half in ((2, 3) if i > 8 else (2,)))
CACHE_PLACES = tuple(2**i for i in range(5, 31))


class Sizes:
  """`groups` of `shards` prompts or crops each, places of `prompts` and of the `cache`, and its `rows`, in ascending
  order. With a max_length, which nothing exceeds, they are fewer."""

  def __init__(self, rows: int, shards: int, max_length: int | None):
    self.groups, self.prompts, self.cache = GROUPS, PROMPT_PLACES, CACHE_PLACES
    self._shards = shards
    if max_length is not None:
      longest = bucket(max_length, CACHE_PLACES)
      self.cache = (longest // 2, longest)
      self.prompts = (*(size for size in FEW_PROMPT_PLACES if size < max_length), longest)
    # Rows that lie on several devices stay there.
    growing = (4**i for i in range(8 if max_length is None else 1) if 4**i < rows and shards == 1)
    self.rows = (*growing, rows)

  def of_cache(self, rows: int, places: int, now: tuple[int, int]) -> tuple[int, int]:
    """(rows, places) of a cache that holds so many, which is as large as `now` unless that is too little or twice as
    much as needed."""
    needed = bucket(rows, self.rows), bucket(places, self.cache)
    return tuple(need if need > got or 2 * need <= got else got for need, got in zip(needed, now))

  def grouped(self, items: Sequence) -> Iterator[tuple[Sequence, int]]:
    """(some of the items, rows to work on them in), of which at most a quarter or `shards` is padding."""
    while items:
      sizes = [size * self._shards for size in self.groups]
      size = next((size for size in reversed(sizes) if 4 * len(items) >= 3 * size), sizes[0])
      yield items[:size], size
      items = items[size:]


def bucket(count: int, sizes: Sequence[int]) -> int:
  """The first size that holds `count`."""
  return next(size for size in sizes if size >= count)
