"""What the processes of a run do together: agree, wait for each other, make a folder.

All of them must call these, in the same order. A process that is alone agrees with itself.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from longlive_jax.io.atomic import partial_name, replacing
from longlive_jax.types import ArrayLike, PyTree


def is_first() -> bool:
  """Whether this process is the one that writes what all share."""
  return jax.process_index() == 0


def of_first(value: int) -> int:
  """What process 0 has; so that all do the same, whatever a file system shows them."""
  return int(multihost_utils.broadcast_one_to_all(np.asarray(value, np.int32)))


def of_all(value: int) -> list[int]:
  """What each process has, in their order."""
  return np.ravel(multihost_utils.process_allgather(np.asarray(value, np.int32))).tolist()


def texts_of_all(text: str) -> list[str]:
  """The text that each process has, in their order."""
  mine = np.frombuffer(text.encode(), np.uint8)
  lengths = of_all(mine.size)
  padded = np.pad(mine, (0, max(lengths) - mine.size))
  rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(lengths), -1)
  return [row[:n].tobytes().decode() for row, n in zip(rows, lengths, strict=True)]


def wait_for_all(what: str) -> None:
  """Returns when all processes are here."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(what)


def whole(tree: PyTree) -> PyTree:
  """Arrays on the host of this process, whatever devices of whatever processes hold them."""

  def fetch(leaf: ArrayLike) -> np.ndarray:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
      return multihost_utils.process_allgather(leaf, tiled=True)
    return jax.device_get(leaf)

  return jax.tree.map(fetch, tree)


@contextlib.contextmanager
def replacing_together(folder: str | Path) -> Iterator[Path]:
  """`replacing` for a folder that all processes write to; it appears before any of them goes on.

  Args:
    folder: the same in all processes, on a file system that they share.

  Yields:
    The temporary name, the same in all; process 0 has made the folder.
  """
  owner = of_first(os.getpid())
  if is_first():
    with replacing(folder) as partial:
      partial.mkdir()
      yield partial
      wait_for_all("written")
  else:
    yield partial_name(folder, owner)
    wait_for_all("written")
  wait_for_all("renamed")
