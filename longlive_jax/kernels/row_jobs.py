"""What happens to rows between matrix products, each in one pass: norms, GELU, rows to FP8.

Arithmetic is float32; what the network rounds to bfloat16 is rounded here too. Results differ from
those of `jnp` by roundings: exponentials and reciprocals are the device's fast ones.

Rows of FP8 have a scale each, the largest magnitude / 448.
"""

import dataclasses
import functools
import math
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass

from longlive_jax.kernels import rows as kernel_rows
from longlive_jax.kernels.rows import Parts, Row, RowsKernel, Tools, Tuning, each, fitting

E4M3_MAX = 448.0
GELU, NORM, ADD_NORM, RMS, QUANTISE = (
  Tuning(4, 1),
  Tuning(4, 2, 2),
  Tuning(3, 1, 2),
  Tuning(4, 2),
  Tuning(4, 2, 3),
)
BF16, FP8, F32 = jnp.bfloat16, jnp.float8_e4m3fn, jnp.float32


@functools.partial(
  register_dataclass, data_fields=["values", "bias", "rows", "columns"], meta_fields=["part"]
)
@dataclasses.dataclass(frozen=True)
class Product:
  """A matrix product that is not finished: `values * rows * columns + bias`.

  Attributes:
    values: bfloat16 `[..., N]`, T rows; of n products in one `[..., n N]`, side by side.
    bias: float32 `[N]`, or None.
    rows: float32 `[T]`, scales of rows; None with `columns`.
    columns: float32 `[N]`, scales of columns.
    part: n, and which of them this is; the others are not used.
  """

  values: jax.Array
  bias: jax.Array | None = None
  rows: jax.Array | None = None
  columns: jax.Array | None = None
  part: tuple[int, int] = (1, 0)

  @property
  def shape(self) -> tuple[int, ...]:
    """`[..., N]`."""
    return *self.values.shape[:-1], self.values.shape[-1] // self.part[0]

  def whole(self) -> jax.Array:
    """The product as an array."""
    count, index = self.part
    y = self.values.reshape(*self.shape[:-1], count, -1)[..., index, :].astype(F32)
    if self.rows is not None and self.columns is not None:
      y = y * self.rows.reshape(*y.shape[:-1], 1) * self.columns
    return (y if self.bias is None else y + self.bias).astype(self.values.dtype)

  @property
  def flat(self) -> jax.Array:
    """Values `[n T, N]`, of which rows `index + n t` are its own."""
    return self.values.reshape(-1, self.shape[-1])

  @property
  def lacks(self) -> tuple[bool, bool]:
    """Whether its scales, and its bias, are still to come."""
    return self.rows is not None, self.bias is not None

  @property
  def scalars(self) -> tuple[jax.Array, ...]:
    """What a kernel is given for each row."""
    return () if self.rows is None else (self.rows,)

  @property
  def vectors(self) -> tuple[jax.Array, ...]:
    """What a kernel is given for each column."""
    return tuple(each for each in (self.columns, self.bias) if each is not None)

  def finished(self, part: jax.Array, scalars: Sequence[Any], vectors: Sequence[Any]) -> jax.Array:
    """Inside a kernel: a part of a row, rounded as a whole product is; parts of `vectors`."""
    if self.rows is not None:
      part = part * scalars[0] * vectors[0]
    if self.bias is not None:
      part = part + vectors[-1]
    return part.astype(BF16).astype(F32)


def _run(
  name: tuple[Hashable, ...],
  job: tuple[Any, Any],
  tuning: Tuning,
  rows: Sequence[jax.Array],
  scalars: Sequence[jax.Array],
  columns: Sequence[jax.Array],
  outs: Sequence[jax.ShapeDtypeStruct],
  groups: int = 1,
  place: Sequence[jax.Array] = (),
  part: tuple[int, int] = (1, 0),
) -> tuple[jax.Array, ...] | None:
  """Results, or None where shared memory is too small; `name` is all that the job depends on."""
  row_bytes = sum(x.shape[-1] * x.dtype.itemsize for x in rows)
  column_bytes = sum(x.shape[-1] * x.dtype.itemsize for x in columns)
  found = fitting(tuning, row_bytes, column_bytes)
  if found is None:
    found = fitting(dataclasses.replace(tuning, blocks=1, buffers=1), row_bytes, column_bytes)
  if found is None or (place and not kernel_rows.INLINE):
    return None
  return RowsKernel(name, *job, groups, found, part)(rows, scalars, columns, outs, place)


