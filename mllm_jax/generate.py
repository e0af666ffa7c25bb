"""Ask a model about pictures: python -m mllm_jax.generate --model=DIR --image=FILE --prompt="..."

The answer, and nothing else, goes to standard output while it is made; notes and errors go to standard error. Exit
status: 0 after an answer, 2 for anything that the caller can put right, 130 when interrupted.

With --questions=FILE.jsonl, whole files are answered, in the field names of LLaVA's model_vqa_loader.

From Python the module itself is called: `mllm_jax.generate(model, processor, "What is this?", ["cat.jpg"])`, and
`mllm_jax.stream` gives the answer piece by piece.
"""

import argparse
import sys
import time
import types
from collections.abc import Iterator, Sequence

from mllm_jax import terminal
from mllm_jax.data.records import IMAGE_PLACEHOLDER, DataError, Turn
from mllm_jax.inference.settings import Sampling
from mllm_jax.terminal import note

# jax and the tokenizers are imported where they are used, so that a mistyped argument is answered at once.

EXAMPLES = """examples:
  python -m mllm_jax.generate --model=runs/digits --image=scene.png --prompt="How many digits are there?"
  python -m mllm_jax.generate --model=runs/sp --image=a.jpg --image=b.jpg --prompt="What differs between the two?"
  python -m mllm_jax.generate --model=runs/sp --image=a.jpg --prompt="Tell a story." --temperature=0.7 --top_p=0.9
  python -m mllm_jax.generate --model=runs/sp --questions=questions.jsonl --image_folder=images --out=answers.jsonl
"""


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
  """The command line, `sampling` made of three of its values. Exits with status 2 where one is out of range."""
  parser = terminal.parser("generate", "Ask a model about pictures.", EXAMPLES)
  parser.add_argument("--prompt", metavar="TEXT", help="the question; the pictures come before it")
  parser.add_argument("--num_beams", type=int, default=1, metavar="N", help="beams of a beam search (default: 1, none)")
  parser.add_argument(
    "--num_samples", type=int, default=1, metavar="N", help="answers, with seeds in a row (default: 1)"
  )
  parser.add_argument(
    "--stop",
    action="append",
    default=[],
    metavar="TEXT",
    help="the answer ends before this text; give it again for more",
  )
  parser.add_argument("--questions", metavar="FILE", help='JSON lines of {"question_id", "image", "text"} to answer')
  parser.add_argument("--image_folder", default="", metavar="DIR", help="where the questions' images are")
  parser.add_argument("--out", metavar="FILE", help="the answers as JSON lines; those already there are kept")
  parser.add_argument("--batch_size", type=int, default=8, metavar="N", help="questions at once (default: 8)")
  args = parser.parse_args(argv)
  if (args.prompt is None) == (args.questions is None):
    parser.error("give --prompt=TEXT for one question, or --questions=FILE --out=FILE for many")
  if args.prompt is not None and not args.prompt.replace(IMAGE_PLACEHOLDER, "").strip():
    parser.error("--prompt is empty; write a question")
  for name in ("num_beams", "num_samples", "batch_size"):
    if getattr(args, name) < 1:
      parser.error(f"--{name} is {getattr(args, name)}; it must be at least 1")
  if args.num_beams > 1 and (args.temperature != 0 or args.num_samples > 1):
    parser.error(f"--num_beams={args.num_beams} goes with --temperature=0 and --num_samples=1")
  if not all(args.stop):
    parser.error("--stop is empty; leave it out")
  if args.questions is not None and (args.out is None or args.images or args.num_samples > 1):
    parser.error("--questions needs --out=FILE, and goes without --image and --num_samples")
  terminal.check(parser, args)
  return args


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
  pictures = [terminal.load_picture(path) for path in args.images]
  question = Turn("human", with_placeholders(args.prompt, len(pictures)))

  from mllm_jax.build import load

  start = time.perf_counter()
  model, processor = load(args.model)
  note(f"{args.model}: read in {time.perf_counter() - start:.1f} s; the first token waits for compilation")
  settings = dict(
    max_new_tokens=args.max_new_tokens,
    temperature=args.temperature,
    top_p=args.top_p,
    top_k=args.top_k,
    seed=args.seed,
    num_beams=args.num_beams,
    stop=args.stop,
  )
  if args.num_samples > 1:
    print(
      "\n\n".join(generate(model, processor, [[question]], [pictures], num_samples=args.num_samples, **settings)[0])
    )
    return
  engine, requests = _prepared(model, processor, [[question]], [pictures], **settings)
  for event in engine.stream(requests[0]):
    print(event.text, end="", flush=True)
  print(flush=True)
  if event.answer.finish_reason == "length":
    note(f"the answer was cut off after --max_new_tokens={args.max_new_tokens}")


