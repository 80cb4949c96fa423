"""Host memory for what is put aside while the devices work.

To pinned memory a device copies by itself, as fast as its bus; copying 4 GB to ordinary memory took
more than a second. But a process has only so much that is pinned: XLA allows 64 GiB unless
`XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB` says otherwise. A part of it is taken here, and what goes beyond
goes to ordinary memory.
"""

import functools
import threading
import weakref
from collections.abc import Callable

import jax
import numpy as np

from longlive_jax.parallel.parked import parked
from longlive_jax.types import PyTree

PINNED_BYTES = 48 * 2**30


def bytes_of(tree: PyTree) -> int:
  """Bytes of arrays, or of arrays of these shapes."""
  return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))


def begun(tree: PyTree) -> PyTree:
  """The same arrays, on their way to ordinary host memory."""
  for leaf in jax.tree.leaves(tree):
    if isinstance(leaf, jax.Array):
      leaf.copy_to_host_async()
  return tree


def to_host(tree: PyTree) -> PyTree:
  """Arrays in ordinary host memory, all copied at a time while the devices go on."""
  return jax.tree.map(np.asarray, begun(tree))


class Aside:
  """A budget of pinned memory, shared by whoever puts things aside.

  Args:
    left: bytes that are free.
  """

  def __init__(self, left: int = PINNED_BYTES):
    self.left, self._lock = left, threading.RLock()  # an array may be forgotten at any time

  def start(self, tree: PyTree) -> Callable[[], PyTree]:
    """Begins to copy arrays of devices to host memory, pinned as long as there is room.

    A device copies beside the work that it is given after this, and waits for what it was given
    before. Pinned memory is free again when the copies are forgotten.

    Returns:
      What waits for the copies and returns them. Before that nothing of the tree may be donated.
    """
    size = bytes_of(tree)
    copies = self._pinned(tree, size) if self._take(size) else None
    if copies is None:
      return functools.partial(to_host, begun(tree))

    def wait() -> PyTree:
      try:
        return jax.block_until_ready(copies)
      except jax.errors.JaxRuntimeError:  # there is less than was thought
        return to_host(tree)

    return wait

  def _pinned(self, tree: PyTree, size: int) -> PyTree:
    """Copies that are under way; None if there is less than was thought."""
    try:
      copies = parked(tree)
    except jax.errors.JaxRuntimeError:
      self._take(-size)
      return None
    for leaf in jax.tree.leaves(copies):
      weakref.finalize(leaf, self._take, -leaf.nbytes)
    return copies

  def _take(self, size: int) -> bool:
    with self._lock:
      fits = size <= self.left
      self.left -= size if fits else 0
    return fits


ASIDE = Aside()  # of this process
