"""Benchmarks: python -m mllm_jax.bench NAME. Each compares with what a user would run instead, in the same run, and
prints the ratio; absolute times say little."""
