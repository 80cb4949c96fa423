"""The heap of the C library, where the arrays of a CPU live, and frames and copies of a GPU's.

Left alone, glibc keeps most of what sessions free: each thread may have a heap of its own, the
size from which arrays are mapped by themselves grows to 32 MiB, and what is freed between two small
things that stay is never given back. A server whose sessions come and go then grows for hours.
"""

import ctypes
from collections.abc import Callable
from typing import Any

M_ARENA_MAX = -8  # of malloc.h


def _find(name: str) -> Callable[..., Any] | None:
  """A function of the C library, if it is glibc."""
  return getattr(ctypes.CDLL(None), name, None)


def keep_one_heap() -> None:
  """Has all threads that begin later share one heap; only of that one is all given back.

  To be called before there are threads. Does nothing where the C library is not glibc.
  """
  if mallopt := _find("mallopt"):
    mallopt(M_ARENA_MAX, 1)


def give_back() -> None:
  """Gives freed memory back to the system: some 20 ms in which nobody else gets any.

  Does nothing where the C library is not glibc.
  """
  if trim := _find("malloc_trim"):
    trim(ctypes.c_size_t(0))
