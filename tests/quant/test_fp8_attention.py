"""FP8 attention against the same sums by hand, and what each switch does to a block."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from longlive_jax.build import choose_ops
from longlive_jax.config.load import load_config
from longlive_jax.eval import bench_block
from longlive_jax.eval.bench import relative_error
from longlive_jax.model.attention import Cached
from longlive_jax.model.kv_cache import empty_cache
from longlive_jax.model.ops import REFERENCE, dense_attention, plain_attend
from longlive_jax.quant.fp8 import Rows
from longlive_jax.quant.fp8_attention import fp8_attention, fp8_attention_rows
from longlive_jax.quant.policy import quantise_params, with_fp8_rows
from longlive_jax.sample.latents import block_shape
from longlive_jax.types import Array
from tests.launch.tiny import OVERRIDES

Q, K, V = (
  jax.random.normal(jax.random.key(i), (2, 12 * n, 3, 16)) for i, n in enumerate((1, 2, 2))
)


def by_hand(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
  """Of one head; float64 but for the roundings of ml_dtypes."""

  def rounded(x: np.ndarray, unit: float) -> np.ndarray:
    return (x / np.float32(unit)).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)

  units = [np.abs(x).max() / 448 for x in (Q, K, V)]
  q, k, v = (rounded(x, unit) for x, unit in zip((q, k, v), units, strict=True))
  scores = q @ k.T * units[0] * units[1] / 4
  p = np.exp(scores - scores.max(-1, keepdims=True))
  out = rounded(448 * p.astype(np.float32), 1) / 448 @ v / p.sum(-1, keepdims=True)
  return rounded(out.astype(np.float32), 1) * units[2]


def test_it_is_that_of_the_rounded_numbers():
  ours = np.asarray(fp8_attention(Q, K, V))
  for sample in range(2):
    for head in range(3):
      expected = by_hand(*(np.asarray(x)[sample, :, head] for x in (Q, K, V)))
      error = np.linalg.norm(ours[sample, :, head] - expected)
      assert error < 2e-3 * np.linalg.norm(expected)  # a rounding may fall the other way
  assert 0.01 < relative_error(ours, dense_attention(Q, K, V)) < 0.08


def test_numbers_that_come_in_e4m3_are_used_as_they_are():
  """But for queries, which are rounded, and the result, which has the unit of the values."""
  k, v = (x.astype(ml_dtypes.float8_e4m3fn) for x in (K, V))
  found = fp8_attention(Q, k, v)
  near = fp8_attention(Q.astype(ml_dtypes.float8_e4m3fn).astype(Q.dtype), k, v)
  np.testing.assert_array_equal(found, near)
  assert relative_error(found, dense_attention(Q, K, V)) < 0.08
  levels = np.asarray(found) * 448 / float(jnp.max(jnp.abs(v.astype(jnp.float32))))
  np.testing.assert_allclose(levels, levels.astype(ml_dtypes.float8_e4m3fn), rtol=1e-6)
  few = fp8_attention(Q, k[:, :5], v[:, :5])  # a short text
  wide = dense_attention(Q, *(x[:, :5].astype(Q.dtype) for x in (k, v)))
  np.testing.assert_array_equal(few, wide)


def test_its_result_as_an_operand():
  k, v = (x.astype(ml_dtypes.float8_e4m3fn) for x in (K, V))
  found = fp8_attention_rows(Q, k, v)
  assert isinstance(found, Rows) and found.scales.shape == (*Q.shape[:2], 1)
  wide = found.values.astype(jnp.float32) * found.scales[..., None]
  np.testing.assert_array_equal(wide, fp8_attention(Q, k, v))
  few = fp8_attention_rows(Q, K[:, :5], V[:, :5], jnp.asarray([3, 4]))  # a short text
  np.testing.assert_array_equal(few, fp8_attention(Q, K[:, :5], V[:, :5], jnp.asarray([3, 4])))
  with pytest.raises(ValueError, match="model.attention=fp8 makes one video at a time"):
    fp8_attention_rows(Q, K, V, jnp.asarray([3, 4]))


def test_a_layer_multiplies_the_result_of_attention_as_it_is():
  """Only where its path is quantised, and not for devices that exchange it."""
  path, shape = "layers/self_attn/o", (2, 12, 48)
  ops = with_fp8_rows(dataclasses.replace(REFERENCE, dense=fp8_attention), frozenset({path}))
  plan = Cached(1, None, jnp.zeros(2, jnp.int32))
  cache = empty_cache(1, 2, 1, 24, 3, 16, "float32")
  out, _ = ops.attend(Q, K, V, cache, 0, plan)
  assert isinstance(out, Rows)
  rows = ops.between.joined(ops, out, shape, (path,))
  np.testing.assert_array_equal(
    rows.values.astype(jnp.float32) * rows.scales, fp8_attention(Q, K, V).reshape(shape)
  )
  for other in (
    with_fp8_rows(dataclasses.replace(ops, attend=plain_attend), frozenset({"layers/ffn/up"})),
    with_fp8_rows(dataclasses.replace(REFERENCE, mesh=ops), frozenset({path})),
  ):
    assert other.attend is plain_attend


def test_what_it_cannot_do():
  with pytest.raises(ValueError, match="model.attention=fp8 makes one video at a time"):
    fp8_attention(Q, K, V, jnp.asarray([3, 4]))
  with pytest.raises(ValueError, match="model.attention=fp8 has no gradients"):
    jax.grad(lambda q: jnp.sum(fp8_attention(q, K, V)))(Q)
  few = fp8_attention(Q, K[:, :5], V[:, :5], jnp.asarray([3, 4]))
  expected = dense_attention(Q, K[:, :5], V[:, :5], jnp.asarray([3, 4]))
  np.testing.assert_array_equal(few, expected)


# (quant.linears, quant.cache, model.attention) -> relative error of the latents of a block
SWITCHES = {
  ("none", "none", "fp8"): 0.03,
  ("fp8", "none", "auto"): 0.03,
  ("fp8", "none", "fp8"): 0.04,
  ("nvfp4", "none", "auto"): 0.12,
  ("none", "nvfp4", "auto"): 0.03,
  ("none", "fp8", "auto"): 0.03,
  ("fp8", "fp8", "fp8"): 0.04,
  ("nvfp4", "nvfp4", "auto"): 0.12,
}


@pytest.fixture(scope="module")
def block():
  """The latents of a block, full window, for any switches; two layers, the same weights."""
  sizes = {**OVERRIDES, "model.width": 64, "model.heads": 2, "model.dtype": "bfloat16"}
  experiment = load_config("configs/tiny.py", sizes)
  params = bench_block.random_params(experiment)
  noise = jax.random.normal(jax.random.key(4), block_shape(experiment, 1))
  text = bench_block.random_text(experiment)

  def run(linears: str, cache: str, attention: str) -> Array:
    varied = bench_block.varied(experiment, linears, cache, attention)
    job = jax.jit(bench_block.one_block(varied, choose_ops(varied), unrolled=False))
    weights = quantise_params(params, varied.quant)
    return job(weights, bench_block.cache_of(varied, unrolled=False), noise, text)[0]

  return run


def test_each_switch_changes_a_block_by_little(block):
  plain = block("none", "none", "auto")
  found = {switches: relative_error(block(*switches), plain) for switches in SWITCHES}
  for switches, error in found.items():
    assert 1e-4 < error < SWITCHES[switches], (switches, found)
