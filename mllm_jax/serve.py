"""Serve a model: python -m mllm_jax.serve --model=DIR, then open http://127.0.0.1:8000 or point an OpenAI client there.

Requests are answered together while they run. SIGTERM and Ctrl-C end the server after what it is answering, within
--grace seconds; a second one at once. Exit status: 0 when told to end, 1 when the engine broke, 2 for anything that the
caller can put right.
"""

import argparse
import os
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from mllm_jax import terminal
from mllm_jax.command_line import Parser
from mllm_jax.config import ConfigError
from mllm_jax.places import base_name
from mllm_jax.server.fetch import origin
from mllm_jax.server.limits import Limits
from mllm_jax.terminal import note

KEY = "MLLM_JAX_API_KEY"
EXAMPLES = """examples:
  python -m mllm_jax.serve --model=runs/sp
  python -m mllm_jax.serve --model=runs/uhd_v2 --host=0.0.0.0 --api_key=SECRET --rows=16
  python -m mllm_jax.serve --model=runs/sp --allow_url=upload.wikimedia.org --allow_files=data/coco
"""


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
  """The command line, `origins` and `folders` made of what it allows. Exits with status 2 where a value is wrong."""
  parser = Parser(
    prog="python -m mllm_jax.serve",
    description="Serve a model: OpenAI's chat API at /v1, and a page to ask at.",
    epilog=EXAMPLES,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  add, default = parser.add_argument, Limits(rows=8, max_length=0)
  add("--model", required=True, metavar="DIR", help="as mllm_jax.generate takes it; its last part is the served name")
  add("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 for all (default: 127.0.0.1)")
  add("--port", type=int, default=8000, help="0 takes any free one (default: 8000)")
  add("--rows", type=int, default=8, metavar="N", help="requests answered at once (default: 8)")
  add("--max_length", type=int, metavar="N", help="tokens of a prompt and its answer (default: the model's)")
  add("--max_tokens", type=int, default=default.max_tokens, metavar="N", help="tokens of an answer (default: 1024)")
  add("--max_queue", type=int, default=default.max_queue, metavar="N", help="requests that may wait (default: 64)")
  add("--max_body", type=int, default=default.max_body, metavar="BYTES", help="of a request (default: 32 MiB)")
  add("--max_pixels", type=int, default=default.max_pixels, metavar="N", help="of a request's pictures (default: 32e6)")
  add("--timeout", type=float, default=default.timeout, metavar="S", help="seconds for a request (default: 600)")
  add("--grace", type=float, default=30.0, metavar="S", help="seconds for running answers at the end (default: 30)")
  add("--allow_url", action="append", default=[], metavar="HOST", help="fetch pictures from https://HOST; repeatable")
  add("--allow_files", action="append", default=[], metavar="DIR", help="read file:// pictures below; repeatable")
  add("--api_key", default=os.environ.get(KEY, ""), metavar="KEY", help=f"that clients must show (default: ${KEY})")
  args = parser.parse_args(argv)
  for name in ("rows", "max_tokens", "max_body", "max_pixels", "timeout"):
    if not getattr(args, name) > 0:
      parser.error(f"--{name} is {getattr(args, name)}; it must be above 0")
  for name in ("max_queue", "grace", "port"):
    if not getattr(args, name) >= 0:
      parser.error(f"--{name} is {getattr(args, name)}; it must not be below 0")
  if args.port > 65535:  # getaddrinfo would take another one
    parser.error(f"--port is {args.port}; it must be at most 65535")
  if args.max_length is not None and args.max_length < 2:
    parser.error(f"--max_length is {args.max_length}; it must hold a prompt and an answer")
  if "://" not in args.model and not os.path.isdir(args.model):
    parser.error(f"--model {args.model}: no such folder; name a training run's --workdir, or a model's folder")
  for folder in args.allow_files:
    if not os.path.isdir(folder):
      parser.error(f"--allow_files {folder}: no such folder")
  args.folders = tuple(Path(os.path.realpath(folder)) for folder in args.allow_files)
  try:
    args.origins = tuple(origin(host) for host in args.allow_url)
  except ValueError as error:
    parser.error(f"--allow_url: {error}")
  return args


def listener(host: str, port: int) -> socket.socket:
  """A socket bound to an address, before anything slow is done. Raises ConfigError where that cannot be had."""
  try:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    # asyncio sends tokens without delay only where the protocol is given; otherwise each waits for up to 40 ms.
    bound = socket.socket(family, kind, protocol)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind(address)
  except (OSError, OverflowError) as error:
    raise ConfigError(
      f"--host={host} --port={port}: {getattr(error, 'strerror', None) or error}; try another --port"
    ) from error
  return bound


def serve(args: argparse.Namespace) -> None:
  """Loads the model and serves it until told to end.

  Raises DataError or ConfigError for what the caller can put right, and SystemExit (1) where the engine broke.
  """
  bound = listener(args.host, args.port)

  from mllm_jax.build import load
  from mllm_jax.inference.engine import Engine
  from mllm_jax.server.front import Front
  from mllm_jax.server.lifetime import run
  from mllm_jax.server.pictures import Source

  start = time.perf_counter()
  model, processor = load(args.model)
  note(f"{args.model}: read in {time.perf_counter() - start:.1f} s")
  try:
    engine = Engine(model, processor, rows=args.rows, max_length=args.max_length or processor.max_length)
  except ValueError as error:
    raise ConfigError(str(error)) from error
  limits = Limits(
    engine.rows, engine.max_length, args.max_queue, args.max_tokens, args.max_body, args.max_pixels, args.timeout
  )
  source = Source(args.max_body, args.origins, args.folders)
  name = base_name(os.path.realpath(args.model) if "://" not in args.model else args.model)
  front = Front(engine, processor, name, limits, source, args.api_key)
  print(f"{address(bound)} serves {name}: {limits.rows} rows of {limits.max_length} tokens; warming up", flush=True)
  run(front, bound, args.grace)
  if front.worker.failed:
    sys.exit(1)
  if front.worker.is_alive():  # a compilation cannot be interrupted, and Python would wait for it
    os._exit(0)


def address(bound: socket.socket) -> str:
  """The URL of a bound socket."""
  host, port = bound.getsockname()[:2]
  return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def main(argv: Sequence[str] | None = None) -> int:
  args = arguments(argv)
  return terminal.run(lambda: serve(args))


if __name__ == "__main__":
  sys.exit(main())
