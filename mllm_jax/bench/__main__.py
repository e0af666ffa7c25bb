"""python -m mllm_jax.bench NAME [options]; without a name it lists them."""

import importlib
import sys

NAMES = {
  "convert": "importing weights against `cp`, and the memory of importing and loading",
  "data": "samples a second, from files to batches, against a PyTorch DataLoader",
  "decode": "tokens a second of answers, against transformers' generate",
  "hiwin": "Hiwin attention, forward and backward, against the released arithmetic in PyTorch",
  "step": "host time of a training step at 7B's number of arrays, layers stacked and not",
  "train": "LLaVA-SP's LoRA step, beside the same step in PyTorch on the same device",
  "vdim": "VDIM's 4x stack, forward and backward, against the released arithmetic in PyTorch",
}


def main(argv: list[str]) -> int:
  if not argv or argv[0] not in NAMES:
    print("usage: python -m mllm_jax.bench NAME [--help]\n\nbenchmarks:")
    print("\n".join(f"  {name:10s} {purpose}" for name, purpose in NAMES.items()))
    return 0 if not argv or argv[0] in ("-h", "--help") else 2
  return importlib.import_module(f"mllm_jax.bench.{argv[0]}").main(argv[1:])


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
