"""From a packed tile of a weight to bfloat16, inside the Hopper kernel.

Decoding is one product for two elements after the masks of `hopper_layout`: the pattern
`q * 2^-126` times `s * 2^118`. The result `q * s * 2^-8` is exact, and 2^8 goes into the unit. It
reads 1/2 as a subnormal bfloat16, which NVIDIA GPUs honour. Where subnormals are flushed (the
interpreter on a CPU) `subnormals=False` sets a higher exponent instead: then codes 0 and 1 of
magnitude read as 1/2 and 3/4 of their unit, and `min(v, 2 v - 1)` makes them 0 and 1/2.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import vector

from longlive_jax.kernels.hopper_layout import (
  BLOCK,
  BLOCKS,
  MAGNITUDE_BITS,
  SIGN_BIT,
  decoded,
  halves,
  in_both,
)
from longlive_jax.kernels.hopper_tuning import TILE_N

_SUBNORMAL_SCALE, _SUBNORMAL_UNIT = 2.0**118, 2.0**8
_NORMAL_PATTERN, _QUARTER, _NORMAL_UNIT = 0x3E00, 0.25, 4.0  # 2^-3; below it is q / 4


def _row_a_thread(width: int) -> Any:
  tiling = plgpu.Tiling(((TILE_N, width), (32, width)))
  return plgpu.Layout.TILED(tiling, warp_dims=(-4,), lane_dims=(-2,), vector_dim=-1)


_HALVES, _WORDS = _row_a_thread(8), _row_a_thread(4)  # 16 bytes a vector


def factor(subnormals: bool) -> float:
  """What products with a decoded tile are to be multiplied by."""
  return _SUBNORMAL_UNIT if subnormals else _NORMAL_UNIT


@plgpu.inline_mgpu(
  arg_types=(_WORDS,),
  return_type=plgpu.ShapeDtypeStruct((TILE_N, BLOCK), jnp.bfloat16, layout=_HALVES),
)
def _as_bfloat16(ctx: Any, words: Any) -> Any:
  """int32 `[128, 8]` as bfloat16 `[128, 16]` in the same registers; Pallas has no such cast."""
  del ctx
  pairs = ir.VectorType.get((8,), ir.BF16Type.get())
  registers = [vector.bitcast(pairs, each) for each in words.registers.flat]
  registers = np.asarray(registers, object).reshape(words.registers.shape)
  return mgpu.FragmentedArray(_registers=registers, _layout=_HALVES.to_mgpu(), _is_signed=None)


def _bfloat16(patterns: jax.Array, scales: jax.Array, subnormals: bool) -> jax.Array:
  """`q s`, times 2^-8 or 1/4, of the patterns of a block, `[N, 8]`, and its scales `[N]`."""
  scales = scales.astype(jnp.float16).astype(jnp.float32)
  if subnormals:
    q = _as_bfloat16(patterns)
    scales = scales * jnp.float32(_SUBNORMAL_SCALE)
  else:
    normal = (patterns & in_both(MAGNITUDE_BITS)) | in_both(_NORMAL_PATTERN)
    v = halves(normal, jnp.bfloat16)  # 0 and 1/2 appear as 1/2 and 3/4
    q = lax.min(v, v + v - jnp.bfloat16(_QUARTER))
    signs = halves(patterns & in_both(SIGN_BIT), jnp.int16)
    q = lax.bitcast_convert_type(lax.bitcast_convert_type(q, jnp.int16) | signs, jnp.bfloat16)
  return q * lax.broadcast_in_dim(scales.astype(jnp.bfloat16), q.shape, (0,))


def decoded_tile(words_ref: Any, scales_ref: Any, subnormals: bool) -> jax.Array:
  """A tile of the weight as bfloat16 `[128, 64]`, in registers; times `1 / factor(subnormals)`."""
  words = plgpu.load(words_ref, layout=_WORDS)
  blocks = []
  for block in range(BLOCKS):
    scale = scales_ref.at[block]
    scale = plgpu.load(scale, layout=_HALVES.reduce(1), optimized=False)
    blocks.append(_bfloat16(decoded(words, block), scale, subnormals))
  return lax.concatenate(blocks, 1)
