"""What Hiwin attention is compared with: the released v1 resampler, and the MLP on resized maps and the perceiver
against loops."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import uhd_draws
from flax import nnx
from test_windows import draw_maps, flat_maps

from mllm_jax import parameters
from mllm_jax.config import ConfigError
from mllm_jax.models.projectors.hiwin import sincos_table
from mllm_jax.models.projectors.resampler import Mlp144, Perceiver, UhdV1Resampler

GRIDS = [(24, 24), (20, 28), (13, 43)]
PATCHES = 576
OUTPUT, GRADIENT = 1e-5, 1e-4  # as for the other released numbers, see test_hiwin_golden


def released_resampler() -> UhdV1Resampler:
  w = uhd_draws.read("v1_weights")
  graphdef, flat = parameters.flatten(UhdV1Resampler(16, 64, head_width=16, rngs=nnx.Rngs(0)))
  values = {
    "attention/queries": w["query"][None],
    "attention/pos_embed": sincos_table(64, 12),
    "attention/level_projectors/0/kernel": w["kv_proj.weight"].T,
    "attention/out_proj/kernel": w["attn.out_proj.weight"].T,
    "attention/out_proj/bias": w["attn.out_proj.bias"],
    "proj/kernel": w["proj"],
  }
  for ours, theirs in {"attention/query_norm": "ln_q", "attention/key_norm": "ln_kv", "out_norm": "ln_post"}.items():
    values |= {f"{ours}/scale": w[f"{theirs}.weight"], f"{ours}/bias": w[f"{theirs}.bias"]}
  for name, kernel, bias in zip("qkv", np.split(w["attn.in_proj_weight"], 3), np.split(w["attn.in_proj_bias"], 3)):
    values |= {f"attention/{name}_proj/kernel": kernel.T, f"attention/{name}_proj/bias": bias}
  assert values.keys() == flat.keys()
  return parameters.unflatten(graphdef, values)


def test_v1_resampler_is_the_released_one():
  """Three images of different grids in one batch; each alone gives the gradients of the shared weights."""
  golden = uhd_draws.read("v1_resampler")
  names = [f"{height}x{width}" for height, width in GRIDS]
  maps = np.random.default_rng(0).normal(size=(3, PATCHES, 16)).astype(np.float32)
  for row, name in zip(maps, names):
    row[: golden[f"x_{name}"].shape[1]] = golden[f"x_{name}"][0]
  cotangent = np.concatenate([golden[f"cot_{name}"] for name in names])
  graphdef, flat = parameters.flatten(released_resampler())
  grids = jnp.asarray(GRIDS, jnp.int32)

  @jax.jit
  def step(flat, maps, used):
    def loss(flat, maps):
      tokens = parameters.unflatten(graphdef, flat)({0: maps}, grids)
      return (tokens * cotangent * used[:, None, None]).sum(), tokens

    return jax.value_and_grad(loss, (0, 1), has_aux=True)(flat, maps)

  for index, name in enumerate(names):
    (_, tokens), (gradients, map_gradients) = step(flat, maps, jnp.eye(3)[index])
    cells = GRIDS[index][0] * GRIDS[index][1]
    uhd_draws.close(f"out_{name}", tokens[index], golden, OUTPUT)
    uhd_draws.close(f"gx_{name}", map_gradients[index, :cells], golden, GRADIENT)
    assert not np.any(map_gradients[index, cells:])
    uhd_draws.close(f"gquery_{name}", gradients["attention/queries"][0], golden, GRADIENT)
    uhd_draws.close(f"gproj_{name}", gradients["proj/kernel"], golden, GRADIENT)


def bilinear(patch_map: np.ndarray, side: int) -> np.ndarray:
  """[H, W, C] -> [side, side, C] as PyTorch's F.interpolate(mode="bilinear", align_corners=False) defines it."""

  def axis(length):
    weights = np.zeros((side, length))
    for place in range(side):
      at = max((place + 0.5) * length / side - 0.5, 0)
      low = min(int(at), length - 1)
      weights[place, low] += 1 - (at - low)
      weights[place, min(low + 1, length - 1)] += at - low
    return weights

  return np.einsum("yh,xw,hwc->yxc", axis(patch_map.shape[0]), axis(patch_map.shape[1]), patch_map)


