"""Parameters that wait in host memory until they are used.

The text encoder of the 5B model has more parameters than its transformer, and works for a moment
per prompt. Parked, it takes no device memory in between, and each use copies it to the device:
11 GB in bfloat16, a fraction of a second over PCIe from pinned memory. In pieces, it is there a
piece at a time.
"""

import math

import jax
import numpy as np

from longlive_jax.types import PyTree

HOST, DEVICE = "pinned_host", "device"


def parked(params: PyTree) -> PyTree:
  """The parameters in pinned memory of the host; their layout over devices stays."""
  return _moved(params, HOST)


def at_hand(params: PyTree) -> PyTree:
  """The parameters on their devices: copies of parked ones, the others as they are."""
  return _moved(params, DEVICE)


def in_pieces(params: PyTree, layers: int = 2) -> PyTree:
  """A network of stacked layers with an embedding, parked in pieces.

  Args:
    params: "embedding", "layers" and others; those of the layers have a first axis of layers.
    layers: of a piece at most, a divisor of all is taken.

  Returns:
    The same, but for "layers", a list of parked pieces, and "embedding", of which only a few rows
    are ever used, an array of the host.
  """
  stack = params["layers"]
  count = jax.tree.leaves(stack)[0].shape[0]
  size = math.gcd(count, layers)
  pieces = []
  for start in range(0, count, size):
    piece = jax.tree.map(lambda a, start=start: a[start : start + size], stack)
    pieces.append(jax.block_until_ready(parked(piece)))
  return {**params, "embedding": np.asarray(params["embedding"]), "layers": pieces}


def _moved(params: PyTree, kind: str) -> PyTree:
  return jax.device_put(params, jax.tree.map(lambda a: a.sharding.with_memory_kind(kind), params))