def answer_file(args: argparse.Namespace) -> None:
  """Answers the questions of a file, as far as --out does not hold their answers yet."""
  from mllm_jax.inference import questions

  asked = questions.read(args.questions, args.image_folder)
  with questions.AnswerFile(args.out, asked) as out:
    if out.count == len(asked):
      note(f"{args.out} holds all {len(asked)} answers")
      return

    from tqdm import tqdm

    from mllm_jax.build import load
    from mllm_jax.inference.engine import Engine

    model, processor = load(args.model)
    engine = Engine(model, processor, rows=max(args.batch_size, args.num_beams))
    settings = dict(
      max_new_tokens=args.max_new_tokens,
      sampling=args.sampling,
      seed=args.seed,
      stop=tuple(args.stop),
      beams=args.num_beams,
    )
    with tqdm(desc="questions", unit="question", total=len(asked), initial=out.count, dynamic_ncols=True) as bar:
      for question, text in questions.answers(engine, processor, asked[out.count :], settings):
        out.write(question, text, args.model)
        bar.update()


def _prepared(model, processor, conversations, images, **settings):
  """(an engine, a request for each conversation); the settings are those of `generate`, without its num_samples."""
  from mllm_jax.data.processor import as_picture, as_turns
  from mllm_jax.inference.engine import Engine
  from mllm_jax.inference.requests import Request

  images = [[] for _ in conversations] if images is None else images
  if len(images) != len(conversations):
    raise DataError(f"{len(conversations)} conversations and pictures for {len(images)}; give one list for each")
  sampling = Sampling(settings["temperature"], settings["top_p"], settings["top_k"])
  stop = (settings["stop"],) if isinstance(settings["stop"], str) else tuple(settings["stop"])
  requests = []
  for number, (conversation, paths) in enumerate(zip(conversations, images)):
    try:
      turns, pictures = as_turns(conversation, len(paths)), [as_picture(path) for path in paths]
      row = processor.with_room(len(pictures)).prompt(turns, pictures)
    except DataError as error:
      raise DataError(f"conversation {number}: {error}") from error
    fields = settings["max_new_tokens"], sampling, settings["seed"], stop, settings["num_beams"]
    requests.append(Request(row, *fields))
  rows = max(settings["num_beams"], min(ROWS, len(requests) * settings.get("num_samples", 1)))
  return Engine(model, processor, rows=rows, mesh=settings.get("mesh")), requests


ROWS = 8  # answered at once


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
  num_beams: int = 1,
  num_samples: int = 1,
  stop: str | Sequence[str] = (),
  mesh=None,
) -> str | list:
  """Answers from a model that `mllm_jax.load` gave. `inference.engine.Engine` is for those who ask again and again.

  Args:
    model, processor: as `mllm_jax.load` returns them.
    prompts: one question, or a list of conversations as `Processor.__call__` takes them.
    images: for one question its pictures (paths or PIL images); for a list, a list of pictures for each.
    max_new_tokens, temperature, top_p, top_k, seed: as on the command line; greedy by default.
    num_beams: of a beam search, with temperature 0; 1 is none.
    num_samples: answers to each prompt, with the seeds seed, seed + 1, ...
    stop: a text, or several, before which an answer ends.
    mesh: the mesh that the model lies on, where it lies on several devices.

  Returns the answer, or a list of them; with num_samples above 1 a list in place of each. Raises DataError for prompts
  and pictures that do not match or cannot be read, ValueError for a number out of its range.
  """
  import dataclasses

  if num_samples < 1:
    raise ValueError(f"num_samples is {num_samples}; it must be at least 1")
  single = isinstance(prompts, str)
  engine, requests = _prepared(
    model,
    processor,
    [prompts] if single else prompts,
    [images or []] if single else images,
    max_new_tokens=max_new_tokens,
    temperature=temperature,
    top_p=top_p,
    top_k=top_k,
    seed=seed,
    num_beams=num_beams,
    num_samples=num_samples,
    stop=stop,
    mesh=mesh,
  )
  again = [dataclasses.replace(each, seed=each.seed + number) for each in requests for number in range(num_samples)]
  texts = [answer.text.strip() for answer in engine.answer(again)]
  found = [texts[i : i + num_samples] for i in range(0, len(texts), num_samples)]
  found = [each[0] for each in found] if num_samples == 1 else found
  return found[0] if single else found


def stream(
  model,
  processor,
  prompt: str | Sequence,
  images: Sequence | None = None,
  *,
  max_new_tokens: int = 128,
  temperature: float = 0.0,
  top_p: float = 1.0,
  top_k: int = 0,
  seed: int = 0,
  stop: str | Sequence[str] = (),
  mesh=None,
) -> Iterator[str]:
  """The answer to one question, or conversation, in pieces of text as they are made. Arguments and errors as those of
  `generate`, raised at the call."""
  settings = dict(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
  engine, requests = _prepared(
    model, processor, [prompt], [images or []], **settings, num_beams=1, stop=stop, mesh=mesh
  )
  events = engine.stream(requests[0])
  return (event.text for event in events if event.text)


class _Callable(types.ModuleType):
  """This module, so that `mllm_jax.generate` is both the function and the command's home."""

  __call__ = staticmethod(generate)


sys.modules[__name__].__class__ = _Callable


def main(argv: Sequence[str] | None = None) -> int:
  args = arguments(argv)
  return terminal.run(lambda: answer(args) if args.questions is None else answer_file(args))


if __name__ == "__main__":
  sys.exit(main())
