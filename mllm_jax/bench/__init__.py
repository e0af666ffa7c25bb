"""Benchmarks: python -m mllm_jax.bench NAME. Each compares with what a user would run instead, in the same run, and
prints the ratio; absolute times say little."""

import argparse


def count(text: str) -> int:
  """A number of 1 or more from the command line."""
  if not text.isdecimal() or int(text) < 1:
    raise argparse.ArgumentTypeError(f"{text} must be an integer of 1 or more")
  return int(text)
