"""Weights in and out: python -m mllm_jax.convert import | export | inspect | verify

Exit status: 0 done, 1 for `verify` where the two differ, 2 for something to put right.
"""

import argparse
import errno
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from mllm_jax.command_line import Parser
from mllm_jax.config import ConfigError
from mllm_jax.places import PlaceError
from mllm_jax.weights.errors import WeightsError

# What needs jax is imported where it is used, so that a mistyped argument is answered at once.

IMPORT = """Reads a checkpoint of any family and writes one folder that needs no other file (mllm_jax.json,
model.safetensors, tokenizer/). --model is recognised by what is in it:

  CLIP or SigLIP           openai/clip-vit-large-patch14-336, google/siglip-...; whole or the vision half
  Llama, Mistral, Qwen2    safetensors or pytorch_model.bin, whole or in shards
  LLaVA-1.5                as liuhaotian released it, and as llava-hf
  LLaVA-SP as released     a whole model, or a LoRA run (adapter, non_lora_trainables.bin) with --llm and --vision
  LLaVA-UHD v2 as released a whole model, or its first stage's mm_projector.bin with --llm and --vision
  PEFT adapter             with --llm
  mllm_jax                 a folder made here, or a training run's

--vision, --llm, --projector and --adapter name the parts one by one, or replace those of --model.

examples:
  python -m mllm_jax.convert import --model=llava-1.5-7b-hf --out=models/llava15
  python -m mllm_jax.convert import --vision=clip-vit-large-patch14-336 --llm=vicuna-7b-v1.5 \\
      --projector=llava-sp/model.bin --out=models/sp
  python -m mllm_jax.convert import --model=llava-sp-lora --llm=vicuna-7b-v1.5 \\
      --vision=clip-vit-large-patch14-336 --merge --out=models/sp
"""
EXPORT = """Writes a model's folder for other tools:

  hf        LLaVA-1.5-type models in llava-hf's names with processor, tokenizer and chat template, for transformers
            4.57 and 5, vLLM and SGLang; pictures stay padded to a square (do_pad)
  official  what the released LLaVA, LLaVA-SP, LLaVA-UHD v2 and InternVL 2 code loads
  peft      the adapter and the projector only

examples:
  python -m mllm_jax.convert export --checkpoint=runs/llava15 --format=hf --out=exported
  python -m mllm_jax.convert export --checkpoint=models/sp --format=official --lora=apart --out=exported
"""
INSPECT = """Says what a folder or a file of weights is recognised as, and lists every tensor: name, shape, type, bytes.
Nothing but headers is read."""
VERIFY = """Compares two models, whatever their formats: the largest difference of every tensor, and of the logits on a
fixed picture and text, computed in float32. Exit status 1 where they differ by more than --tolerance."""


def parser() -> Parser:
  """The command line."""
  top = Parser(prog="python -m mllm_jax.convert", description="Weights in and out.", allow_abbrev=False)
  commands = top.add_subparsers(dest="command", required=True, metavar="import | export | inspect | verify")

  def command(name: str, text: str, purpose: str) -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    return commands.add_parser(name, description=text, help=purpose, formatter_class=raw, allow_abbrev=False)

  read = command("import", IMPORT, "a checkpoint of any family -> one folder of ours")
  add_parts(read)
  read.add_argument("--merge", action="store_true", help="fold the adapter into the language model")
  read.add_argument("--dtype", default="", choices=("bfloat16", "float16", "float32"), help="default: as stored")
  read.add_argument(
    "--levels",
    default=(),
    type=levels,
    metavar="0,2",
    help="of LLaVA-UHD v2 as released: the levels its projector attends to (default: those its checkpoint was trained "
    "with)",
  )
  add_out(read)

  write = command("export", EXPORT, "a model -> a folder that other tools load")
  write.add_argument("--checkpoint", required=True, metavar="DIR", help="a model, or a training run's folder")
  write.add_argument("--format", required=True, choices=("hf", "official", "peft"))
  write.add_argument(
    "--lora", default="merged", choices=("merged", "apart"), help="of hf and official (default: merged)"
  )
  write.add_argument(
    "--dtype", default="", choices=("bfloat16", "float16", "float32"), help="default: as most of it is stored"
  )
  write.add_argument(
    "--vision_tower",
    default="",
    metavar="DIR|REPO",
    help="of official: where the released code finds the tower (default: where it was imported from)",
  )
  write.add_argument(
    "--base_model",
    default="",
    metavar="DIR|REPO",
    help="of an adapter apart: the language model under it (default: where that was imported from)",
  )
  add_out(write)

  look = command("inspect", INSPECT, "what a path holds, tensor by tensor")
  look.add_argument("path", metavar="PATH")
  look.add_argument("--json", action="store_true", help="for machines")

  compare = command("verify", VERIFY, "compare two models tensor by tensor and by their logits")
  compare.add_argument("a", metavar="A")
  compare.add_argument("b", metavar="B")
  compare.add_argument(
    "--tolerance",
    type=float,
    default=0.0,
    metavar="X",
    help="largest difference allowed, relative to the largest value of the tensor or the logits (default: 0)",
  )
  add_parts(compare, "of both, where a path does not hold them: ")
  return top


def levels(text: str) -> tuple[int, ...]:
  """Levels from the command line."""
  return tuple(int(level) for level in text.split(","))


