"""Matrix product of two NVFP4 operands on Blackwell (10.x): `y = (q s)_x (q s)_w^T unit`.

The tensor core takes packed codes from shared memory and scales, one E4M3 for 16 elements, from
tensor memory, and sums in float32 there. Rows need not fill tiles: TMA reads zeros beyond the edge
and does not write there.

It cannot run elsewhere: nothing interprets scaled products. Without such a GPU only its lowering is
tested; the same product by XLA is `jax.nn.scaled_matmul`, and `block_scaled_reference` in jnp.

Source: spec/nvfp4.md sections 4.2 and 6; spec/jax.md section 3.1.
"""

import jax
import jax.numpy as jnp
from jax import lax

from longlive_jax.checks import check_divides, check_shape
from longlive_jax.kernels.blackwell_kernel import (
  BLOCK,
  COLUMNS,
  QUARTER,
  ROWS,
  TILE_K,
  Tuning,
  kernel_of,
)
from longlive_jax.types import Array

_TMA_ROWS = 8  # of a swizzled tile
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def scale_tiles(scales: Array) -> Array:
  """Scales float8_e4m3fn `[R, C]` -> `[R' / 128, C / 4, 32, 16]`, R' = R filled with zeros.

  The order of spec/nvfp4.md section 4.2 inside a tile; done once for a weight.

  Raises:
    ValueError: C is no multiple of 4.
  """
  rows, columns = scales.shape
  check_divides("columns", columns, "columns of a scale tile", COLUMNS)
  scales = jnp.pad(scales, ((0, -rows % ROWS), (0, 0)))
  split = scales.reshape(-1, ROWS // QUARTER, QUARTER, columns // COLUMNS, COLUMNS)
  return split.transpose(0, 3, 2, 1, 4).reshape(-1, columns // COLUMNS, QUARTER, BLOCK)


def as_fp4(codes: Array) -> Array:
  """uint8 codes `[R, K / 2]` as float4_e2m1fn `[R, K]`, the same bytes."""
  pairs = lax.bitcast_convert_type(codes, jnp.float4_e2m1fn)  # the low nibble first
  return pairs.reshape(codes.shape[0], -1)


def block_scaled_matmul(
  x: Array,
  x_scales: Array,
  w: Array,
  w_scales: Array,
  unit: Array,
  *,
  out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
  tuning: Tuning | None = None,
) -> Array:
  """`(q s)_x (q s)_w^T unit` on the FP4 units of a GPU of compute capability 10.

  Args:
    x: uint8 `[M, K / 2]`, codes, low nibble = even column; any M.
    x_scales: float8_e4m3fn `[ceil(M / 128), K / 64, 32, 16]`, see `scale_tiles`.
    w: uint8 `[N, K / 2]`.
    w_scales: float8_e4m3fn `[N / 128, K / 64, 32, 16]`.
    unit: float32 scalar.
    out_dtype: bfloat16 or float32.
    tuning: by default `Tuning()`.

  Returns:
    `[M, N]`.

  Raises:
    ValueError: shapes do not fit, N is no multiple of `tile_n` or K none of 256.
  """
  t = tuning or Tuning()
  m, n, k = x.shape[0], w.shape[0], 2 * w.shape[1]
  check_shape("x", x.shape, (None, k // 2))
  check_divides("N", n, "tile_n", t.tile_n)
  check_divides("K", k, "elements of a stage", TILE_K)
  tiles = k // BLOCK // COLUMNS, QUARTER, BLOCK
  check_shape("x_scales", x_scales.shape, (-(-m // ROWS), *tiles))
  check_shape("w_scales", w_scales.shape, (n // ROWS, *tiles))
  x = jnp.pad(x, ((0, -m % _TMA_ROWS), (0, 0)))
  call = kernel_of(t, x.shape[0], n, k, jnp.dtype(out_dtype))
  return call(as_fp4(x), x_scales, as_fp4(w), w_scales, unit.reshape(1))[:m]


def block_scaled_reference(
  x: Array,
  x_scales: Array,
  w: Array,
  w_scales: Array,
  unit: Array,
  *,
  out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
  tuning: Tuning | None = None,
) -> Array:
  """The same product in plain jnp: what `jax.nn.scaled_matmul` means, times `unit`."""
  del tuning
  operands = []
  for codes, tiles in ((x, x_scales), (w, w_scales)):
    split = tiles.reshape(*tiles.shape[:3], ROWS // QUARTER, COLUMNS)
    scales = split.transpose(0, 3, 2, 1, 4).reshape(tiles.shape[0] * ROWS, -1)[: codes.shape[0]]
    nibbles = jnp.stack([codes & 15, codes >> 4], -1).reshape(*scales.shape, BLOCK)
    magnitude = jnp.asarray(_E2M1, jnp.float32)[nibbles & 7]
    values = jnp.where(nibbles & 8, -magnitude, magnitude)
    free = values * scales.astype(jnp.float32)[..., None]
    operands.append(free.reshape(codes.shape[0], -1).astype(jnp.bfloat16))
  left, right = operands
  y = lax.dot_general(left, right, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
  return (y * unit).astype(out_dtype)
