"""The rooms of the package: who may import whom, and what the models can do without."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "mllm_jax"
# A room may import from those on its own line's right and from nothing else of the package.
ALLOWED = {
  "config": set(),
  "places": set(),
  "batch": set(),
  "chips": set(),
  "parameters": {"config"},
  "sharding": {"batch", "config"},
  "models": {"batch", "config", "sharding"},
  "data": {"batch", "config", "places"},
  "weights": {"config", "data", "models", "parameters", "places"},
  "flops": {"batch", "config", "models"},
  "compilation": {
    "batch",
    "build",
    "chips",
    "config",
    "data",
    "flops",
    "models",
    "parameters",
    "preflight",
    "processors",
    "sharding",
    "training",
  },
  "compile": {"command_line", "compilation", "config", "preflight", "run_control", "weights"},
  "training": {"batch", "chips", "config", "data", "distributed", "models", "parameters", "run_control", "sharding"},
  "inference": {"batch", "config", "data", "models", "parameters", "sharding"},
  "page": set(),
  "continuation": {"config", "sharding", "training"},
  "run_control": {"config", "data", "places", "training"},
  "distributed": {"config", "run_control"},
  "stage_loop": {
    "config",
    "continuation",
    "data",
    "distributed",
    "run_control",
    "sharding",
    "training",
    "weights",
  },
  "stage_data": {"config", "data", "run_control", "sharding"},
  "train_vdim": {
    "build",
    "config",
    "continuation",
    "data",
    "distributed",
    "flops",
    "parameters",
    "preflight",
    "run_control",
    "sharding",
    "stage_loop",
    "training",
    "weights",
  },
  "report": {"config", "data", "inference", "page"},
  "data_commands": {
    "batch",
    "build",
    "command_line",
    "config",
    "data",
    "demo",
    "page",
    "preflight",
    "processors",
    "weights",
  },
  "demo": {"batch", "config", "data", "models", "parameters", "sharding", "weights"},
  "recipes": {"config"},
  "suites": set(),
  "ablation": {"command_line", "config", "page", "suites"},
  "ablate": {"ablation", "command_line", "config", "run_control", "suites"},
  "preflight": {"config", "data", "places", "weights"},
  "command_line": {"config", "places"},
  "probes": {
    "build",
    "config",
    "data",
    "demo",
    "models",
    "parameters",
    "run_control",
    "sharding",
    "visualization",
    "weights",
  },
  "probe": {
    "build",
    "command_line",
    "config",
    "data",
    "places",
    "probes",
    "recipes",
    "terminal",
    "training",
    "weights",
  },
  "processors": {"config", "data", "models"},
  "build": {"config", "data", "models", "parameters", "places", "processors", "sharding", "training", "weights"},
  "inspection": {"batch", "build", "config", "models", "parameters", "places", "weights"},
  "bench": {
    "batch",
    "build",
    "chips",
    "config",
    "data",
    "demo",
    "flops",
    "inference",
    "models",
    "parameters",
    "recipes",
    "sharding",
    "training",
    "weights",
  },
  "convert": {"build", "command_line", "config", "data", "inspection", "places", "training", "weights"},
  "benchmarks": {"config", "data", "inference", "page"},
  "evaluate": {
    "benchmarks",
    "build",
    "command_line",
    "config",
    "data",
    "distributed",
    "inference",
    "sharding",
    "terminal",
  },
  "visualization": {"batch", "config", "data", "models", "page"},
  "visualize": {"build", "command_line", "config", "data", "models", "terminal", "visualization"},
  "server": {"data", "inference", "terminal"},
  "serve": {"build", "command_line", "config", "inference", "places", "server", "terminal"},
  "terminal": {"command_line", "config", "data", "inference", "places", "training"},
  "generate": {"build", "data", "inference", "terminal"},
  "chat": {"build", "data", "inference", "terminal"},
  "lmms_eval": {"build", "config", "data", "distributed", "inference", "sharding"},
  "train": {
    "build",
    "command_line",
    "config",
    "continuation",
    "data",
    "demo",
    "distributed",
    "flops",
    "inference",
    "models",
    "parameters",
    "places",
    "preflight",
    "report",
    "run_control",
    "processors",
    "sharding",
    "stage_data",
    "stage_loop",
    "train_vdim",
    "training",
    "weights",
  },
  "__init__": set(),
}


def imports(path: Path) -> set[str]:
  """The rooms of this package that a file imports from."""
  rooms = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and node.module == "mllm_jax":
      rooms |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mllm_jax."):
      rooms.add(node.module.split(".")[1])
    elif isinstance(node, ast.Import):
      rooms |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("mllm_jax.")}
  return rooms


def test_arrows_between_rooms_point_one_way():
  wrong = []
  for path in PACKAGE.rglob("*.py"):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    extra = imports(path) - ALLOWED[room] - {room}
    if extra:
      wrong.append(f"{path.relative_to(PACKAGE)} imports {sorted(extra)}")
  assert not wrong, wrong


def test_models_and_the_step_need_only_jax_flax_optax_and_numpy():
  blocked = [
    "grain",
    "ml_collections",
    "array_record",
    "transformers",
    "tokenizers",
    "PIL",
    "tensorboardX",
    "torch",
    "safetensors",
  ]
  code = (
    f"import sys\nfor name in {blocked}: sys.modules[name] = None\n"
    "import mllm_jax.models.mllm, mllm_jax.training.step, mllm_jax.sharding, mllm_jax.parameters"
  )
  subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)


def test_a_mistyped_command_is_answered_before_anything_heavy_is_imported():
  code = (
    "import sys\nfrom mllm_jax import train\n"
    "status = train.main(['train', '--config=configs/sp_cropping.py', '--workdir=x'])\n"
    "heavy = {'jax', 'flax', 'orbax', 'transformers', 'grain', 'torch', 'tensorflow'} & set(sys.modules)\n"
    "assert status == 2 and not heavy, (status, heavy)"
  )
  result = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True)
  assert result.returncode == 0, result.stderr
  assert "configs/sp_cropping.py needs" in result.stderr
