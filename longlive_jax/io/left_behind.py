"""Quiet about what Orbax leaves behind after a read that failed.

It closes its event loop over the reads that are still under way. Each of them ends later, in
another thread or in the collector of garbage, and would print a trace about itself: noise below the
one error that says what is damaged.
"""

import functools
import logging
import sys
import warnings
from collections.abc import Callable

NEVER_AWAITED = "coroutine '.*' was never awaited"
CLOSED = "Event loop is closed"
DESTROYED = "Task was destroyed but it is pending"


@functools.cache
def watch_closed_loops() -> None:
  """Leaves out errors of closed event loops in this process, which come from other threads.

  To be called before a read: they may come as soon as it has failed.
  """
  sys.unraisablehook = without_closed_loops(sys.unraisablehook)
  logging.getLogger("asyncio").addFilter(lambda record: DESTROYED not in record.getMessage())


def ignore_never_awaited() -> None:
  """Leaves out the coroutines of a read that failed; to be called after one."""
  warnings.filterwarnings("ignore", NEVER_AWAITED, RuntimeWarning)


def without_closed_loops(hook: Callable[..., object]) -> Callable[..., object]:
  """A hook for errors that nobody can catch, which leaves out those of a closed event loop."""

  def quiet(unraisable: "sys.UnraisableHookArgs") -> None:
    error = unraisable.exc_value
    if not (isinstance(error, RuntimeError) and str(error) == CLOSED):
      hook(unraisable)

  return quiet
