"""Hiwin attention, forward and backward, against the arithmetic of the released code in PyTorch.

The same sizes, weights and inputs, float32, the same CPU cores, in turns, in one process. PyTorch does what the
authors' code does step by step: project and normalise every cell, add positions, pool keys and values, attend. It gets
the quick form of each step (RoI-align as two small matrices, the four query sets in one call of its attention, no
padding), so the ratio is that of the way of computing. The default widths are to each other as those of CLIP-L and
Vicuna-7B, 1024 and 4096. The largest difference of the outputs is printed too.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mllm_jax.bench import count
from mllm_jax.models.projectors import windows
from mllm_jax.models.projectors.hiwin import HiwinAttention

HEAD_WIDTH = 128


def roi_matrix(windows_a_side: int, length: int, bins: int) -> np.ndarray:
  """RoI-align along one axis of `length` cells, float32 [windows * bins, length]."""
  axis = windows.Axis(windows_a_side, jnp.array([length]), jnp.array([bins]), jnp.arange(bins)[None])
  weights = axis.weights(jnp.arange(length)[None, None, None])
  return np.asarray(weights).reshape(windows_a_side * bins, length)


def released(module: HiwinAttention, grid: tuple[int, int]) -> tuple[Callable, list]:
  """(forward, parameters) in PyTorch, with the weights of `module`: {level: tensor [N, H * W, C]} -> [N, g*g, D]."""
  import torch
  from torch.nn import functional as F

  attention = module.attention
  tensor = lambda array: torch.tensor(np.asarray(array), requires_grad=True)
  linear = lambda m: (tensor(m.kernel[...].T), tensor(m.bias[...]))
  norm = lambda m: (tensor(m.scale[...]), tensor(m.bias[...]))
  projectors = [linear(projector) for projector in attention.level_projectors]
  embeddings, queries, positions = (
    tensor(x[...]) for x in (attention.level_embeddings, attention.queries, attention.pos_embed)
  )
  norms = {name: norm(getattr(attention, name)) for name in ("query_norm", "key_norm")}
  norms |= {name: norm(getattr(module, name)) for name in ("set_norm", "out_norm")}
  packed = [linear(m) for m in (attention.q_proj, attention.k_proj, attention.v_proj)]
  in_weight, in_bias = (torch.cat(parts).detach().requires_grad_() for parts in zip(*packed))
  out, merge, proj = linear(attention.out_proj), linear(module.merge), tensor(module.proj.kernel[...])
  width, side = in_weight.shape[1], attention.pooling[0].windows
  normalise = lambda x, name: F.layer_norm(x, (width,), *norms[name], eps=1e-6)
  rows, columns = (int(x[0]) for x in attention.pooling[0].bins(jnp.array([grid])))
  matrices = []
  for level in attention.levels:
    height, wide = grid[0] << level, grid[1] << level
    matrices.append((torch.tensor(roi_matrix(side, height, rows)), torch.tensor(roi_matrix(side, wide, columns))))

  def pool(maps, index):  # [N, H, W, E] -> [tokens, N * g*g, E]
    by_row, by_column = matrices[index]
    bins = torch.einsum("yh,nhwe->nywe", by_row, maps)
    bins = torch.einsum("xw,nywe->nyxe", by_column, bins)
    bins = bins.unflatten(2, (side, columns)).unflatten(1, (side, rows))  # [N, g, rows, g, columns, E]
    return bins.permute(2, 4, 0, 1, 3, 5).reshape(rows * columns, -1, width)

  def forward(levels):
    keys, values = [], []
    for index, level in enumerate(attention.levels):
      height, wide = grid[0] << level, grid[1] << level
      cells = normalise(F.linear(levels[level], *projectors[index]), "key_norm").unflatten(1, (height, wide))
      table = positions.T.reshape(1, width, side, side)
      table = F.interpolate(table, (height, wide), mode="bicubic", align_corners=False)[0].permute(1, 2, 0)
      keys.append(pool(cells + table + embeddings[index], index))
      values.append(pool(cells, index))
    n = levels[attention.levels[0]].shape[0]
    query = (normalise(queries, "query_norm") + positions).repeat(1, n, 1)
    found, _ = F.multi_head_attention_forward(
      query, torch.cat(keys), torch.cat(values), width, attention.heads, in_weight, in_bias, None, None, False, 0.0,
      *out, training=True, need_weights=False,
    )  # fmt: skip
    found = normalise(found, "set_norm").unflatten(1, (n, side * side)).permute(1, 2, 0, 3).flatten(2)
    return normalise(F.linear(found, *merge), "out_norm") @ proj

  parameters = [embeddings, queries, positions, in_weight, in_bias, proj, *out, *merge]
  return forward, parameters + [x for pair in projectors + list(norms.values()) for x in pair]


def compare(width: int, vision_width: int, crops: int, grid: tuple[int, int], levels: tuple[int, ...], repeat: int):
  """(seconds of ours, seconds of PyTorch, largest difference of the outputs over their largest magnitude)."""
  import torch

  module = HiwinAttention(levels, vision_width, width, head_width=HEAD_WIDTH, rngs=nnx.Rngs(0))
  graphdef, state = nnx.split(module)
  draw = np.random.default_rng(0)
  maps = {
    level: draw.normal(size=(crops, 4**level * grid[0] * grid[1], vision_width)).astype(np.float32) for level in levels
  }
  cotangent = draw.normal(size=(crops, 144, width)).astype(np.float32)
  grids = jnp.asarray([grid] * crops, jnp.int32)

  def loss(state, maps):
    tokens = nnx.merge(graphdef, state)(maps, grids)
    return (tokens * cotangent).sum(), tokens

  ours = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
  our_maps = jax.tree.map(jnp.asarray, maps)
  forward, parameters = released(module, grid)
  their_maps = {level: torch.tensor(x, requires_grad=True) for level, x in maps.items()}
  their_cotangent = torch.tensor(cotangent)

  def run_ours():
    (_, tokens), _ = jax.block_until_ready(ours(state, our_maps))
    return tokens

  def run_theirs():
    for x in (*parameters, *their_maps.values()):
      x.grad = None
    tokens = forward(their_maps)
    (tokens * their_cotangent).sum().backward()
    return tokens.detach().numpy()

  tokens, expected = np.asarray(run_ours()), run_theirs()
  seconds = {run_ours: [], run_theirs: []}
  for _ in range(repeat):
    for run, times in seconds.items():
      start = time.perf_counter()
      run()
      times.append(time.perf_counter() - start)
  return seconds[run_ours], seconds[run_theirs], np.abs(tokens - expected).max() / np.abs(expected).max()


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(
    prog="python -m mllm_jax.bench hiwin", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--width", type=count, default=1024, help="of the decoder (default: 1024)")
  parser.add_argument("--vision-width", type=count, default=256, help="of the ViT (default: 256)")
  parser.add_argument("--crops", type=count, default=2, help="in the batch (default: 2)")
  parser.add_argument("--grid", type=count, nargs=2, default=(24, 24), help="of the ViT (default: 24 24)")
  parser.add_argument("--levels", type=int, nargs="+", default=(0, 2), help="of the pyramid (default: 0 2)")
  parser.add_argument("--repeat", type=count, default=5, help="how often each is measured (default: 5)")
  args = parser.parse_args(argv)
  try:
    import torch
  except ImportError:
    print("this benchmark compares with PyTorch, which is not installed; run `pip install mllm_jax[torch]`")
    return 1
  jax.config.update("jax_platforms", "cpu")
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  ours, theirs, difference = compare(
    args.width, args.vision_width, args.crops, tuple(args.grid), tuple(args.levels), args.repeat
  )
  show = lambda seconds: f"{statistics.median(seconds):.2f} s   ({', '.join(f'{x:.2f}' for x in seconds)})"
  height, wide = args.grid
  print(f"{args.crops} crops of {height} x {wide}, levels {args.levels}, C {args.vision_width}, D {args.width}")
  print(f"PyTorch                 {show(theirs)}")
  print(f"mllm_jax                {show(ours)}")
  print(f"PyTorch / mllm_jax      {statistics.median(theirs) / statistics.median(ours):.2f}")
  print(f"difference of outputs   {difference:.1e} of the largest")
  return 0