@pytest.mark.parametrize("levels", [(0, 2), (0, 1, 2)])  # the released code's mlp-v2, and its mlp144
def test_mlp144_against_loops(levels):
  grids = [(24, 24), (13, 43), (1, 576), (7, 3), (50, 2)]
  made = Mlp144(levels, 6, 16, rngs=nnx.Rngs(0))
  maps = {level: draw_maps(grids, 2**level, 6, seed=level) for level in (0, 1, 2)}
  flats = {level: flat_maps(m, 4**level * PATCHES) for level, m in maps.items()}
  tokens = jax.jit(lambda made, flats, grids: made(flats, grids))(made, flats, np.asarray(grids, np.int32))
  erf = np.vectorize(math.erf)
  weights = {path: np.asarray(x, np.float64) for path, x in parameters.flatten(made)[1].items()}
  for index, row in enumerate(tokens):
    all_levels = np.concatenate([bilinear(maps[level][index], 12) for level in levels], -1).reshape(144, -1)
    gelu = lambda x: x * (1 + erf(x / math.sqrt(2))) / 2
    expected = gelu(all_levels) @ weights["fc1/kernel"] + weights["fc1/bias"]
    if len(levels) == 2:
      expected = gelu(expected) @ weights["fc2/kernel"] + weights["fc2/bias"]
    np.testing.assert_allclose(row, expected, atol=1e-5 * np.abs(expected).max(), err_msg=str(grids[index]))
  assert made.fold(jnp.float32) is None


def test_perceiver_against_loops():
  grids, side, width, heads = [(4, 4), (2, 7), (16, 1)], 4, 8, 2
  graphdef, flat = parameters.flatten(
    Perceiver((0, 1), side, 6, width, query_grid=2, head_width=width // heads, rngs=nnx.Rngs(0))
  )
  random = np.random.default_rng(0)
  weights = {path: random.normal(size=x.shape) + path.endswith("scale") for path, x in flat.items()}
  made = parameters.unflatten(graphdef, {path: jnp.asarray(x, jnp.float32) for path, x in weights.items()})
  maps = {level: draw_maps(grids, 2**level, 6, seed=level) for level in (0, 1)}
  flats = {level: flat_maps(m, 4**level * 16) for level, m in maps.items()}
  tokens = jax.jit(lambda made, flats, grids: made(flats, grids))(made, flats, np.asarray(grids, np.int32))

  linear = lambda name, x: x @ weights[f"{name}/kernel"] + weights.get(f"{name}/bias", 0)

  def norm(name, x):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt(centred.var(-1, keepdims=True) + 1e-6) * weights[f"{name}/scale"] + weights[f"{name}/bias"]

  queries = linear("q_proj", norm("query_norm", weights["queries"]))
  for index, row in enumerate(tokens):
    cells = [bilinear(maps[level][index], side * 2**level).reshape(-1, 6) for level in (0, 1)]
    cells = norm("key_norm", linear("kv_proj", np.concatenate(cells)))
    keys, values, found = linear("k_proj", cells), linear("v_proj", cells), []
    for head in np.split(np.arange(width), heads):
      scores = np.exp(queries[:, head] @ keys[:, head].T / math.sqrt(len(head)))
      found.append(scores / scores.sum(-1, keepdims=True) @ values[:, head])
    expected = linear("out_proj", np.concatenate(found, -1))
    np.testing.assert_allclose(row, expected, atol=2e-5 * np.abs(expected).max(), err_msg=str(grids[index]))


def test_unused_crops_are_finite():
  zero = jnp.zeros((1, 2), jnp.int32)
  maps = {level: jnp.ones((1, 4**level * 16, 4)) for level in (0, 1)}
  rngs = nnx.Rngs(0)
  for made in (
    Mlp144((0, 1), 4, 8, rngs=rngs),
    Perceiver((0, 1), 4, 4, 8, head_width=4, rngs=rngs),
    UhdV1Resampler(4, 8, head_width=4, rngs=rngs),
  ):
    tokens = jax.jit(lambda made, maps: made(maps, zero))(made, maps)
    assert tokens.shape == (1, 144, 8) and np.isfinite(tokens).all()


def test_bad_input():
  maps = {1: jnp.ones((1, 64, 4))}
  grids = jnp.ones((1, 2), jnp.int32)
  with pytest.raises(ConfigError, match=r"needs level 0, and the pyramid has the levels \[1\]"):
    UhdV1Resampler(4, 8, head_width=4, rngs=nnx.Rngs(0))(maps, grids)
  with pytest.raises(ConfigError, match=r"needs level 0, and the pyramid has the levels \[1\]"):
    Mlp144((0, 1), 4, 8, rngs=nnx.Rngs(0))(maps, grids)
  with pytest.raises(ConfigError, match=r"projector.levels=\(1, 0\) must be"):
    Mlp144((1, 0), 4, 8, rngs=nnx.Rngs(0))
  with pytest.raises(ConfigError, match="projector.query_grid=0 must be at least 1"):
    Mlp144((0,), 4, 8, query_grid=0, rngs=nnx.Rngs(0))
  with pytest.raises(ConfigError, match="width 10 must be a multiple of its head width 4"):
    Perceiver((0,), 4, 4, 10, head_width=4, rngs=nnx.Rngs(0))
  with pytest.raises(ConfigError, match="width 10 must be a multiple of its head width 4"):
    UhdV1Resampler(4, 10, head_width=4, rngs=nnx.Rngs(0))
