"""Parameters that wait in host memory until they are used.

The text encoder of the 5B model has more parameters than its transformer, and works for a moment
per prompt. Parked, it takes no device memory in between, and each use copies it to the device:
11 GB in bfloat16, a fraction of a second over PCIe from pinned memory.
"""

import jax

from longlive_jax.types import PyTree

HOST, DEVICE = "pinned_host", "device"


def parked(params: PyTree) -> PyTree:
  """The parameters in pinned memory of the host; their layout over devices stays."""
  return _moved(params, HOST)


def at_hand(params: PyTree) -> PyTree:
  """The parameters on their devices: copies of parked ones, the others as they are."""
  return _moved(params, DEVICE)


def _moved(params: PyTree, kind: str) -> PyTree:
  return jax.device_put(params, jax.tree.map(lambda a: a.sharding.with_memory_kind(kind), params))
