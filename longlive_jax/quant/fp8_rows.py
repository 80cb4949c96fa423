"""What happens between FP8 products, in one pass each: rows come out of it quantised."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from longlive_jax.kernels.row_jobs import Product, gelu_rows
from longlive_jax.kernels.row_jobs import quantise_rows as kernel_quantise_rows
from longlive_jax.kernels.rows import takes
from longlive_jax.model.between import OnePass, Paths, apart, flat, opened
from longlive_jax.model.ops import Ops, contract
from longlive_jax.quant.fp8 import Rows, quantise_rows, quantise_weight
from longlive_jax.types import Array


class Fp8OnePass(OnePass):
  """`OnePass` where the linear layers of some paths multiply in FP8.

  Args:
    chosen: their paths.
  """

  def __init__(self, chosen: frozenset[str]):
    self.chosen = chosen

  def quantises(self, paths: Paths) -> bool:
    return self.chosen.issuperset(paths)

  def product(self, ops: Ops, x: Any, w: Any, bias: Array | None, *, path: str) -> Array | Product:
    if path not in self.chosen and not isinstance(w, Rows):
      return super().product(ops, x, w, bias, path=path)
    right = w if isinstance(w, Rows) else quantise_weight(w)
    left = x if isinstance(x, Rows) else quantise_rows(x)
    axis = left.values.ndim - 1
    operands = apart(left.values, right.values)
    total = contract(*operands, (axis, 1), jnp.bfloat16)
    return Product(total, bias, left.scales.reshape(-1), right.scales[:, 0])

  def packed(self, ops: Ops, found: Sequence[Array], shape: tuple[int, ...], paths: Paths) -> Any:
    if len(found) == 1:
      return super().packed(ops, found, shape, paths)
    return Rows(found[0].reshape(shape), found[1].reshape(*shape[:-1], 1))

  def prepare(self, ops: Ops, x: Array, paths: Paths) -> Any:
    made = None
    if self.quantises(paths) and takes(x.shape, x.dtype):
      made = kernel_quantise_rows(flat(x))
    if made is None:
      return super().prepare(ops, x, paths)
    return self.packed(ops, made, x.shape, paths)

  def joined(self, ops: Ops, out: Any, shape: tuple[int, ...], paths: Paths) -> Any:
    if isinstance(out, Rows):  # see `fp8_attention_rows`
      return Rows(out.values.reshape(shape), out.scales)
    return super().joined(ops, out, shape, paths)

  def activate(self, ops: Ops, y: Array | Product, path: str) -> Any:
    product, made = opened(y), None
    shape = product.values.shape
    if self.quantises((path,)) and takes(shape, product.values.dtype):
      made = gelu_rows(product)
    if made is None:
      return super().activate(ops, y, path)
    return self.packed(ops, made, shape, (path,))
