"""Command lines: the trainer's recipe with its overrides, and what is wrong with one in plain words."""

import argparse
import dataclasses
import re
import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from mllm_jax import config as config_lib
from mllm_jax.config import Config, ConfigError, check_types
from mllm_jax.places import with_home


class Parser(argparse.ArgumentParser):
  """Says what is wrong in one line; --help has the rest."""

  def parse_known_args(self, args=None, namespace=None):
    return super().parse_known_args(with_home(sys.argv[1:] if args is None else args), namespace)

  def error(self, message: str):
    self.exit(2, f"error: {message} (see --help)\n")


def plain_error(argv: list[str], error: Exception) -> str:
  """What went wrong on the command line, without the traceback that config_flags puts into its messages."""
  text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
  if "Traceback" in text:
    text = text.strip().splitlines()[-1].partition(": ")[2]
  found = re.search(r"Field (?P<field>\w+) not found on dataclass <class '[\w.]*?(?P<of>\w+)'>", text)
  found = found or re.search(r"Attribute <class '[\w.]*?(?P<of>\w+)'>\.(?P<field>\w+) does not exist", text)
  if found:
    field, known = found["field"], ", ".join(each.name for each in dataclasses.fields(getattr(config_lib, found["of"])))
    options = [argument for argument in argv if re.match(rf"--config[.\w]*\.{field}\b", argument)]
    return f"{options[0] if options else field}: there is no field {field!r}; {found['of']} has {known}"
  return text


def parse(argv: list[str]) -> tuple[Config, Path, str]:
  """The configuration, the workdir, and the recipe's file. Raises ConfigError where the command line is wrong."""
  argv = with_home(argv)
  values = flags.FlagValues()  # not the global ones, so that a process can parse more than one command line
  config = config_flags.DEFINE_config_file("config", flag_values=values, lock_config=True, sys_argv=argv)
  workdir = flags.DEFINE_string("workdir", None, "", flag_values=values)
  try:
    rest = values(argv)
  except (flags.Error, KeyError, TypeError, ValueError, AttributeError, ImportError, OSError) as error:
    # With overrides behind it, a recipe that is not there is missed on their account only.
    files = [argument.removeprefix("--config=") for argument in argv if argument.startswith("--config=")]
    if files and not Path(files[0].partition(":")[0]).is_file():
      raise ConfigError(f"--config={files[0]}: no such file; the recipes are in configs/") from error
    raise ConfigError(plain_error(argv, error)) from error
  if len(rest) > 1:
    raise ConfigError(
      f"{rest[1]!r} is no option; options are written --config=FILE, --workdir=DIR, --config.FIELD=VALUE"
    )
  if config.value is None:
    raise ConfigError("which recipe? for instance --config=configs/sp_cropping.py:demo (--help tells more)")
  file = config_flags.get_config_filename(values["config"]).partition(":")[0]
  if not isinstance(config.value, Config):
    if not Path(file).is_file():
      raise ConfigError(f"--config={file}: no such file; the recipes are in configs/")
    raise ConfigError(f"{file}: get_config must return a mllm_jax.config.Config")
  check_types(config.value)
  if "://" in (workdir.value or ""):
    raise ConfigError(
      f"--workdir={workdir.value}: checkpoints go to a local folder; name one, or mount the bucket there"
    )
  return config.value, Path(workdir.value or f"runs/{config.value.name}"), file


def help_text(purpose: str) -> str:
  """The purpose, the options, and every field that can be overridden with its default."""

  def fields(config, prefix):
    for field in dataclasses.fields(config):
      value = getattr(config, field.name)
      if dataclasses.is_dataclass(value):
        yield from fields(value, f"{prefix}.{field.name}")
      else:
        yield f"  --{prefix}.{field.name}={value!r}"

  options = (
    "  --config=FILE[:demo]  the recipe: a file of configs/, with :demo behind it for the small one\n"
    "  --workdir=DIR         folder for checkpoints, logs and the report (default: runs/NAME)"
  )
  return f"{purpose}\noptions:\n{options}\n\nfields and their defaults:\n" + "\n".join(fields(Config(), "config"))
