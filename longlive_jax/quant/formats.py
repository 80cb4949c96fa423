"""The two number formats of NVFP4, their packing, and the order in which hardware wants scales.

E2M1, 4 bits `s e e m`, has the magnitudes 0, 0.5, 1, 1.5, 2, 3, 4, 6 as codes 0..7; bit 3 is the
sign. E4M3 (`float8_e4m3fn`), 8 bits, has no infinity and ends at 448; it holds block scales.

Source: spec/nvfp4.md sections 1.1, 1.2, 1.4, 4.1 and 4.2.
"""

import functools

import jax
import jax.numpy as jnp

from longlive_jax.checks import check_divides
from longlive_jax.types import Array

BLOCK = 16  # elements that share a scale
E2M1_MAX = 6.0
E4M3_MAX = 448.0
E4M3_TINY = 2.0**-6  # smallest normal number
E4M3_STEP = 2.0**-9  # between the numbers below it
SIGN = 8
TILE_ROWS, TILE_COLUMNS = 128, 4  # of the scale matrix
_QUARTER = 32  # rows of a tile that are contiguous
# code = how many of these are passed; a tie goes to the even code
_PASSED = ((0.25, False), (0.75, True), (1.25, False), (1.75, True))
_PASSED += ((2.5, False), (3.5, True), (5.0, False))


def e2m1_encode(x: Array) -> Array:
  """Nearest E2M1 code, ties to the even code, saturating.

  Args:
    x: float32, any shape.

  Returns:
    uint8 codes 0..15. The sign of zero is kept (-0.0 is code 8); NaN becomes code 7.
  """
  magnitude = jnp.abs(x)
  passed = [
    ~(magnitude < threshold if tie_passes else magnitude <= threshold)
    for threshold, tie_passes in _PASSED
  ]
  code = functools.reduce(jnp.add, [each.astype(jnp.uint8) for each in passed])
  negative = jnp.signbit(x) & ~jnp.isnan(x)
  return code | negative.astype(jnp.uint8) * SIGN


def e2m1_decode(codes: Array) -> Array:
  """float32 values of uint8 codes 0..15."""
  wide = codes.astype(jnp.uint32)
  magnitude = wide & 7
  bits = (magnitude << 22) + (126 << 23)  # exponent and mantissa are in place, but for 0 and 0.5
  bits = jnp.where(magnitude < 2, magnitude * (126 << 23), bits)
  return jax.lax.bitcast_convert_type(bits | ((wide & SIGN) << 28), jnp.float32)


def e4m3_round(x: Array) -> Array:
  """Nearest E4M3 number as float32, for x >= 0; above 448 becomes 448, NaN stays.

  `x.astype(float8_e4m3fn)` gives NaN above 464, and compilers may drop a conversion forth and
  back; this is arithmetic that they keep.
  """
  x = jnp.minimum(x, E4M3_MAX)
  small = jnp.round(x * (1 / E4M3_STEP)) * E4M3_STEP
  return jnp.where(x < E4M3_TINY, small, jax.lax.reduce_precision(x, 8, 3))


def e4m3_encode(x: Array) -> Array:
  """`e4m3_round` as float8_e4m3fn."""
  return e4m3_round(x).astype(jnp.float8_e4m3fn)


def pack(codes: Array) -> Array:
  """uint8 codes `[..., N]` -> bytes `[..., N / 2]`; the low nibble is the even column."""
  check_divides("columns", codes.shape[-1], "codes in a byte", 2)
  pairs = codes.reshape(*codes.shape[:-1], -1, 2)
  return pairs[..., 0] | (pairs[..., 1] << 4)


def unpack(packed: Array) -> Array:
  """Inverse of `pack`."""
  codes = jnp.stack([packed & 15, packed >> 4], -1)
  return codes.reshape(*packed.shape[:-1], -1)


def swizzle(scales: Array) -> Array:
  """Scales `[..., R, C]` -> `[..., R * C]` in the order of the tensor core's scale tiles.

  A tile is 128 rows by 4 columns; in it the order is (row mod 32, row div 32, column). Tiles are
  row-major. For interchange only: at rest scales are row-major.

  Raises:
    ValueError: R is no multiple of 128 or C none of 4.
  """
  *lead, rows, columns = scales.shape
  check_divides("rows", rows, "rows of a scale tile", TILE_ROWS)
  check_divides("columns", columns, "columns of a scale tile", TILE_COLUMNS)
  quarters = TILE_ROWS // _QUARTER
  split = (rows // TILE_ROWS, quarters, _QUARTER, columns // TILE_COLUMNS, TILE_COLUMNS)
  tiles = jnp.moveaxis(scales.reshape(*lead, *split), (-2, -3, -4), (-4, -3, -2))
  return tiles.reshape(*lead, rows * columns)


def unswizzle(flat: Array, rows: int, columns: int) -> Array:
  """Inverse of `swizzle`; errors as there."""
  check_divides("rows", rows, "rows of a scale tile", TILE_ROWS)
  check_divides("columns", columns, "columns of a scale tile", TILE_COLUMNS)
  quarters = TILE_ROWS // _QUARTER
  split = (rows // TILE_ROWS, columns // TILE_COLUMNS, _QUARTER, quarters, TILE_COLUMNS)
  tiles = jnp.moveaxis(flat.reshape(*flat.shape[:-1], *split), (-4, -3, -2), (-2, -3, -4))
  return tiles.reshape(*flat.shape[:-1], rows, columns)
