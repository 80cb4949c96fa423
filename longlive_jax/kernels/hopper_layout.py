"""Order of a packed NVFP4 weight for the Hopper kernel: rearranged once at load, without loss.

At rest a byte holds two neighbouring columns and scales are row-major. The kernel works on tiles
of 64 columns, four blocks of 16. Its half-word `c` of a row, 16 bits, holds the code of column `c`
of each of the four blocks, so that one half-word needs all four scales of its tile and a shift by
a constant brings all half-words of a block to where bfloat16 has them: sign in bit 15, magnitude in
bits 8..6 (the exponent's lowest two bits and the mantissa's highest). Its bits, from the top:

    15   14   13   12   11 10 9   8 7 6   5 4 3   2 1 0
    s0   s2   s3   s1   m3        m0      m1      m2

A word is two half-words, the even column low: a GPU shifts 32 bits at once, but 16 only one by one.
Tiles come first, so that what a step reads lies together: 32 bytes a row, then the scales.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from longlive_jax.checks import check_at_least, check_divides, check_dtypes, check_shape
from longlive_jax.types import Array

BLOCK = 16  # columns that share a scale
TILE_K = 64  # columns of a tile
BLOCKS = TILE_K // BLOCK
WORDS = BLOCK // 2  # of a row of a tile
SIGN_AT = (15, 12, 14, 13)  # of block 0, 1, 2, 3
MAGNITUDE_AT = (6, 3, 0, 9)
BF16_SIGN_AT, BF16_MAGNITUDE_AT = 15, 6
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def repack(codes: Array, scales: Array) -> tuple[Array, Array]:
  """From the layout at rest to that of the kernel.

  Args:
    codes: uint8 `[..., N, K / 2]`, low nibble = even column.
    scales: float8_e4m3fn `[..., N, K / 16]`.

  Returns:
    (words int32 `[..., K / 64, N, 8]`, scales float8_e4m3fn `[..., K / 64, 4, N]`).

  Raises:
    ValueError: K is no multiple of 64, or the shapes do not fit.
  """
  check_dtypes(codes=(codes, "uint8"), scales=(scales, "float8_e4m3fn"))
  check_at_least("axes of codes", codes.ndim, 2)
  *lead, rows, half = codes.shape
  check_divides("columns", 2 * half, "columns of a tile", TILE_K)
  check_shape("scales", scales.shape, (*lead, rows, 2 * half // BLOCK))
  tiles = 2 * half // TILE_K
  nibbles = jnp.stack([codes & 15, codes >> 4], -1).astype(jnp.uint16)
  nibbles = nibbles.reshape(*lead, rows, tiles, BLOCKS, BLOCK)
  split = jnp.zeros((*lead, rows, tiles, BLOCK), jnp.uint16)
  for block in range(BLOCKS):
    code = nibbles[..., block, :]
    split |= ((code >> 3) << SIGN_AT[block]) | ((code & 7) << MAGNITUDE_AT[block])
  split = jnp.swapaxes(split, -2, -3)
  words = lax.bitcast_convert_type(split.reshape(*split.shape[:-1], WORDS, 2), jnp.int32)
  return words, jnp.moveaxis(scales.reshape(*lead, rows, tiles, BLOCKS), -3, -1)


def unrepack(words: Array, scales: Array) -> tuple[Array, Array]:
  """Inverse of `repack`."""
  *lead, tiles, rows, _ = words.shape
  bits = halves(jnp.swapaxes(words, -2, -3), jnp.uint16)
  codes = [
    (((bits >> sign) & 1) << 3) | ((bits >> magnitude) & 7)
    for sign, magnitude in zip(SIGN_AT, MAGNITUDE_AT, strict=True)
  ]
  nibbles = jnp.stack(codes, -2).astype(jnp.uint8).reshape(*lead, rows, tiles * TILE_K // 2, 2)
  packed = nibbles[..., 0] | (nibbles[..., 1] << 4)
  return packed, jnp.moveaxis(scales, -1, -3).reshape(*lead, rows, tiles * BLOCKS)


def halves(words: Array, dtype: jax.typing.DTypeLike) -> Array:
  """int32 `[..., n]` as 16-bit `[..., 2 n]`, the low half first."""
  return lax.bitcast_convert_type(words, dtype).reshape(*words.shape[:-1], -1)


def expand(words: Array, scales: Array) -> Array:
  """float32 `[N, K]` of `q * s`: the plain definition of what the kernel decodes."""
  tiles, rows, _ = words.shape
  packed, flat = unrepack(words, scales)
  nibbles = jnp.stack([packed & 15, packed >> 4], -1).reshape(rows, tiles * BLOCKS, BLOCK)
  magnitude = jnp.asarray(_E2M1, jnp.float32)[nibbles & 7]
  values = jnp.where(nibbles & 8, -magnitude, magnitude)
  return (values * flat.astype(jnp.float32)[..., None]).reshape(rows, tiles * TILE_K)


def decoded(words: jax.Array, block: int) -> jax.Array:
  """int32 bit patterns of one block's codes, sign and magnitude where bfloat16 has them.

  Only shifts and masks, so that it runs inside a kernel; a half reinterpreted as bfloat16 is
  `q * 2^-126`, where 0.5 is a subnormal number. What a shift takes over to the other half falls
  where no mask is set.
  """
  sign = _moved(words, BF16_SIGN_AT - SIGN_AT[block])
  magnitude = _moved(words, BF16_MAGNITUDE_AT - MAGNITUDE_AT[block])
  if SIGN_AT[block] - MAGNITUDE_AT[block] == BF16_SIGN_AT - BF16_MAGNITUDE_AT:
    return magnitude & in_both(SIGN_BIT | MAGNITUDE_BITS)
  return (sign & in_both(SIGN_BIT)) | (magnitude & in_both(MAGNITUDE_BITS))


SIGN_BIT = 1 << BF16_SIGN_AT
MAGNITUDE_BITS = 7 << BF16_MAGNITUDE_AT


def in_both(half: int) -> np.int32:
  """A word whose halves are both these 16 bits."""
  return np.uint32(half << 16 | half).view(np.int32)


def _moved(words: jax.Array, left: int) -> jax.Array:
  if left > 0:
    return lax.shift_left(words, jnp.int32(left))
  return lax.shift_right_logical(words, jnp.int32(-left)) if left < 0 else words
