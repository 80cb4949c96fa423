"""The parts of the set "nvfp4" above the quantiser: linear layers with gradients, a cache block."""

from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.quant.kv import without_channel_mean
from longlive_jax.quant.matmul import Recipe, nvfp4_recipe, quantised_matmul
from longlive_jax.quant.nvfp4 import Spec, dequantise, quantise
from tests.parity.records import Compared, compare, compare_share
from tests.parity.semantics import REFERENCE

LINEAR = 1e-2  # L2 norm: both sides round to bfloat16, the original twice; codes may flip
RULES = {  # tag -> (weights, activations and gradients, 16x16 weights)
  "mse_2d": ("mse", "mse", True),
  "train_ar": ("static_6", "mse", True),
  "static6_1d": ("static_6", "static_6", False),
}


def recipe_of(tag: str) -> Recipe:
  """The recipe of a recorded layer; its gradients were rounded to nearest."""
  weights, rest, square = RULES[tag]
  return nvfp4_recipe(weights, rest, rest, square_weights=square, stochastic=False)


def check(archive: Mapping[str, np.ndarray]) -> Iterator[Compared]:
  """Checks the arrays "linear/*" and "kv/*"."""
  tags = sorted({name.split("/")[1] for name in archive if name.startswith("linear/")} & {*RULES})
  for tag in tags:
    yield from check_linear(archive, tag)
  if "kv/k" in archive:
    yield from check_block(archive)


def check_linear(archive: Mapping[str, np.ndarray], tag: str) -> Iterator[Compared]:
  """One linear layer, forward and backward."""
  x, g = (jnp.asarray(archive[f"linear/{name}"], jnp.bfloat16) for name in ("x", "grad_out"))
  weight, bias = (jnp.asarray(archive[f"linear/{name}"]) for name in ("weight", "bias"))
  recipe = recipe_of(tag)

  @jax.jit
  def run(x: jax.Array, weight: jax.Array, bias: jax.Array) -> tuple[jax.Array, ...]:
    y, pull = jax.vjp(lambda *a: quantised_matmul(recipe, *a, None), x, weight.T, bias)
    dx, dw, db = pull(g)
    return y, dx, dw.T, db

  for name, ours in zip(("y", "grad_x", "grad_w", "grad_b"), run(x, weight, bias), strict=True):
    golden = archive[f"linear/{tag}/{name}"]
    error = np.linalg.norm(np.asarray(ours, np.float32) - golden) / np.linalg.norm(golden)
    yield compare(f"linear/{tag}/{name}", error, 0.0, LINEAR, 0.0)


def check_block(archive: Mapping[str, np.ndarray]) -> Iterator[Compared]:
  """A block of keys as a matrix of (token, head) rows."""
  k = jnp.asarray(archive["kv/k"], jnp.bfloat16)
  rows = k.reshape(-1, k.shape[-1])
  q = jax.jit(lambda x: quantise(x, Spec("mse", exact=True), semantics=REFERENCE))(rows)
  yield compare_share("kv/block/codes_packed", q.codes, archive["kv/block/codes_packed"])
  scales = jax.lax.bitcast_convert_type(q.scales, jnp.uint8)
  yield compare_share("kv/block/scales_u8", scales, archive["kv/block/scales_u8"])
  yield compare("kv/block/amax", q.amax, archive["kv/block/amax"], 0.0, 0.0)
  exact = dequantise(q, jnp.float32, exact=True)
  yield compare_share("kv/block/dequant_f32", exact, archive["kv/block/dequant_f32"])
  key = "kv/dequant_kernel_bf16"
  yield compare(
    key, dequantise(q, jnp.bfloat16).reshape(archive[key].shape), archive[key], 0, 2**-8
  )
  yield compare("kv/k_smooth", without_channel_mean(k), archive["kv/k_smooth"], 0.0, 0.0)
