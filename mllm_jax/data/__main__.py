"""python -m mllm_jax.data COMMAND [options]; without a command it lists them.

Exit status: 0 done, 1 the data has problems, 2 something to put right in the command.
"""

import argparse
import importlib
import pkgutil
import sys

from mllm_jax.config import ConfigError
from mllm_jax.data.records import DataError
from mllm_jax.places import PlaceError, with_home

COMMANDS = "mllm_jax.data_commands"


def commands() -> dict[str, str]:
  """{name: what it does} of every command."""
  package = importlib.import_module(COMMANDS)
  found = {
    each.name: importlib.import_module(f"{COMMANDS}.{each.name}") for each in pkgutil.iter_modules(package.__path__)
  }
  return {name: module.PURPOSE for name, module in found.items() if hasattr(module, "PURPOSE")}


def main(argv: list[str]) -> int:
  if not argv or argv[0] not in (known := commands()):
    lines = [f"  {name:10s} {purpose}" for name, purpose in commands().items()]
    print("usage: python -m mllm_jax.data COMMAND [--help]\n\ncommands:\n" + "\n".join(lines))
    return 0 if not argv or argv[0] in ("-h", "--help") else 2
  module, argv = importlib.import_module(f"{COMMANDS}.{argv[0]}"), with_home(argv)
  parser = argparse.ArgumentParser(
    prog=f"python -m mllm_jax.data {argv[0]}", description=known[argv[0]], allow_abbrev=False
  )
  module.add_arguments(parser)
  # The recipe's own fields are as on the trainer's command line, and argparse does not know them.
  arguments = parser.parse_args([argument for argument in argv[1:] if not argument.startswith("--config.")])
  arguments.overrides = [argument for argument in argv[1:] if argument.startswith("--config.")]
  try:
    return module.run(arguments)
  except (ConfigError, DataError, PlaceError) as error:
    print(f"error: {error}", file=sys.stderr, flush=True)
  except OSError as error:
    if not error.filename:
      raise
    print(f"error: {error.filename}: {error.strerror}", file=sys.stderr, flush=True)
  except KeyboardInterrupt:
    print("\ninterrupted; the same command starts again, or goes on", file=sys.stderr, flush=True)
    return 130
  return 2


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
