"""The thread that owns the model, and whose turn it is.

Blocks are made one at a time, in the order in which they were asked for. Who wants block after
block asks for the next one when it has the last, and so stands behind all others again: round
robin by block. Calls that are not blocks (a prompt, a fork) come next whoever waits for a block.

What is queued is bounded by those who queue: a session or video waits for one block at a time, a
connection for one call.
"""

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor


def _notice(future: asyncio.Future) -> None:
  """Looks at an error, so that one which nobody waits for any more is no warning."""
  if not future.cancelled():
    future.exception()


@dataclasses.dataclass(frozen=True)
class Turn[T]:
  """A block that was made, or the model's error.

  Attributes:
    done: the finished call: `done.result()` or `done.exception()`.
    waited: seconds until its turn came.
    made: seconds that it took then.
  """

  done: asyncio.Future[T]
  waited: float
  made: float


class Engine:
  """Runs what needs the model in its thread. Its methods belong to the event loop."""

  def __init__(self) -> None:
    self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
    self._turn = asyncio.Lock()  # gives way in order
    self.waiting = 0  # blocks that wait for their turn

  def submit[T](self, work: Callable[[], T]) -> asyncio.Future[T]:
    """Has work done after what was submitted before; it is done even if nobody waits."""
    future = asyncio.get_running_loop().run_in_executor(self._thread, work)
    future.add_done_callback(_notice)
    return future

  async def attempt[T](self, work: Callable[[], T]) -> asyncio.Future[T]:
    """Waits until work is done, and returns the finished future, whatever came of it."""
    future = self.submit(work)
    await asyncio.wait([future])
    return future

  @contextlib.asynccontextmanager
  async def turn(self) -> AsyncIterator[None]:
    """Waits for a turn; while it lasts, no block is made by others."""
    self.waiting += 1
    try:
      await self._turn.acquire()
    finally:
      self.waiting -= 1
    try:
      yield
    finally:
      self._turn.release()

  async def block[T](self, work: Callable[[], T]) -> Turn[T]:
    """Makes a block when its turn comes."""
    asked = time.perf_counter()
    async with self.turn():
      start = time.perf_counter()
      done = await self.attempt(work)
      return Turn(done, start - asked, time.perf_counter() - start)

  async def stop(self) -> None:
    """Ends the thread once all that was submitted is done."""
    await asyncio.get_running_loop().run_in_executor(None, self._thread.shutdown)

  def abandon(self) -> None:
    """Lets the thread end by itself, and drops what has not begun."""
    self._thread.shutdown(wait=False, cancel_futures=True)
