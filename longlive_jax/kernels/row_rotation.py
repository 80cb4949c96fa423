"""Rotation of pairs in the registers of a thread, in inline Mosaic: Pallas has no such shuffle."""

from typing import Any

from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, gpu, vector
from jax.experimental.mosaic.gpu import fragmented_array, utils


def turned(x: Any, cos: Any, sin: Any, half: int) -> Any:
  """Pairs (a, b) as (a cos - b sin, b cos + a sin).

  Args:
    x: float32 fragmented array whose threads hold neighbouring elements, whole pairs.
    cos, sin: float32 `[half]` in shared memory, for each head of `2 * half` elements of x.
    half: pairs of a head.
  """
  width = x.layout.vec_size
  index, kind = ir.IndexType.get(), ir.VectorType.get((width // 2,), ir.F32Type.get())
  thread = arith.remui(gpu.thread_id(gpu.Dimension.x), utils.c(128, index))
  at = arith.remui(arith.muli(thread, utils.c(width // 2, index)), utils.c(half, index))
  c, s = (vector.load(kind, ref, [at]) for ref in (cos, sin))
  registers = x.registers.copy()
  for i, register in enumerate(registers):
    pairs = [_turn(register, c, s, j) for j in range(width // 2)]
    whole = ir.VectorType.get((width,), ir.F32Type.get())
    registers[i] = vector.from_elements(whole, [each for pair in pairs for each in pair])
  return fragmented_array.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=None)


def _turn(register: Any, c: Any, s: Any, j: int) -> tuple[Any, Any]:
  """The j-th pair of a register, turned."""
  add, sub, mul = fragmented_array.addf, fragmented_array.subf, fragmented_array.mulf
  a, b, cj, sj = _take(register, 2 * j), _take(register, 2 * j + 1), _take(c, j), _take(s, j)
  return sub(mul(a, cj), mul(b, sj)), add(mul(b, cj), mul(a, sj))


def _take(v: Any, i: int) -> Any:
  at = ir.DenseI64ArrayAttr.get([i])
  return vector.extract(v, dynamic_position=[], static_position=at)
