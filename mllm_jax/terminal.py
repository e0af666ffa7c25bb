"""What the commands that ask a model share: options, pictures, and how a problem is told."""

import argparse
import os
import sys
from collections.abc import Callable

from mllm_jax.command_line import Parser
from mllm_jax.config import ConfigError
from mllm_jax.data import images
from mllm_jax.data.records import DataError
from mllm_jax.inference.settings import Sampling
from mllm_jax.places import PlaceError


def parser(name: str, description: str, epilog: str | None = None) -> Parser:
  """A parser of the command `name` with --model and the options of sampling; `check` looks at their values."""
  made = Parser(
    prog=f"python -m mllm_jax.{name}",
    description=description,
    epilog=epilog,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  made.add_argument(
    "--model",
    "--workdir",
    required=True,
    metavar="DIR",
    help="a training run's folder, a model made by mllm_jax.convert, or a checkpoint that it can import",
  )
  made.add_argument(
    "--image",
    action="append",
    default=[],
    metavar="FILE",
    dest="images",
    help="a picture; give it again for each further one; without any, only the text is asked",
  )
  made.add_argument(
    "--temperature",
    type=float,
    default=0.0,
    metavar="T",
    help="0 always takes the likeliest token, higher is more varied (default: 0)",
  )
  made.add_argument(
    "--top_p",
    type=float,
    default=1.0,
    metavar="P",
    help="draw from the likeliest tokens that together have this probability (default: 1, from all)",
  )
  made.add_argument(
    "--top_k",
    type=int,
    default=0,
    metavar="K",
    help="draw from this many of the likeliest tokens (default: 0, from all)",
  )
  made.add_argument(
    "--max_new_tokens", type=int, default=128, metavar="N", help="longest answer in tokens (default: 128)"
  )
  made.add_argument("--seed", type=int, default=0, metavar="N", help="another seed draws another answer (default: 0)")
  return made


def check(made: Parser, args: argparse.Namespace) -> None:
  """Exits with status 2 where an option of `parser` is out of range; puts three of them together as `args.sampling`."""
  if args.max_new_tokens < 1:
    made.error(f"--max_new_tokens is {args.max_new_tokens}; it must be at least 1")
  if not 0 <= args.seed < 2**32:
    made.error(f"--seed is {args.seed}; it must lie between 0 and 2**32 - 1")
  if "://" not in args.model and not os.path.isdir(args.model):
    made.error(f"--model {args.model}: no such folder; name a training run's --workdir, or a model's folder")
  try:
    args.sampling = Sampling(args.temperature, args.top_p, args.top_k)
  except ValueError as error:
    made.error(f"--{error}")


def load_picture(path: str, named: str = "--image "):
  """An RGB picture. Raises DataError that begins with how the caller `named` it."""
  if not os.path.isfile(path):
    raise DataError(f"{named}{path}: no such file")
  try:
    return images.load(path)
  except DataError as error:
    why = f" ({error.__cause__})" if isinstance(error.__cause__, DataError) else ""
    raise DataError(f"{named}{path}: cannot be read as a picture{why}; save it again as PNG or JPEG") from error


def note(message: str) -> None:
  print(message, file=sys.stderr, flush=True)


def run(work: Callable[[], None], *, left: str = "") -> int:
  """The exit status of a command: 0, 2 after something that the caller can put right, 130 when interrupted.

  left: what is there after an interruption or a full disk, for commands that write files; said behind either.
  """
  try:
    work()
  except (DataError, ConfigError, PlaceError) as error:
    note(f"error: {error}")
    return 2
  except RuntimeError as error:
    from mllm_jax.training.checkpoint import CheckpointError  # imports jax and orbax, which are there by now

    if not isinstance(error, CheckpointError):
      raise
    note(f"error: {error}")
    return 2
  except BrokenPipeError:  # whoever read the answer has seen enough; closing the stream would complain once more
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  except OSError as error:
    if not left:
      raise
    where = f"{error.filename}: " if error.filename else ""
    note(f"error: {where}{error.strerror or error}; {left}")
    return 2
  except KeyboardInterrupt:
    note("\ninterrupted" + (f"; {left}" if left else ""))
    return 130
  return 0
