"""Ask a model about pictures: python -m mllm_jax.generate --model=DIR --image=FILE --prompt="..."

The answer, and nothing else, goes to standard output while it is made; notes and errors go to standard error. Exit
status: 0 after an answer, 2 for anything that the caller can put right, 130 when interrupted.

From Python the module itself is called: `mllm_jax.generate(model, processor, "What is this?", ["cat.jpg"])`.
"""

import argparse
import os
import sys
import time
import types
from collections.abc import Sequence

from mllm_jax.command_line import Parser
from mllm_jax.config import ConfigError
from mllm_jax.data import images
from mllm_jax.data.records import IMAGE_PLACEHOLDER, DataError, Turn
from mllm_jax.inference.settings import Sampling
from mllm_jax.places import PlaceError

# jax and the tokenizers are imported where they are used, so that a mistyped argument is answered at once.

EXAMPLES = """examples:
  python -m mllm_jax.generate --model=runs/digits --image=scene.png --prompt="How many digits are there?"
  python -m mllm_jax.generate --model=runs/sp --image=a.jpg --image=b.jpg --prompt="What differs between the two?"
  python -m mllm_jax.generate --model=runs/sp --image=a.jpg --prompt="Tell a story." --temperature=0.7 --top_p=0.9
"""


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
  """The command line, `sampling` made of three of its values. Exits with status 2 where one is out of range."""
  parser = Parser(
    prog="python -m mllm_jax.generate",
    description="Ask a model about pictures.",
    epilog=EXAMPLES,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument(
    "--model",
    "--workdir",
    required=True,
    metavar="DIR",
    help="a training run's folder, a model made by mllm_jax.convert, or a checkpoint that it can import",
  )
  parser.add_argument(
    "--image",
    action="append",
    default=[],
    metavar="FILE",
    dest="images",
    help="a picture; give it again for each further one; without any, only the text is asked",
  )
  parser.add_argument("--prompt", required=True, metavar="TEXT", help="the question; the pictures come before it")
  parser.add_argument(
    "--temperature",
    type=float,
    default=0.0,
    metavar="T",
    help="0 always takes the likeliest token, higher is more varied (default: 0)",
  )
  parser.add_argument(
    "--top_p",
    type=float,
    default=1.0,
    metavar="P",
    help="draw from the likeliest tokens that together have this probability (default: 1, from all)",
  )
  parser.add_argument(
    "--top_k",
    type=int,
    default=0,
    metavar="K",
    help="draw from this many of the likeliest tokens (default: 0, from all)",
  )
  parser.add_argument(
    "--max_new_tokens", type=int, default=128, metavar="N", help="longest answer in tokens (default: 128)"
  )
  parser.add_argument("--seed", type=int, default=0, metavar="N", help="another seed draws another answer (default: 0)")
  args = parser.parse_args(argv)
  if not args.prompt.replace(IMAGE_PLACEHOLDER, "").strip():
    parser.error("--prompt is empty; write a question")
  if args.max_new_tokens < 1:
    parser.error(f"--max_new_tokens is {args.max_new_tokens}; it must be at least 1")
  if not 0 <= args.seed < 2**32:
    parser.error(f"--seed is {args.seed}; it must lie between 0 and 2**32 - 1")
  if "://" not in args.model and not os.path.isdir(args.model):
    parser.error(f"--model {args.model}: no such folder; name a training run's --workdir, or a model's folder")
  try:
    args.sampling = Sampling(args.temperature, args.top_p, args.top_k)
  except ValueError as error:
    parser.error(f"--{error}")
  return args


def load_picture(path: str):
  """An RGB picture. Raises DataError, in the words of the command line."""
  if not os.path.isfile(path):
    raise DataError(f"--image {path}: no such file")
  try:
    return images.load(path)
  except DataError as error:
    raise DataError(f"--image {path}: cannot be read as a picture; save it again as PNG or JPEG") from error


def with_placeholders(prompt: str, count: int) -> str:
  """The prompt with a placeholder for each of its pictures, in front unless it holds them already.

  Raises:
    DataError: it holds some, but not one for each picture.
  """
  written = prompt.count(IMAGE_PLACEHOLDER)
  if written not in (0, count):
    raise DataError(
      f"--prompt says {IMAGE_PLACEHOLDER} {written} times, and --image names {count}; give one for each picture"
    )
  return prompt if written else f"{IMAGE_PLACEHOLDER}\n" * count + prompt


def answer(args: argparse.Namespace) -> None:
  """Prints the answer as it is made. What the caller can put right is a DataError, ConfigError or WeightsError."""
  pictures = [load_picture(path) for path in args.images]
  question = Turn("human", with_placeholders(args.prompt, len(pictures)))

  from mllm_jax.build import load
  from mllm_jax.data.processor import collate
  from mllm_jax.inference.engine import Engine
  from mllm_jax.inference.text import Detokenizer

  start = time.perf_counter()
  model, processor = load(args.model)
  processor = processor.with_room(len(pictures))
  batch = collate([processor.prompt([question], pictures)])
  note(f"{args.model}: read in {time.perf_counter() - start:.1f} s; the first token waits for compilation")
  engine = Engine(model, processor.end_id)
  text = Detokenizer(processor.tokenizer.decode)
  count = 0
  for count, token in enumerate(engine.stream(batch, args.max_new_tokens, args.sampling, args.seed), start=1):
    print(text.push(token), end="", flush=True)
  print(text.finish(), flush=True)
  if count == args.max_new_tokens:
    note(f"the answer was cut off after --max_new_tokens={count}")


def generate(
  model,
  processor,
  prompts: str | Sequence,
  images: Sequence | None = None,
  *,
  max_new_tokens: int = 128,
  temperature: float = 0.0,
  top_p: float = 1.0,
  top_k: int = 0,
  seed: int = 0,
  mesh=None,
) -> str | list[str]:
  """Answers from a model that `mllm_jax.load` gave.

  Args:
    model, processor: as `mllm_jax.load` returns them.
    prompts: one question, or a list of conversations as `Processor.__call__` takes them.
    images: for one question its pictures (paths or PIL images); for a list, a list of pictures for each.
    max_new_tokens, temperature, top_p, top_k, seed: as on the command line; greedy by default.
    mesh: the mesh that the model lies on, where it lies on several devices.

  Returns the answer, or a list of them. Raises DataError for prompts and pictures that do not match or cannot be read,
  ValueError for a number out of its range.
  """
  from mllm_jax.inference.engine import Engine
  from mllm_jax.inference.text import Detokenizer

  single = isinstance(prompts, str)
  batch = processor([prompts], [images or []]) if single else processor(prompts, images)
  engine = Engine(model, processor.end_id, mesh=mesh)
  answers = engine.generate(batch, max_new_tokens, Sampling(temperature, top_p, top_k), seed)
  texts = []
  for ids in answers:
    text = Detokenizer(processor.tokenizer.decode)
    texts.append(("".join(map(text.push, ids)) + text.finish()).strip())
  return texts[0] if single else texts


class _Callable(types.ModuleType):
  """This module, so that `mllm_jax.generate` is both the function and the command's home."""

  __call__ = staticmethod(generate)


sys.modules[__name__].__class__ = _Callable


def note(message: str) -> None:
  print(message, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
  args = arguments(argv)
  try:
    answer(args)
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
  except KeyboardInterrupt:
    note("\ninterrupted")
    return 130
  return 0


if __name__ == "__main__":
  sys.exit(main())
