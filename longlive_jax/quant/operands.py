"""Operands of products in NVFP4: `q * s` in bfloat16, which holds it exactly, and one factor.

A long operand is quantised in pieces of its features, one after the other into the same array, so
that what the arithmetic needs on the way, several times the size of the operand in float32, is only
there for a piece. Blocks do not cross pieces, and all have the tensor's one amax: the numbers are
those of the whole, but for stochastic rounding, which draws for each piece.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.model.ops import contract
from longlive_jax.quant.formats import BLOCK
from longlive_jax.quant.nvfp4 import (
  Spec,
  dequantise,
  largest,
  over_devices,
  quantise,
  scale_free,
  unit_of,
)
from longlive_jax.quant.nvfp4 import prepared as turned
from longlive_jax.quant.qtensor import ROW_BLOCKS, SQUARE_BLOCKS, QTensor
from longlive_jax.quant.rules import find_rule
from longlive_jax.types import Array

PIECE = 2**27  # elements that are quantised at a time


class Operand(NamedTuple):
  """`values * unit`: bfloat16 `[..., M, K]`, the axis of the product last, and a float32 scalar."""

  values: Array
  unit: Array | float


def pieces_of(shape: tuple[int, ...]) -> int:
  """Into how many pieces the last axis of an array is cut: equal ones, of whole blocks."""
  blocks, rest = divmod(shape[-1], BLOCK)
  least = -(-math.prod(shape) // PIECE)
  if rest or least <= 1:
    return 1
  return next((n for n in range(least, blocks + 1) if blocks % n == 0), blocks)


def columns(x: Array | QTensor, start: Array | int, width: int) -> Array:
  """Columns of a matrix; of a packed one in bfloat16."""
  if not isinstance(x, QTensor):
    return jax.lax.dynamic_slice_in_dim(x, start, width, -1)
  codes = jax.lax.dynamic_slice_in_dim(x.codes, start // 2, width // 2, -1)
  scales = jax.lax.dynamic_slice_in_dim(x.scales, start // BLOCK, width // BLOCK, -1)
  return dequantise(dataclasses.replace(x, codes=codes, scales=scales), jnp.bfloat16)


def whole(x: Array | QTensor) -> Array:
  """All columns."""
  return dequantise(x, jnp.bfloat16) if isinstance(x, QTensor) else x


def in_place(make: Callable[[Array], Array], pieces: int, axis: int, after: Array) -> Array:
  """`make(piece number)` for all pieces, side by side along an axis, written into one array.

  That array, all of which is overwritten, is made when `after` is there: zeros alone would be there
  from the start of a program, and be kept for all calls.
  """
  form = jax.eval_shape(make, jax.ShapeDtypeStruct((), jnp.int32))
  width = form.shape[axis]
  shape = list(form.shape)
  shape[axis] = width * pieces

  def body(number: Array, out: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(out, make(number), number * width, axis)

  nothing, _ = jax.lax.optimization_barrier((jnp.zeros((), form.dtype), after))
  start = jnp.broadcast_to(nothing, shape)
  return jax.lax.fori_loop(0, pieces, body, start)


def operand(
  x: Array | QTensor, spec: Spec | None, key: Array | None = None, flip: bool = False
) -> Operand:
  """Quantises matrices, or their transposes with `flip`, along the last axis of the result.

  Args:
    x: `[..., M, N]`; one that is packed is quantised again.
    spec: how; None takes it as it is, in bfloat16.
    key: for stochastic rounding.
    flip: transpose the last two axes.
  """
  if spec is None:
    values = whole(x)
    return Operand((jnp.swapaxes(values, -1, -2) if flip else values).astype(jnp.bfloat16), 1.0)
  spec, pieces = dataclasses.replace(spec, transpose=flip), pieces_of(x.shape)
  if pieces == 1:
    return from_packed(quantise(whole(x), spec, key=key))
  width = x.shape[-1] // pieces

  def largest_of(number: Array, so_far: Array) -> Array:
    return jnp.maximum(so_far, largest(turned(columns(x, number * width, width), spec)))

  amax = over_devices(jax.lax.fori_loop(0, pieces, largest_of, jnp.zeros(())), spec)

  def make(number: Array) -> Array:
    own = None if key is None else jax.random.fold_in(key, number)
    return scale_free(quantise(columns(x, number * width, width), spec, amax=amax, key=own))

  unit = amax * np.float32(1 / find_rule(spec.rule).c)
  return Operand(in_place(make, pieces, -2 if flip else -1, amax), unit)


def pack(x: Array, spec: Spec) -> QTensor:
  """`quantise(x, spec)` in pieces."""
  pieces = pieces_of(x.shape)
  if pieces == 1:
    return quantise(x, spec)
  width, amax = x.shape[-1] // pieces, over_devices(largest(x), spec)

  def part(number: Array) -> QTensor:
    return quantise(columns(x, number * width, width), spec, amax=amax)

  codes = in_place(lambda number: part(number).codes, pieces, -1, amax)
  scales = in_place(lambda number: part(number).scales, pieces, -1, amax)
  return QTensor(codes, scales, amax, spec.rule, SQUARE_BLOCKS if spec.two_d else ROW_BLOCKS)


def from_packed(q: QTensor) -> Operand:
  """The operand of a quantised matrix."""
  return Operand(scale_free(q), unit_of(q))


def product(
  a: Operand, b: Operand, bias: Array | None = None, dtype: jax.typing.DTypeLike = jnp.float32
) -> Array:
  """`dtype` `[..., M, N]` of `a [..., M, K]`, `b [N, K]` and a bias `[N]`: float32 until the end.

  What is narrower than float32 is made in pieces, so that not all of it is there in float32.
  """
  unit = a.unit * b.unit

  def affine(rows: Array, offset: Array | None) -> Array:
    y = contract(a.values, rows, (a.values.ndim - 1, 1)) * unit
    return (y if offset is None else y + offset).astype(dtype)

  shape = (*a.values.shape[:-1], b.values.shape[0])
  pieces = 1 if dtype == jnp.float32 else pieces_of(shape)
  if pieces == 1:
    return affine(b.values, bias)
  width = shape[-1] // pieces

  def make(number: Array) -> Array:
    cut = functools.partial(
      jax.lax.dynamic_slice_in_dim, start_index=number * width, slice_size=width
    )
    return affine(cut(b.values), None if bias is None else cut(bias))

  return in_place(make, pieces, -1, a.values)


def product_over_rows(a: Operand, b: Operand) -> Array:
  """float32 `[M, N]` of `a [..., M, K]` and `b [..., N, K]`, summed over their leading axes too."""
  axes = (*range(a.values.ndim - 2), a.values.ndim - 1)
  return contract(a.values, b.values, (axes, axes)) * (a.unit * b.unit)
