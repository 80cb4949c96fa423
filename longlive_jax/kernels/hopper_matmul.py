"""Matrix product with a packed NVFP4 weight on Hopper: `y = x (q s)^T unit`.

A weight travels from memory to the SM in 4.5 bits an element and is decoded there, once a tile, to
bfloat16, which holds `q * s` exactly; `wgmma` sums in float32, and the unit multiplies the sum.

Where the result has fewer tiles than there are SMs, K is split too: `splits` partial results in
float32 are added afterwards. M need not fill tiles: TMA reads zeros beyond the edge and does not
write there. It counts in eights, so any other M is padded first, which copies x and the result.

Source: spec/nvfp4.md sections 6, 9.1, 9.4.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from longlive_jax.checks import (
  check_at_least,
  check_choice,
  check_divides,
  check_dtypes,
  check_shape,
)
from longlive_jax.kernels.hopper_kernel import kernel_of
from longlive_jax.kernels.hopper_layout import BLOCKS, TILE_K, WORDS, expand
from longlive_jax.kernels.hopper_tuning import TILE_N, Tuning, cdiv, choose_tuning
from longlive_jax.types import Array

_TMA_ROWS = 8  # of a swizzled tile


def packed_matmul(
  x: Array,
  words: Array,
  scales: Array,
  unit: Array,
  *,
  out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
  tuning: Tuning | None = None,
) -> Array:
  """`x (q s)^T unit` with float32 sums, on Hopper.

  Args:
    x: bfloat16 `[M, K]`, any M.
    words: int32 `[K / 64, N, 8]`, see `hopper_layout.repack`.
    scales: float8_e4m3fn `[K / 64, 4, N]`.
    unit: float32 scalar.
    out_dtype: bfloat16 or float32.
    tuning: by default `choose_tuning`.

  Returns:
    `[M, N]`.

  Raises:
    ValueError: shapes or dtypes do not fit, or 128 does not divide N.

  Numerics: products are exact; the sum over K has the order of the tensor core, and one more
    addition for each split.
  """
  check_dtypes(
    x=(x, "bfloat16"),
    words=(words, "int32"),
    scales=(scales, "float8_e4m3fn"),
    unit=(unit, "float32"),
  )
  check_shape("words", words.shape, (None, None, WORDS))
  tiles, n, _ = words.shape
  check_shape("scales", scales.shape, (tiles, BLOCKS, n))
  check_shape("x", x.shape, (None, tiles * TILE_K))
  check_shape("unit", unit.shape, ())
  check_choice("out_dtype", jnp.dtype(out_dtype).name, ["bfloat16", "float32"])
  m = x.shape[0]
  check_at_least("rows of x", m, 1)
  check_at_least("K / 64", tiles, 1)
  check_divides("N", n, "rows of a tile of the weight", TILE_N)
  tuning = tuning or choose_tuning(m, n, tiles * TILE_K)
  check_at_least("K / 64", tiles, tuning.splits)
  splits = cdiv(tiles, cdiv(tiles, tuning.splits))  # so that none is empty
  tuning = dataclasses.replace(tuning, splits=splits)
  part_dtype = jnp.dtype(jnp.float32 if splits > 1 else out_dtype)
  padded = jnp.pad(x, ((0, -m % _TMA_ROWS), (0, 0)))
  parts = kernel_of(tuning, padded.shape[0], n, tiles, part_dtype)(
    padded, words, scales, unit.reshape(1)
  )
  return (parts[0] if splits == 1 else parts.sum(0)).astype(out_dtype)[:m]


def packed_matmul_reference(
  x: Array,
  words: Array,
  scales: Array,
  unit: Array,
  *,
  out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
  tuning: Tuning | None = None,
) -> Array:
  """The same product in plain jnp."""
  del tuning
  w = expand(words, scales).astype(jnp.bfloat16)
  y = lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
  return (y * unit).astype(out_dtype)
