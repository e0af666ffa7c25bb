"""What every reader of weights raises, and how it words what it found in a file it does not trust."""

from mllm_jax.places import PlaceError

SHOWN = 80  # characters of a foreign text, and 8 numbers of a foreign list, that a message repeats
LFS = b"version https://git-lfs"


class WeightsError(PlaceError):
  """Weights that are missing, damaged or meant for another model; the message names the file and the remedy."""


def brief(value) -> str:
  """A foreign value for a message: short, whatever it is. Nested values are not walked, since a few bytes of a file can
  describe a structure that is gigabytes when written out.
  """
  if value is None or isinstance(value, bool | float):
    return repr(value)
  if isinstance(value, int):
    return str(value) if abs(value) < 2**64 else f"a number of {value.bit_length()} bits"
  if isinstance(value, str):
    return repr(value) if len(value) <= SHOWN else repr(value[:SHOWN]) + f"... of {len(value)} characters"
  if isinstance(value, tuple | list) and len(value) <= 8 and all(type(item) is int for item in value):
    return "(" + ", ".join(brief(item) for item in value) + ")"
  if isinstance(value, tuple | list):
    return f"a {type(value).__name__} of {len(value)}"
  return f"a {type(value).__name__}"


def shorten(text: str) -> str:
  """A foreign name for a message, as it is unless it is very long."""
  return text if len(text) <= 255 else text[:255] + f"... of {len(text)} characters"


def pointer_or(start: bytes, otherwise: str) -> str:
  """A remedy for a file that starts so: a Git LFS pointer stands where the weights have not been fetched."""
  if start.startswith(LFS):
    return "it is a Git LFS pointer: fetch the weights themselves with `git lfs pull` or `hf download`"
  return otherwise
