"""Stochastic rounding and its noise, and the Hadamard transform."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from longlive_jax.quant.nvfp4 import Spec, fake_quantise
from longlive_jax.quant.rounding import (
  HADAMARD_SIGNS,
  hadamard_matrix,
  rotate,
  round_stochastic,
  uniform_noise,
)

GRID = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
LEVELS = 2**16
EVERY_NOISE = (np.arange(LEVELS, dtype=np.float32) + 0.5) / LEVELS


@pytest.mark.parametrize("cell", range(7))
@pytest.mark.parametrize("part", [0.125, 0.3, 0.5, 0.9375])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_share_that_goes_up_is_the_distance_from_below(cell, part, sign):
  low, high = GRID[cell], GRID[cell + 1]
  x = np.float32(low + part * (high - low))
  share = (float(x) - low) / (high - low)
  rounded = sign * np.asarray(round_stochastic(jnp.full(LEVELS, sign * x), EVERY_NOISE))
  assert set(rounded.tolist()) == {low, high}
  assert abs(np.mean(rounded == high) - share) <= 1 / LEVELS


def test_numbers_of_the_grid_stay_and_larger_ones_saturate():
  noise = jnp.array([0.0, 0.5, 1 - 2.0**-17])[:, None]
  x = np.concatenate([GRID, -GRID, [6.1, 100, np.inf, -7]]).astype(np.float32)
  rounded = np.asarray(round_stochastic(x, jnp.broadcast_to(noise, (3, len(x)))))
  expected = np.clip(x, -6, 6)
  np.testing.assert_array_equal(rounded, np.broadcast_to(expected, rounded.shape))
  np.testing.assert_array_equal(np.signbit(rounded), np.broadcast_to(np.signbit(x), rounded.shape))
  assert float(round_stochastic(jnp.nan, jnp.float32(0.5))) == 6.0


def test_noise_is_uniform_and_independent_everywhere():
  both = np.stack(uniform_noise(jax.random.key(1), (256, 256)))
  assert both.min() > 0 and both.max() < 1
  for u in both:
    counts = np.histogram(u, 64, (0, 1))[0]
    assert np.sum((counts - 1024) ** 2 / 1024) < 63 + 4 * np.sqrt(2 * 63)  # chi squared
  tiles = both.reshape(2, 2, 128, 4, 64).transpose(0, 1, 3, 2, 4).reshape(16, -1)
  correlation = np.corrcoef(tiles) - np.eye(16)  # of the 128 x 64 tiles of both
  assert np.abs(correlation).max() < 5 / np.sqrt(128 * 64)
  for shift in (1, 2, 16):
    assert abs(np.corrcoef(both[0, :, shift:].ravel(), both[0, :, :-shift].ravel())[0, 1]) < 0.02


@pytest.mark.parametrize("spec", [PartitionSpec("a", "b"), PartitionSpec(("a", "b"))])
def test_noise_does_not_depend_on_the_mesh(spec):
  key, shape = jax.random.key(3), (16, 64)
  mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
  sharded = jax.jit(
    functools.partial(uniform_noise, shape=shape), out_shardings=NamedSharding(mesh, spec)
  )(key)
  for ours, alone in zip(sharded, uniform_noise(key, shape), strict=True):
    np.testing.assert_array_equal(ours, alone)


def test_static_4_with_stochastic_rounding_has_no_bias():
  draws = 4096
  x = jax.random.normal(jax.random.key(0), (16, 64), jnp.float32)
  spec = Spec("static_4", stochastic=True)

  @jax.jit
  def moments(keys):
    def add(total, key):
      y = fake_quantise(x, spec, key=key)
      return (total[0] + (y - x), total[1] + (y - x) ** 2), None

    return jax.lax.scan(add, (jnp.zeros_like(x), jnp.zeros_like(x)), keys)[0]

  first, second = (
    np.asarray(m, np.float64) / draws for m in moments(jax.random.split(jax.random.key(1), draws))
  )
  assert np.sqrt(np.mean(first**2) / np.mean(np.asarray(x) ** 2)) < 0.0028  # noise: 0.0023
  deviation = np.sqrt(np.maximum(second - first**2, 1e-12) / draws)
  z = (first / deviation)[second > 1e-9]
  assert np.abs(z).max() < 5 and abs(np.mean(z**2) - 1) < 0.15


def test_hadamard_matrix_is_orthonormal_with_the_fixed_signs():
  matrix = hadamard_matrix()
  np.testing.assert_array_equal(matrix @ matrix.T, np.eye(16))
  for i, j in np.ndindex(16, 16):
    parity = bin(i & j).count("1") % 2
    assert matrix[i, j] == (-1) ** parity * HADAMARD_SIGNS[i] / 4
  assert "".join("+" if s > 0 else "-" for s in HADAMARD_SIGNS) == "+++-+------+-+--"


def test_rotated_unit_vectors_are_rows_of_the_matrix():
  x = jnp.eye(48, dtype=jnp.bfloat16)
  y = np.asarray(jax.jit(rotate)(x).astype(jnp.float32))
  np.testing.assert_array_equal(y, np.kron(np.eye(3), hadamard_matrix()))


def test_rotating_both_operands_keeps_their_product():
  a, b = (jax.random.normal(jax.random.key(i), (8, 64), jnp.float32) for i in range(2))
  a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
  turned = [np.asarray(rotate(m), np.float64) for m in (a, b)]
  plain = [np.asarray(m, np.float64) for m in (a, b)]
  error = turned[0] @ turned[1].T - plain[0] @ plain[1].T
  size = np.linalg.norm(plain[0] @ plain[1].T)
  assert np.linalg.norm(error) < 4e-3 * size  # the rounding to bfloat16, twice


def test_rotation_takes_and_gives_bfloat16_whatever_it_is_fused_with():
  x = jax.random.normal(jax.random.key(0), (4, 32), jnp.float32)
  narrow = np.asarray(x.astype(jnp.bfloat16), np.float64).reshape(4, 2, 16)
  expected = (narrow @ hadamard_matrix().astype(np.float64)).astype(np.float32).reshape(4, 32)
  wide = jax.jit(lambda x: rotate(x).astype(jnp.float32))(x)
  np.testing.assert_array_equal(wide, jnp.asarray(expected).astype(jnp.bfloat16))


def test_rotation_needs_whole_blocks():
  with pytest.raises(ValueError, match="columns=24 must be a positive multiple of block=16"):
    rotate(jnp.zeros((2, 24)))
