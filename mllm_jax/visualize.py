"""Look into a model: python -m mllm_jax.visualize --model=DIR --image=FILE --out=FOLDER

Writes index.html, which holds everything and can be passed on alone, and its pictures as PNG files beside it: the crops
of the image, the places of their visual tokens, and what the projector makes of one crop. Exit status: 0 done, 2 for
anything that the caller can put right, 130 when interrupted.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence

from mllm_jax import terminal
from mllm_jax.command_line import Parser
from mllm_jax.config import SHUFFLED, ConfigError, ModelConfig
from mllm_jax.visualization import folder

# jax is imported where it is used, so that a mistyped argument is answered at once.

CONTENT = """what is shown:
  every model               the crops, which place of the sequence shows which, the tower's features of one crop
  LLaVA-UHD (v1, v2)        the levels of the pyramid beside bilinear ones, the windows and how one of them is pooled
                            with --question, what of the image the answer hangs on at each level
  LLaVA-SP                  what each spatial token sees, and its attention to details

examples:
  python -m mllm_jax.visualize --model=runs/uhd_v2 --image=street.jpg --out=looked
  python -m mllm_jax.visualize --model=models/sp --image=street.jpg --out=looked
  python -m mllm_jax.visualize --model=runs/uhd_v2 --image=street.jpg --crop=3 --out=looked
  python -m mllm_jax.visualize --model=runs/uhd_v2 --image=street.jpg --question="What is it?" --word=Car --out=looked
"""


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
  """The command line. Exits with status 2 where it cannot work."""
  parser = Parser(
    prog="python -m mllm_jax.visualize",
    description="Look into a model: pictures of what it makes of an image, on one page.",
    epilog=CONTENT,
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
  parser.add_argument("--image", required=True, metavar="FILE", help="the picture that the model looks at")
  parser.add_argument(
    "--out", required=True, metavar="FOLDER", help="new, or written by an earlier call, which is then replaced"
  )
  parser.add_argument(
    "--crop",
    type=int,
    default=0,
    metavar="N",
    help="which crop is shown in detail (default: 0, the first slice; the page has their numbers)",
  )
  parser.add_argument("--question", default="", metavar="TEXT", help="about the image, for activations at each level")
  parser.add_argument(
    "--word", default="", metavar="TEXT", help="the answer to look at (default: the first token of the model's own)"
  )
  args = parser.parse_args(argv)
  if args.crop < 0:
    parser.error(f"--crop is {args.crop}; crops are counted from 0")
  if args.word and not args.question:
    parser.error(f"--word={args.word} answers a question; add --question")
  if "://" not in args.model and not os.path.isdir(args.model):
    parser.error(f"--model {args.model}: no such folder; name a training run's --workdir, or a model's folder")
  if not os.path.isfile(args.image):
    parser.error(f"--image {args.image}: no such file")
  return args


def visualize(args: argparse.Namespace) -> None:
  """Writes the folder. What the caller can put right is a ConfigError, DataError, PlaceError or OSError."""
  out = folder.check(args.out)
  picture = terminal.load_picture(args.image)

  from mllm_jax.build import load
  from mllm_jax.models.projectors.pixel_shuffle import SIDE
  from mllm_jax.visualization import activation, crops, page, spatial, uhd

  start = time.perf_counter()
  model, processor = load(args.model)
  terminal.note(f"{args.model}: read in {time.perf_counter() - start:.1f} s")
  aspect, kind = processor.aspect, model.config.projector.kind
  if args.question and not model.config.projector.any_aspect:
    raise ConfigError(f"--question is for models of LLaVA-UHD's kind, which have levels, and this one is of {kind!r}")
  pieces, places = aspect.crops(picture), aspect.places(*picture.size)
  crop = crops.encode(model, pieces, args.crop)
  spatial_tokens = kind in ("spatial", "spatial_shuffle")
  patch_tokens = model.config.vision.grid**2 // (SIDE**2 if kind in SHUFFLED else 1)
  before = aspect.tokens_per_crop - patch_tokens if spatial_tokens else 0
  sections = [crops.slicing(pieces, aspect, picture.size), crops.layout(places, aspect, len(pieces), before)]
  if model.config.projector.any_aspect:
    sections += uhd.sections(model, crop)
    if args.question:
      sections.append(activation.section(model, processor, picture, crop, args.question, args.word))
  else:
    sections += spatial.sections(model, crop) if spatial_tokens else [crops.features(crop)]
  facts = {
    "model": args.model,
    "image": args.image,
    "projector": describe(model.config),
    "vision tower": f"{model.config.vision.image_size} pixels, patches of {model.config.vision.patch_size}",
    "shown in detail": f"crop {args.crop} of {len(pieces)}",
  }
  folder.write(out, page.files(f"A model's view of {os.path.basename(args.image)}", facts, sections), facts)
  print(f"{args.out}/index.html")


def describe(config: ModelConfig) -> str:
  """The projector in a few words."""
  projector = config.projector
  if projector.kind == "mlp2x_gelu":
    return "LLaVA-1.5, an MLP"
  if projector.kind == "pixel_shuffle":
    return "InternVL, a pixel shuffle and an MLP"
  if projector.kind in ("spatial", "spatial_shuffle"):
    name = "LLaVA-SP" if projector.kind == "spatial" else "InternVL-SP"
    return f"{name}, {projector.variant}" + (", with detail features" if projector.dfi_kernel else "")
  names = {"hiwin": "LLaVA-UHD v2", "uhd_v1": "LLaVA-UHD v1's resampler", "mlp144": "an MLP on resized levels"}
  names["perceiver"] = "a perceiver"
  name = names[projector.kind]
  return name if projector.kind == "uhd_v1" else f"{name}, pyramid: {projector.pyramid}"


def main(argv: Sequence[str] | None = None) -> int:
  args = arguments(argv)
  return terminal.run(lambda: visualize(args), left="nothing was left behind")


if __name__ == "__main__":
  sys.exit(main())
