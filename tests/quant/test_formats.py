"""E2M1 and E4M3 against tables and ml_dtypes; packing; the order of scale tiles."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from longlive_jax.quant import formats
from tests.quant.naive import nearest_code

TIES = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, 0.0], np.float32)


def neighbours(x: np.ndarray, most: int) -> np.ndarray:
  """Numbers and those up to `most` ulp away."""
  x = np.asarray(x, np.float32)
  found, up, down = [x], x, x
  for _ in range(most):
    up, down = np.nextafter(up, np.float32(np.inf)), np.nextafter(down, np.float32(-np.inf))
    found += [up, down]
  return np.concatenate(found)


def test_the_sixteen_codes_have_the_values_of_the_table():
  values = formats.e2m1_decode(jnp.arange(16, dtype=jnp.uint8))
  table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
  np.testing.assert_array_equal(values, np.concatenate([table, -table]))
  assert np.signbit(values[8]) and values.dtype == jnp.float32
  np.testing.assert_array_equal(formats.e2m1_encode(values), np.arange(16))


@pytest.mark.parametrize("sign", [1, -1])
def test_e2m1_rounds_to_nearest_and_ties_to_even(sign):
  x = sign * neighbours(TIES, 3)
  expected = [nearest_code(v) for v in x]
  np.testing.assert_array_equal(jax.jit(formats.e2m1_encode)(x), expected)


def test_e2m1_agrees_with_ml_dtypes_on_random_numbers():
  x = np.random.default_rng(0).normal(0, 3, 100_000).astype(np.float32)
  expected = x.astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
  np.testing.assert_array_equal(jax.jit(formats.e2m1_encode)(x), expected)


def test_e2m1_saturates_keeps_signs_of_zero_and_makes_six_of_nan():
  x = np.array([6.1, 1e30, np.inf, -7, -np.inf, 0.0, -0.0, -1e-30, np.nan, -np.nan], np.float32)
  codes = np.asarray(formats.e2m1_encode(x))
  np.testing.assert_array_equal(codes, [7, 7, 7, 15, 15, 0, 8, 8, 7, 7])


def test_every_e4m3_number_survives():
  numbers = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
  assert numbers[-1] == formats.E4M3_MAX and numbers[1] == formats.E4M3_STEP
  np.testing.assert_array_equal(jax.jit(formats.e4m3_round)(numbers), numbers)
  np.testing.assert_array_equal(formats.e4m3_encode(numbers).view(np.uint8), np.arange(127))


def test_e4m3_rounds_every_midpoint_to_even():
  numbers = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
  middles = (numbers[1:] + numbers[:-1]) / 2
  x = np.maximum(neighbours(middles, 2), 0)
  expected = x.astype(ml_dtypes.float8_e4m3fn)
  np.testing.assert_array_equal(jax.jit(formats.e4m3_encode)(x), expected)
  np.testing.assert_array_equal(jax.jit(formats.e4m3_round)(middles[:2]), [0.0, 2 * 2.0**-9])


def test_e4m3_agrees_with_ml_dtypes_on_random_numbers():
  x = np.exp(np.random.default_rng(0).uniform(-9, 6.1, 100_000)).astype(np.float32)
  expected = x.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
  np.testing.assert_array_equal(jax.jit(formats.e4m3_round)(x), expected)


def test_e4m3_saturates_and_keeps_nan():
  x = jnp.array([448.0, 464.0, 465.0, 1e30, jnp.inf, jnp.nan])
  np.testing.assert_array_equal(formats.e4m3_encode(x).view(jnp.uint8), [126] * 5 + [127])


def test_the_low_nibble_is_the_even_column():
  codes = jnp.array([[1, 2, 15, 0]], jnp.uint8)
  packed = formats.pack(codes)
  np.testing.assert_array_equal(packed, [[0x21, 0x0F]])
  np.testing.assert_array_equal(formats.unpack(packed), codes)
  with pytest.raises(ValueError, match="columns=3 must be a positive multiple of"):
    formats.pack(jnp.zeros((2, 3), jnp.uint8))


def test_every_byte_survives_unpacking():
  bytes_ = jnp.arange(256, dtype=jnp.uint8).reshape(2, 4, 32)
  np.testing.assert_array_equal(formats.pack(formats.unpack(bytes_)), bytes_)


def test_swizzled_scales_are_where_the_formula_says():
  rows, columns = 256, 12
  scales = np.arange(2 * rows * columns, dtype=np.int32).reshape(2, rows, columns)
  flat = formats.swizzle(jnp.asarray(scales))
  assert flat.shape == (2, rows * columns)
  where = np.zeros((rows, columns), int)
  for r, c in np.ndindex(rows, columns):
    tile = (r // 128) * (columns // 4) + c // 4
    at = tile * 512 + (r % 32) * 16 + (r % 128) // 32 * 4 + c % 4
    where[r, c] = at
  np.testing.assert_array_equal(np.asarray(flat)[:, where], scales)
  np.testing.assert_array_equal(formats.unswizzle(flat, rows, columns), scales)


def test_scales_that_fill_no_tiles_are_refused():
  with pytest.raises(ValueError, match="rows=100 .* use 128 or 256"):
    formats.swizzle(jnp.zeros((100, 4)))
  with pytest.raises(ValueError, match="columns=6 .* use 4 or 8"):
    formats.unswizzle(jnp.zeros(128 * 6), 128, 6)
