"""A quantised array as a pytree: packed codes, block scales, and the largest magnitude.

    value = q * s * amax / C        q from `codes`, s from `scales`, C from `rule`

Static fields stay true for a slice along a leading axis and for a shard, so a QTensor goes
through `scan`, `vmap` and `shard_map`. That is why the number of filled columns is kept, not the
shape.

Source: spec/nvfp4.md section 4.
"""

import dataclasses
import functools

import jax.numpy as jnp
from jax.tree_util import register_dataclass

from longlive_jax.checks import check_choice, check_divides, check_shape
from longlive_jax.quant.formats import (
  BLOCK,
  TILE_COLUMNS,
  TILE_ROWS,
  pack,
  swizzle,
  unpack,
  unswizzle,
)
from longlive_jax.quant.rules import find_rule
from longlive_jax.types import Array

ROW_BLOCKS, SQUARE_BLOCKS = "1x16", "16x16"


@functools.partial(
  register_dataclass,
  data_fields=["codes", "scales", "amax"],
  meta_fields=["rule", "blocks", "padding"],
)
@dataclasses.dataclass(frozen=True)
class QTensor:
  """A quantised `[..., M, N]`.

  Attributes:
    codes: uint8 `[..., M, N' / 2]`, N' = N filled to whole blocks of 16; low nibble = even column.
    scales: float8_e4m3fn `[..., M, N' / 16]`, row-major; of 16x16 blocks `[..., M / 16, N' / 16]`,
      M / 16 rounded up.
    amax: float32, shape `[]` or that of some leading axes.
    rule: scale rule, gives C.
    blocks: "1x16", or "16x16" where 16 rows share a scale.
    padding: N' - N columns of zeros.
  """

  codes: Array
  scales: Array
  amax: Array
  rule: str
  blocks: str = ROW_BLOCKS
  padding: int = 0

  @property
  def shape(self) -> tuple[int, ...]:
    """`[..., M, N]`."""
    return (*self.codes.shape[:-1], 2 * self.codes.shape[-1] - self.padding)

  @property
  def row_scales(self) -> Array:
    """The scales as `[..., M, N' / 16]`, repeated over the rows of 16x16 blocks."""
    if self.blocks == ROW_BLOCKS:
      return self.scales
    return jnp.repeat(self.scales, BLOCK, -2)[..., : self.codes.shape[-2], :]

  @property
  def nbytes(self) -> int:
    """Bytes of the three arrays."""
    return self.codes.nbytes + self.scales.nbytes + self.amax.nbytes


def transposed(q: QTensor) -> QTensor:
  """The quantised transpose (last two axes) of a tensor with 16x16 blocks, without rounding.

  Raises:
    ValueError: blocks are 1x16, or rows do not fill whole blocks.
  """
  check_choice("blocks", q.blocks, [SQUARE_BLOCKS])
  rows, columns = q.shape[-2:]
  check_divides("rows", rows, "block", BLOCK)
  codes = jnp.swapaxes(unpack(q.codes), -1, -2)[..., :columns, :]
  return dataclasses.replace(q, codes=pack(codes), scales=jnp.swapaxes(q.scales, -1, -2), padding=0)


def to_tiles(q: QTensor) -> tuple[Array, Array, Array]:
  """For interchange: padded to whole 128 x 64 tiles, scales in the order of the tensor core.

  Returns:
    (codes uint8 `[..., M_p, N_p / 2]`, scales float8_e4m3fn `[..., M_p * N_p / 16]`, amax).
  """
  scales = q.row_scales
  rows, blocks = scales.shape[-2:]
  more = ((0, 0),) * (q.codes.ndim - 2) + ((0, -rows % TILE_ROWS),)
  missing = -blocks % TILE_COLUMNS
  codes = jnp.pad(q.codes, (*more, (0, missing * BLOCK // 2)))
  return codes, swizzle(jnp.pad(scales, (*more, (0, missing)))), q.amax


def from_tiles(
  codes: Array,
  scales: Array,
  amax: Array,
  *,
  rule: str,
  shape: tuple[int, int],
  blocks: str = ROW_BLOCKS,
) -> QTensor:
  """Inverse of `to_tiles`, for a matrix.

  Args:
    codes: uint8 `[M_p, N_p / 2]`.
    scales: float8_e4m3fn, or its bytes as uint8, `[M_p * N_p / 16]`.
    amax: float32, one number of any shape.
    rule: scale rule it was quantised with.
    shape: (M, N) without padding.
    blocks: "1x16" or "16x16".

  Raises:
    ValueError: shapes do not fit, an unknown rule, or scales that differ within a block.
  """
  find_rule(rule)
  check_choice("blocks", blocks, [ROW_BLOCKS, SQUARE_BLOCKS])
  rows, count = shape[0], -(-shape[1] // BLOCK)
  tile_rows = rows + -rows % TILE_ROWS
  tile_count = count + -count % TILE_COLUMNS
  check_shape("codes", codes.shape, (tile_rows, tile_count * BLOCK // 2))
  check_shape("scales", scales.shape, (tile_rows * tile_count,))
  scales = jnp.asarray(scales)
  if scales.dtype == jnp.uint8:
    scales = scales.view(jnp.float8_e4m3fn)
  scales = unswizzle(scales, tile_rows, tile_count)[:rows, :count]
  return QTensor(
    codes=jnp.asarray(codes)[:rows, : count * BLOCK // 2],
    scales=scales if blocks == ROW_BLOCKS else of_squares(scales),
    amax=jnp.asarray(amax, jnp.float32).reshape(()),
    rule=rule,
    blocks=blocks,
    padding=count * BLOCK - shape[1],
  )


def of_squares(scales: Array) -> Array:
  """Scales `[M, B]` that are the same in each 16 rows as `[M / 16, B]`.

  Raises:
    ValueError: they are not.
  """
  first = scales[::BLOCK]
  wide, repeated = (a.astype(jnp.float32) for a in (scales, jnp.repeat(first, BLOCK, 0)))
  if not jnp.array_equal(wide, repeated[: len(scales)], equal_nan=True):
    raise ValueError(f"scales differ within blocks of {SQUARE_BLOCKS}")
  return first
