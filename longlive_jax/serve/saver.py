"""Saves live sessions while the model goes on.

    turn of the session -> model's thread: a copy in host memory -> another thread: the disk

Writing takes several times as long as copying. Sessions are saved one after the other, so that host
memory holds one copy at most; and nothing else is done to the files of a session that is written.
"""

import asyncio
import dataclasses
import math
import time
from collections.abc import Callable, Mapping

from absl import logging

from longlive_jax.serve.card import Card
from longlive_jax.serve.contract import Backend, Session
from longlive_jax.serve.errors import Damaged, Refused, Seldom, log_failure, not_removed
from longlive_jax.serve.hosted import Copied, Make
from longlive_jax.serve.live import Live
from longlive_jax.serve.shared import Shared
from longlive_jax.serve.shelf import Shelf

Saving = asyncio.Task[int]
RETRY_SECONDS = 10.0  # until what could not be removed is tried again


class Saver:
  """Writes to the shelf. Belongs to the event loop.

  Args:
    shelf: sessions on disk.
    shared: of the server.
    backend: gives the model once it is ready.
    live: the live sessions by their ids.

  Attributes:
    unwanted: sessions that are unknown already, and whose files could not be removed yet.
  """

  def __init__(
    self,
    shelf: Shelf,
    shared: Shared,
    backend: Callable[[], Backend],
    live: Mapping[str, Live],
  ):
    self.shelf = shelf
    self._shared, self._backend, self._live = shared, backend, live
    self.unwanted: set[str] = set()
    self._failed_at: dict[str, float] = {}  # when sessions could not be removed
    self._one, self._seldom = asyncio.Lock(), Seldom()
    self._tasks: dict[Saving, str] = {}  # what is being saved, and of which session

  async def begin(self, live: Live, *, keep: bool, leave: bool) -> Saving:
    """Begins to save a session as it is between two of its blocks.

    Args:
      live: the session.
      keep: whether it is to outlive its connection.
      leave: whether it leaves memory when it is written, unless it is used meanwhile.

    Returns:
      What ends when it is written, with the block that comes next then; it goes on if nobody waits.
      By now the session has been copied and may be used, or the task has failed. It raises
      `Refused`: 409, the session has ended; 500, it cannot be written.
    """

    def ended(task: Saving) -> None:
      del self._tasks[task]
      error = None if task.cancelled() else task.exception()
      if error and not isinstance(error, Refused):  # which whoever waits will see
        logging.error("session %s is not saved", live.card.id, exc_info=error)

    copied = asyncio.Event()
    task = asyncio.create_task(self._save(live, copied, keep=keep, leave=leave))
    self._tasks[task] = live.card.id
    task.add_done_callback(ended)
    copying = asyncio.create_task(copied.wait())
    await asyncio.wait([task, copying], return_when=asyncio.FIRST_COMPLETED)
    copying.cancel()
    return task

  async def _save(self, live: Live, copied: asyncio.Event, *, keep: bool, leave: bool) -> int:
    async with self._one:
      async with self._shared.engine.turn():
        await live.settled()
        if live.card.id not in self._live:
          raise Refused(409, "not_saved", "the session has ended")
        live.card.keep = live.card.keep or keep
        card, frames = dataclasses.replace(live.card), live.reel.messages()
        copying = await self._shared.engine.attempt(live.hosted.copied)
      copied.set()
      writing = self._write(live, card, frames, copying, leave=leave)
      del copying  # with the copy, or an error would hold it
      written = await writing
    if not written:
      raise Refused(500, "not_saved", "the session cannot be saved")
    live.card.saved_at = card.saved_at
    return card.made

  async def _write(
    self,
    live: Live,
    card: Card,
    frames: list[bytes],
    copying: asyncio.Future[Copied],
    *,
    leave: bool,
  ) -> bool:
    """Writes what was copied; returns whether it could be."""
    error = copying.exception()
    if not error:
      copy, loop = copying.result(), asyncio.get_running_loop()
      writing = loop.run_in_executor(None, self.shelf.write, card, frames, copy.write)
      await asyncio.wait([writing])
      error = writing.exception()
      if not error and leave:
        load = self.loading(card.id)
        leaving = await self._shared.engine.attempt(lambda: live.hosted.leave(load, copy.uses))
        error = leaving.exception()
    if error:
      log_failure(f"session {card.id} cannot be saved", error)
    return not error

  def loading(self, session: str) -> Make:
    """What brings a session back, in the model's thread; it raises `Damaged`."""
    backend = self._backend()

    def load() -> Session:
      path = self.shelf.state(session)
      try:
        return backend.load(path)
      except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged("the saved session is damaged, or of another model") from error

    return load

  async def settled(self, session: str | None = None) -> None:
    """Waits until this session, or none at all, is being saved."""
    while found := [task for task, name in self._tasks.items() if session in (None, name)]:
      await asyncio.wait(found)

  async def remove(self, session: str, *, unwanted: bool = False) -> None:
    """Removes a session from disk, also one that is being saved; it is unknown from now on.

    Args:
      session: its id.
      unwanted: whether it stays unknown, and among the `unwanted`, if it cannot be removed.

    Raises:
      Refused: 507, it cannot be removed, as the log says.
    """
    self.shelf.hide(session)
    try:
      await self.settled(session)
      await asyncio.to_thread(self.shelf.remove, session)
    except OSError as error:
      self._failed_at[session] = time.monotonic()
      if unwanted:
        self.unwanted.add(session)
      self._seldom.tell(f"the files of session {session} cannot be removed", error)
      raise not_removed("session") from error
    else:
      self.unwanted.discard(session)
      self._failed_at.pop(session, None)
    finally:
      if session not in self.unwanted:
        self.shelf.show(session)

  def useless(self) -> list[str]:
    """Sessions to be removed: the unwanted, and the oldest if there are too many.

    None of those in use, or that could not be removed a moment ago.
    """
    found, since = [*self.unwanted, *self.shelf.surplus(list(self._live))], time.monotonic()
    return [s for s in found if since - self._failed_at.get(s, -math.inf) >= RETRY_SECONDS]
