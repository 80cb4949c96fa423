"""Kernels that are the same are known by the same name.

Mosaic gives every kernel that it lowers a number of its own, for files that it can be asked to
dump, and the number is part of what a compiled kernel is found by. The eight executables of a
sampler would each compile the same few kernels, one after the other, at every start, and a
compilation cache would depend on the order in which they were traced.
"""

from typing import Any

from jax._src.lib.mlir import ir
from jax.experimental.mosaic.gpu import core

NUMBERED = "mosaic_gpu.dump_basename"


def drop_numbers() -> None:
  """Leaves the numbers out of what is lowered from now on in this process."""
  serialise = core._run_serde_pass  # the last step before the name is taken; it has no public one
  if hasattr(serialise, "numbered"):
    return

  def without_number(module: Any, **options: Any) -> Any:
    attributes = module.operation.attributes
    if NUMBERED in attributes:
      attributes[NUMBERED] = ir.StringAttr.get("kernel", context=module.context)
    return serialise(module, **options)

  without_number.numbered = serialise  # type: ignore[attr-defined]
  core._run_serde_pass = without_number