def add_parts(command: argparse.ArgumentParser, which: str = "") -> None:
  """The options that name checkpoints of parts."""
  if not which:
    command.add_argument("--model", default="", metavar="DIR", help="a checkpoint with the whole model, or most of it")
  command.add_argument("--vision", default="", metavar="DIR", help=which + "the vision tower")
  command.add_argument("--llm", default="", metavar="DIR", help=which + "the language model")
  command.add_argument(
    "--projector",
    default="",
    metavar="FILE|DIR",
    help=which + "model.bin, non_lora_trainables.bin, mm_projector.bin, or a folder with one",
  )
  command.add_argument("--adapter", default="", metavar="DIR", help=which + "a PEFT adapter")
  command.add_argument(
    "--maps",
    default="",
    choices=("cropping", "pooling"),
    help="of LLaVA-SP's transformer blocks as released: the variant, which their names do not tell",
  )
  if not which:
    command.add_argument(
      "--template", default="", metavar="NAME", help="of conversations (default: the checkpoint's, or vicuna_v1)"
    )


def add_out(command: argparse.ArgumentParser) -> None:
  command.add_argument("--out", required=True, metavar="DIR", help="the folder to write")
  command.add_argument(
    "--overwrite", action="store_true", help="replace --out where it holds weights, once the new one is whole"
  )


def bar(total: int, what: str):
  """A progress bar over bytes, and the function that moves it."""
  from tqdm import tqdm

  shown = tqdm(total=total, desc=what, unit="B", unit_scale=True, unit_divisor=1024, dynamic_ncols=True)
  return shown, shown.update


def run_import(args: argparse.Namespace) -> None:
  """Reads a checkpoint and writes our folder."""
  from mllm_jax.data.chat import TEMPLATES
  from mllm_jax.weights import export, folder
  from mllm_jax.weights.tensors import Cast

  if not (args.model or args.vision or args.llm or args.projector or args.adapter):
    raise WeightsError("nothing to import; name --model, or --vision and --llm")
  if args.template and args.template not in TEMPLATES:
    raise WeightsError(f"--template={args.template} is unknown; known: {', '.join(TEMPLATES)}")
  stored = open_checkpoint(args.model, args)
  if args.merge:
    stored = stored.merged()
  for note in stored.notes:
    say(f"note: {note}")
  describe(stored)
  tensors = Cast(stored.tensors, args.dtype) if args.dtype else stored.tensors
  shown, progress = bar(export.size(tensors), "importing")
  with shown:
    folder.write(
      Path(args.out), stored.manifest, tensors, stored.tokenizer, overwrite=args.overwrite, progress=progress
    )
  say(f"written to {args.out}")


def run_export(args: argparse.Namespace) -> None:
  """Reads a model and writes another tool's folder."""
  from mllm_jax.weights import export

  stored = open_checkpoint(args.checkpoint)
  describe(stored)
  merge = args.lora == "merged" and args.format != "peft"
  shown, progress = bar(export.size(stored.tensors), "exporting")
  with shown:
    export.export(
      stored,
      args.format,
      Path(args.out),
      merge=merge,
      dtype=args.dtype,
      vision_tower=args.vision_tower,
      base_model=args.base_model,
      overwrite=args.overwrite,
      progress=progress,
    )
    shown.total = shown.n
  say(f"written to {args.out}")


def open_checkpoint(path: str, args: argparse.Namespace | None = None):
  """The model at a path, with the parts that the command line names."""
  from mllm_jax import build

  names = ("vision", "llm", "projector", "adapter", "template", "levels", "maps")
  return build.open_any(path, **{name: getattr(args, name) for name in names if getattr(args, name, "")})


def describe(stored) -> None:
  """What was found, a line for each part."""
  for name, source in stored.manifest.sources.items():
    say(f"{name:10s} {source['family']}: {source['path']}")


def run_inspect(args: argparse.Namespace) -> None:
  """Lists what a path holds."""
  from mllm_jax.inspection import inspect, table

  content = inspect(args.path)
  print(json.dumps(content, indent=1) if args.json else table(content))


def run_verify(args: argparse.Namespace) -> int:
  """Compares two models; 1 where they differ."""
  from mllm_jax.inspection import compare, comparison_table

  if not args.tolerance >= 0:  # which no NaN is
    raise ConfigError(f"--tolerance={args.tolerance} must be 0 or more")
  parts = {name: getattr(args, name) for name in ("vision", "llm", "projector", "adapter")}
  result = compare(args.a, args.b, parts, args.tolerance)
  print(comparison_table(result))
  return 0 if result.equal else 1


def say(message: str) -> None:
  print(message, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
  args = parser().parse_args(argv)
  commands = {"import": run_import, "export": run_export, "inspect": run_inspect, "verify": run_verify}
  try:
    return commands[args.command](args) or 0
  except (PlaceError, ConfigError) as error:
    say(f"error: {error}")
  except OSError as error:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM):
      raise
    say(
      f"error: {error.filename or args.out}: {error.strerror}; nothing was left behind, make room or name another --out"
    )
  except KeyboardInterrupt:
    say("\ninterrupted; nothing was left behind")
    return 130
  except RuntimeError as error:
    from mllm_jax.training.checkpoint import CheckpointError  # imports orbax, which is there by now

    if not isinstance(error, CheckpointError):
      raise
    say(f"error: {error}")
  return 2


if __name__ == "__main__":
  sys.exit(main())