def _outputs(x: jax.Array, quantise: bool) -> list[jax.ShapeDtypeStruct]:
  if not quantise:
    return [jax.ShapeDtypeStruct(x.shape, BF16)]
  return [jax.ShapeDtypeStruct(x.shape, FP8), jax.ShapeDtypeStruct(x.shape[:1], F32)]


def _result(tools: Tools, row: Parts, quantise: bool) -> tuple[Any, ...]:
  """A row of bfloat16 parts as it leaves: as it is, or in FP8 with its scale."""
  if not quantise:
    return (row,)
  largest = tools.largest(each(jnp.abs, row))
  scale = jnp.where(largest > 0, largest, 1.0) / E4M3_MAX
  inverse = 1.0 / scale
  return each(lambda a: (a.astype(F32) * inverse).astype(FP8), row), scale


def quantise_rows(x: jax.Array) -> tuple[jax.Array, ...] | None:
  """FP8 rows and scales `[T]` of bfloat16 `[T, N]`."""

  def read(tools: Tools, rows: Sequence[Row], scalars: Any, columns: Any) -> Parts:
    return each(lambda a: a.astype(BF16), rows[0])

  def finish(tools: Tools, row: Parts, scalars: Any, columns: Any) -> tuple[Any, ...]:
    return _result(tools, row, True)

  return _run(("quantise",), (read, finish), QUANTISE, (x,), (), (), _outputs(x, True))


def gelu_rows(y: Product) -> tuple[jax.Array, ...] | None:
  """FP8 rows and scales of GELU (tanh approximation) of a product `[T, N]`."""
  k = -math.sqrt(8 / math.pi) * math.log2(math.e)

  def read(tools: Tools, rows: Sequence[Row], scalars: Any, columns: Sequence[Row]) -> Parts:
    def part(a: jax.Array, *vectors: jax.Array) -> jax.Array:
      a = y.finished(a, scalars, vectors)
      turn = jnp.exp2(a * (k + (k * 0.044715) * (a * a)))
      return (a * tools.reciprocal(1.0 + turn)).astype(BF16)

    return each(part, rows[0], *columns)

  def finish(tools: Tools, row: Parts, scalars: Any, columns: Any) -> tuple[Any, ...]:
    return _result(tools, row, True)

  x, name = y.flat, ("gelu", y.lacks)
  return _run(name, (read, finish), GELU, (x,), y.scalars, y.vectors, _outputs(x, True))


def _normalised(tools: Tools, row: Parts, factor: Row, shift: Row, eps: float) -> Parts:
  """bfloat16 parts of LayerNorm(x) * factor + shift, of float32 ones."""
  size = sum(part.shape[0] for part in row)
  mean = tools.sum(row) * (1.0 / size)
  centred = each(lambda a: a - mean, row)
  square = tools.sum(each(lambda a: a * a, centred)) * (1.0 / size)
  turn = jax.lax.rsqrt(square + eps)
  return each(lambda a, f, s: (a * turn * f + s).astype(BF16), centred, factor, shift)


def norm_rows(
  x: jax.Array, factor: jax.Array, shift: jax.Array, eps: float, quantise: bool
) -> tuple[jax.Array, ...] | None:
  """`LayerNorm(x) * factor + shift` of bfloat16 `[T, N]`.

  Args:
    x: rows.
    factor, shift: float32 `[groups, N]`, of T / groups rows each.
    eps: of the norm.
    quantise: FP8 rows and scales, else bfloat16 rows.
  """

  def read(tools: Tools, rows: Sequence[Row], scalars: Any, columns: Any) -> Parts:
    return each(lambda a: a, rows[0])

  def finish(tools: Tools, row: Parts, scalars: Any, columns: Sequence[Row]) -> tuple[Any, ...]:
    return _result(tools, _normalised(tools, row, columns[0], columns[1], eps), quantise)

  name, outs = ("norm", eps, quantise), _outputs(x, quantise)
  return _run(name, (read, finish), NORM, (x,), (), (factor, shift), outs, factor.shape[0])


