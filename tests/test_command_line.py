"""What all command lines have in common."""

from pathlib import Path

import pytest

from mllm_jax.command_line import Parser, parse
from mllm_jax.config import ConfigError
from mllm_jax.places import with_home

HOME = str(Path.home())


@pytest.mark.parametrize(
  "given, meant",
  [
    ("--out=~/a b/ü", f"--out={HOME}/a b/ü"),
    ("--config.model.vision=~/clip", f"--config.model.vision={HOME}/clip"),
    ("--out=~", f"--out={HOME}"),
    ("--out=~tilde", "--out=~tilde"),
    ("--out=a~/b", "--out=a~/b"),
    ("~/a", "~/a"),  # the shell has seen to it
  ],
)
def test_a_tilde_behind_an_option_is_the_home_folder(given, meant):
  assert with_home(["x", given]) == ["x", meant]


def test_both_kinds_of_command_lines_know_it(monkeypatch):
  parser = Parser()
  parser.add_argument("--out")
  assert parser.parse_args(["--out=~/a"]).out == f"{HOME}/a"
  monkeypatch.setattr("sys.argv", ["command", "--out=~/b"])
  assert parser.parse_args().out == f"{HOME}/b"
  recipe = Path(__file__).parents[1] / "configs" / "llava15.py"
  config, workdir, _ = parse(["x", f"--config={recipe}", "--workdir=~/run", "--config.model.llm=~/llm"])
  assert workdir == Path(HOME, "run") and config.model.llm == f"{HOME}/llm"
  with pytest.raises(ConfigError, match="mount the bucket"):
    parse(["x", f"--config={recipe}", "--workdir=gs://bucket/run"])
