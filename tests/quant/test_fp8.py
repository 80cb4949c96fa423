"""FP8 by rows against products of the rounded matrices; no gradients."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from longlive_jax.quant.fp8 import fp8_matmul, fp8_product, quantise_rows, quantise_weight
from longlive_jax.types import Array

T, IN, OUT = 24, 32, 48


def draw(seed: int, *shape: int) -> Array:
  return jax.random.normal(jax.random.key(seed), shape)


def rounded(x: np.ndarray) -> np.ndarray:
  """Rows scaled to 448, rounded by ml_dtypes, scaled back; float64."""
  scale = (np.abs(x).max(-1, keepdims=True) / np.float32(448)).astype(np.float32)
  scale[scale == 0] = 1
  return (x / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale


X = draw(0, T, IN) * jnp.exp(draw(3, T, 1))
W = draw(1, IN, OUT)


def test_the_product_is_that_of_the_rounded_rows():
  expected = rounded(np.asarray(X)) @ rounded(np.asarray(W.T)).T
  for w in (W, quantise_weight(W)):
    y = np.asarray(fp8_product(X, w))
    assert np.linalg.norm(y - expected) < 2e-3 * np.linalg.norm(expected)
  dense = np.asarray(X, np.float64) @ np.asarray(W, np.float64)
  assert np.linalg.norm(y - dense) < 0.05 * np.linalg.norm(dense)


def test_rows_of_zeros_stay_zero_and_large_ones_do_not_become_nan():
  rows = quantise_rows(jnp.stack([jnp.zeros(4), jnp.full(4, 3e38), jnp.arange(4.0)]))
  assert not rows.values[0].astype(jnp.float32).any()
  assert (rows.values[1].astype(jnp.float32) == 448).all()
  np.testing.assert_allclose(rows.scales[2, 0] * 448, 3.0, rtol=1e-6)


def test_stacked_weights_and_leading_axes():
  weights = quantise_weight(jnp.stack([W, 2 * W]))
  assert weights.values.shape == (2, OUT, IN) and weights.scales.shape == (2, OUT, 1)
  x, bias = X.reshape(2, 3, 4, IN).astype(jnp.bfloat16), jnp.arange(OUT, dtype=jnp.float32)
  y = fp8_matmul(x, W, bias)
  assert y.shape == (2, 3, 4, OUT) and y.dtype == jnp.bfloat16


def test_training_with_it_is_refused():
  with pytest.raises(ValueError, match=r"quant\.linears=fp8 has no gradients"):
    jax.grad(lambda x: jnp.sum(fp8_product(x, W)))(X)