def add_norm_rows(
  x: jax.Array,
  y: Product,
  gate: jax.Array | None,
  factor: jax.Array,
  shift: jax.Array,
  eps: float,
  quantise: bool,
) -> tuple[jax.Array, ...] | None:
  """x + y * gate in bfloat16, and its norm.

  Args:
    x: bfloat16 `[T, N]`.
    y: product of the same size.
    gate: float32 `[groups, N]`; None = 1.
    factor, shift, eps, quantise: as for `norm_rows`; `[1, N]` serves all groups.

  Returns:
    The sum, then what `norm_rows` returns.
  """
  gates = () if gate is None else (gate,)
  groups = max(each.shape[0] for each in (factor, *gates))
  shared = tuple(a[0] if a.shape[0] == 1 else a for a in (*gates, factor, shift))
  first = len(y.vectors)

  def read(tools: Tools, rows: Sequence[Row], scalars: Any, columns: Sequence[Row]) -> Parts:
    def part(t: jax.Array, a: jax.Array, *vectors: jax.Array) -> jax.Array:
      t = y.finished(t, scalars, vectors[:first])
      return (a + (t if gate is None else t * vectors[first])).astype(BF16)

    return each(part, *rows, *columns[: first + len(gates)])

  def finish(tools: Tools, row: Parts, scalars: Any, columns: Sequence[Row]) -> tuple[Any, ...]:
    wide = each(lambda a: a.astype(F32), row)
    normed = _normalised(tools, wide, columns[-2], columns[-1], eps)
    return row, *_result(tools, normed, quantise)

  outs = [jax.ShapeDtypeStruct(x.shape, BF16), *_outputs(x, quantise)]
  rows, columns = (y.flat, x), (*y.vectors, *shared)
  name = "add and norm", y.lacks, gate is None, eps, quantise
  return _run(name, (read, finish), ADD_NORM, rows, y.scalars, columns, outs, groups)


def rms_rows(
  y: Product,
  weight: jax.Array,
  eps: float,
  turn: tuple[jax.Array, jax.Array] | None = None,
  place: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, ...] | None:
  """bfloat16 `y / rms(y) * weight` of a product `[T, N]`, perhaps rotated.

  Args:
    y: the product.
    weight: float32 `[N]`.
    eps: of the norm.
    turn: cosines and sines, float32 `[T, D / 2]`, of heads of D elements; D divides `PART`.
    place: `[R, N]` in bfloat16 or FP8, of which T rows from `[1]` on are overwritten; it is
      returned. What FP8 cannot hold becomes the largest number that it can.
  """
  finishes = len(y.vectors)
  dtype = BF16 if place is None else place[0].dtype

  # angles are read late, so all is done in `read`: they leave with their row
  def read(tools: Tools, rows: Sequence[Row], scalars: Any, columns: Sequence[Row]) -> Parts:
    row = each(lambda a, *v: y.finished(a, scalars, v), rows[0], *columns[:finishes])
    size = sum(part.shape[0] for part in row)
    square = tools.sum(each(lambda a: a * a, row)) * (1.0 / size)
    factor = jax.lax.rsqrt(square + eps)

    def part(a: jax.Array, w: jax.Array) -> jax.Array:
      normal = (a * factor * w).astype(BF16)
      if turn is not None:
        normal = tools.rotated(normal.astype(F32), rows[1], rows[2]).astype(BF16)
      if dtype == BF16:
        return normal
      return jnp.clip(normal.astype(F32), -E4M3_MAX, E4M3_MAX).astype(FP8)

    return each(part, row, columns[-1])

  def finish(tools: Tools, row: Parts, scalars: Any, columns: Any) -> tuple[Any, ...]:
    return (row,)

  rows, columns = (y.flat, *(turn or ())), (*y.vectors, weight)
  count = y.flat.shape[0] // y.part[0]
  shape = (count, y.shape[-1]) if place is None else place[0].shape
  name, outs = ("rms", y.lacks, eps, turn is not None), [jax.ShapeDtypeStruct(shape, dtype)]
  more = {"place": place or (), "part": y.part}
  return _run(name, (read, finish), RMS, rows, y.scalars, columns, outs, **more)
