"""Kernels that are lowered once in a process, and from then on called as what came of it.

JAX lowers a kernel anew in every function that calls it, a second of Python for a large one, and a
sampler has eight such functions that are traced at a time.
"""

import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
from jax._src.lib.mlir import ir

TARGET = "mosaic_gpu_v2"
Attributes = dict[str, bytes | bool]

_LOCK = threading.Lock()
_LOWERED: dict[Hashable, Attributes] = {}


def call_once_lowered(
  kernel: Callable[..., Any],
  key: Hashable,
  args: Sequence[jax.Array],
  outs: Sequence[jax.ShapeDtypeStruct],
  overwritten: Mapping[int, int] | None = None,
) -> tuple[jax.Array, ...]:
  """What a kernel returns.

  Args:
    kernel: of arrays, one call of a Mosaic GPU kernel.
    key: what the kernel depends on besides the shapes and dtypes of `args` and `outs`.
    args: its arguments.
    outs: shapes of its results.
    overwritten: arguments whose memory becomes that of a result, by their places.
  """
  shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in args)
  known = key, tuple((x.shape, str(x.dtype)) for x in (*shapes, *outs))
  with _LOCK:
    if known not in _LOWERED:
      # in a thread of its own, for it may be called inside the trace of another function
      with ThreadPoolExecutor(1) as pool:
        _LOWERED[known] = pool.submit(lower_kernel, kernel, shapes).result()
  call = jax.ffi.ffi_call(TARGET, list(outs), input_output_aliases=dict(overwritten or {}))
  return tuple(call(*args, **_LOWERED[known]))


def lower_kernel(kernel: Callable[..., Any], shapes: Sequence[jax.ShapeDtypeStruct]) -> Attributes:
  """What the custom call of a kernel is told."""
  lowered = jax.jit(kernel).trace(*shapes).lower(lowering_platforms=("cuda",))
  module: Any = lowered.compiler_ir("stablehlo")
  found = [op for op in _operations(module.operation) if _is_kernel(op)]
  if len(found) != 1:
    raise ValueError(f"a kernel is one call of {TARGET}; found {len(found)}")
  given = ir.DictAttr(found[0].attributes["mhlo.backend_config"])
  return {item.name: _value(item.attr) for item in given}


def _operations(operation: Any) -> Iterator[Any]:
  """An operation and all that are in it."""
  yield operation
  for region in operation.regions:
    for block in region.blocks:
      for inner in block.operations:
        yield from _operations(inner.operation)


def _is_kernel(operation: Any) -> bool:
  named = operation.name == "stablehlo.custom_call"
  return named and ir.StringAttr(operation.attributes["call_target_name"]).value == TARGET


def _value(attribute: Any) -> bytes | bool:
  return attribute.value_bytes if isinstance(attribute, ir.StringAttr) else bool(attribute.value)
