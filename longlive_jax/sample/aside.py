"""Host memory for what is put aside while the devices work.

To pinned memory a device copies by itself, as fast as its bus; copying 4 GB to ordinary memory took
more than a second. But a process has only so much that is pinned: XLA allows 64 GiB unless
`XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB` says otherwise. A part of it is taken here, and what goes beyond
goes to ordinary memory.
"""

import threading
import weakref

import jax
import numpy as np

from longlive_jax.parallel.parked import parked
from longlive_jax.types import PyTree

PINNED_BYTES = 48 * 2**30


def bytes_of(tree: PyTree) -> int:
  """Bytes of arrays, or of arrays of these shapes."""
  return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))


def to_host(tree: PyTree) -> PyTree:
  """Arrays in ordinary host memory, all copied at a time while the devices go on."""
  for leaf in jax.tree.leaves(tree):
    if isinstance(leaf, jax.Array):
      leaf.copy_to_host_async()
  return jax.tree.map(np.asarray, tree)


class Aside:
  """A budget of pinned memory, shared by whoever puts things aside.

  Args:
    left: bytes that are free.
  """

  def __init__(self, left: int = PINNED_BYTES):
    self.left, self._lock = left, threading.RLock()  # an array may be forgotten at any time

  def put(self, tree: PyTree) -> PyTree:
    """Arrays of devices in host memory, pinned as long as there is room.

    Pinned memory is free again when they are forgotten.
    """
    size = bytes_of(tree)
    if not self._take(size):
      return to_host(tree)
    try:
      found = jax.block_until_ready(parked(tree))
    except jax.errors.JaxRuntimeError:  # there is less than was thought
      self._take(-size)
      return to_host(tree)
    for leaf in jax.tree.leaves(found):
      weakref.finalize(leaf, self._take, -leaf.nbytes)
    return found

  def _take(self, size: int) -> bool:
    with self._lock:
      fits = size <= self.left
      self.left -= size if fits else 0
    return fits


ASIDE = Aside()  # of this process
