"""Google Cloud for the tests of launch/, as the programs in fakes/ see it."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
FAKES = Path(__file__).parent / "fakes"
WHERE = ["--name=sp", "--zone=us-west4-a"]
MACHINES = [*WHERE, "--topology=v5e-16"]
CODE = ["--repo=https://example.org/mllm_jax.git", "--ref=v1", "--bucket=mine"]
# What a shell would take apart if it were quoted badly anywhere between here and the trainer.
TRAINING = ["--config=configs/sp_cropping.py", "--workdir=runs/sp", "--config.name=a \"b\" '$HOME' *"]


class Cloud:
  """Google Cloud as the fakes see it: a folder with what happens next and what has been called."""

  def __init__(self, folder: Path):
    self.folder = folder
    self.environment = {
      "FAKE": str(folder),
      "REPOSITORY": str(ROOT),
      "PATH": f"{FAKES}:/usr/bin:/bin",
      "HOME": str(folder),
      "USER": "someone",
    }

  def put(self, name: str, *lines: str) -> None:
    (self.folder / name).write_text("".join(line + "\n" for line in lines))

  def run(self, *command, stdin: str = "", cwd: Path = ROOT, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
      [str(word) for word in command],
      env=self.environment | environment,
      cwd=cwd,
      input=stdin,
      capture_output=True,
      text=True,
      timeout=60,
    )

  def tpu(self, *arguments: str, status: int = 0, stdin: str = "") -> str:
    """Everything that tpu.sh says; fails where it ends with another status."""
    done = self.run(LAUNCH / "tpu.sh", *arguments, stdin=stdin)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr

  def resume(self, status: int = 0) -> str:
    return self.tpu("resume", *MACHINES, "--spot", *CODE, "--", *TRAINING, status=status)

  @property
  def calls(self) -> list[str]:
    path = self.folder / "calls"
    return path.read_text().splitlines() if path.exists() else []

  def count(self, beginning: str) -> int:
    return sum(call.startswith(beginning) for call in self.calls)

  @property
  def trained(self) -> list[list[str]]:
    """Of each start of the trainer LIBTPU_INIT_ARGS and its arguments."""
    path = self.folder / "trained"
    return [line.split("\0")[:-1] for line in path.read_text().splitlines()] if path.exists() else []
