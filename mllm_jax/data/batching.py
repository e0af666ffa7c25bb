"""The ways of making batches, and what of their settings goes together."""

from mllm_jax.config import ConfigError, DataConfig

BATCHINGS = ("fixed", "group", "pack")


def packed_length(data: DataConfig) -> int:
  """Places of a packed row."""
  return data.row_length or 2 * data.max_length


def check_batching(data: DataConfig, where: str = "data") -> None:
  """Raises ConfigError where the fields of batching do not go together."""
  if data.batching not in BATCHINGS:
    raise ConfigError(f"{where}.batching={data.batching!r} is unknown; known: {', '.join(BATCHINGS)}")
  if data.buckets and data.batching != "group":
    raise ConfigError(f"{where}.buckets={data.buckets} are for batching=group, and batching is {data.batching!r}")
  growing = all(isinstance(b, int) and b > a for a, b in zip((0, *data.buckets), data.buckets))
  if data.buckets and (not growing or data.buckets[-1] != data.max_length):
    raise ConfigError(
      f"{where}.buckets={data.buckets} must be numbers that grow, and the last one max_length={data.max_length}"
    )
  if data.row_length and (data.batching != "pack" or data.row_length < data.max_length):
    raise ConfigError(
      f"{where}.row_length={data.row_length} is for batching=pack, with max_length={data.max_length} or more; "
      "0 takes twice max_length"
    )
