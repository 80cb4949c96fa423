"""All live sessions of a server: made, found again, parked, saved and freed.

A session whose connection is lost stays for `resume_seconds`; one that the client has saved then
goes to disk, another is freed. If there are too many, sessions without a connection give way.
"""

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator

import numpy as np

from longlive_jax.serve.card import Card
from longlive_jax.serve.contract import Backend
from longlive_jax.serve.errors import Refused, Seldom, log_failure, model_error
from longlive_jax.serve.hosted import Hosted
from longlive_jax.serve.live import Live
from longlive_jax.serve.saver import Saver, Saving
from longlive_jax.serve.security import SESSION_ID, check_id, new_id, unknown
from longlive_jax.serve.shared import Shared
from longlive_jax.serve.shelf import Shelf

CLOSE_CODES = {"failed": 1011, "server_stop": 1012}


class Sessions:
  """The live sessions, and those on disk. Belongs to the event loop.

  Args:
    shared: of the server.
    shelf: sessions on disk; None: none are saved.
    backend: gives the model once it is ready.
    memory: bytes in use.

  Attributes:
    seldom: tells what goes wrong again and again.
  """

  def __init__(
    self,
    shared: Shared,
    shelf: Shelf | None,
    backend: Callable[[], Backend],
    memory: Callable[[], int],
  ):
    self.shared, self.shelf = shared, shelf
    self._backend, self._memory = backend, memory
    self.live: dict[str, Live] = {}
    self.saver = Saver(shelf, shared, backend, self.live) if shelf else None
    self._stopping, self.seldom = False, Seldom()
    self._tasks: set[asyncio.Task[None]] = set()

  async def start(
    self, owner: str, prompt: str, seed: int, image: np.ndarray | None = None
  ) -> Live:
    """Begins a session.

    Raises:
      Refused: there are too many, or the model does not take the prompt.
    """
    await self._make_room(owner)
    backend = self._backend()
    card = Card(new_id("session"), owner, seed, int(time.time()))
    hosted = Hosted(lambda: backend.new(seed, image), self.shared.residents)
    with self._entered(card, hosted) as live:
      await live.push(prompt, "keep", None)
      self._check_there(live)
      live.start()
    return live

  @contextlib.contextmanager
  def _entered(self, card: Card, hosted: Hosted, *, remove: bool | None = None) -> Iterator[Live]:
    """A session that counts from now on; it is freed again if the body does not end well."""
    if self._stopping:
      raise Refused(503, "stopping", "the server stops")
    live, well = Live(card, hosted, self.shared, self._memory, self.over), False
    self.live[card.id] = live
    try:
      yield live
      well = True
    finally:
      if not well:
        self.finish(live, "failed", remove=remove)

  def _check_there(self, live: Live) -> None:
    """Raises Refused: 404 or 503, a session has been ended before it could begin."""
    if self.live.get(live.card.id) is not live:
      raise Refused(503, "stopping", "the server stops") if self._stopping else unknown(SESSION_ID)

  async def _make_room(self, owner: str) -> None:
    """Lets sessions without a connection give way, first of all the owner's own."""
    while len(self.live) >= self.shared.limits.sessions:
      gone = [live for live in self.live.values() if live.gone_at is not None]
      if not gone:
        raise Refused(
          429, "too_many_sessions", f"there are {len(self.live)} sessions, as many as may be"
        )
      oldest = min(gone, key=lambda live: (live.card.owner != owner, live.gone_at or 0.0))
      await self.put_away(oldest, save=self.shelf is not None)

  def find(self, owner: str, session: str) -> Live | Card:
    """A session of this owner: live, or the card of one on disk.

    Raises:
      Refused: 404.
    """
    check_id(session, SESSION_ID)
    found: Live | Card | None = self.live.get(session)
    if found is None and self.shelf:
      found = self.shelf.cards.get(session)
    card = found.card if isinstance(found, Live) else found
    if found is None or card is None or card.owner != owner:
      raise unknown(SESSION_ID)
    return found

  async def resume(self, owner: str, session: str) -> Live:
    """A session that goes on, from disk if it is there.

    Raises:
      Refused: 404; 409, what is on disk cannot be used; 429, there are too many.
    """
    if isinstance(found := self.find(owner, session), Live):
      return found
    saver = self.saver
    if saver is None:
      raise unknown(SESSION_ID)
    await saver.settled(session)
    await self._make_room(owner)
    if isinstance(found := self.find(owner, session), Live):  # somebody else was faster
      return found
    card = dataclasses.replace(found)
    hosted = Hosted(saver.loading(session), self.shared.residents)
    with self._entered(card, hosted, remove=False) as live:
      loading = await self.shared.engine.attempt(hosted.wake)
      reading = asyncio.get_running_loop().run_in_executor(None, saver.shelf.frames, session)
      await asyncio.wait([reading])
      errors = [loading.exception(), reading.exception()]
      self._check_there(live)
      if error := next(filter(None, errors), None):
        log_failure(f"session {session} cannot be resumed", error)
        raise Refused(409, "not_resumable", model_error(error)) from error
      live.reel.restore(reading.result())
      live.start()
    return live

  async def fork(self, live: Live, block: int | None) -> Live:
    """Another session that goes on from here, or from an earlier block; it waits to be resumed.

    Raises:
      Refused: 400, there is no such block; 429, there are too many sessions.
    """
    if block is not None and not 0 <= block <= live.card.made:
      message = f"block={block} must be from 0 to {live.card.made}"
      raise Refused(400, "bad_block", message, "block")
    await self._make_room(live.card.owner)
    card = dataclasses.replace(live.card, id=new_id("session"), created_at=int(time.time()))
    card.keep, card.saved_at = False, 0
    hosted = Hosted(lambda: live.hosted.fork(block), self.shared.residents)
    with self._entered(card, hosted) as child:
      future = await self.shared.engine.attempt(child.hosted.wake)
      if error := future.exception():
        known = isinstance(error, ValueError)
        status, code = (400, "bad_block") if known else (500, "model_failed")
        raise Refused(status, code, model_error(error)) from error
      made = future.result().block
      first = self.shared.facts.first_frame(made)
      card.rewind(made, first)
      card.position = child.reel.position = child.reel.sent = first
      child.gone_at = time.monotonic()
      self._check_there(child)
      child.start()
    return child

  async def delete(self, owner: str, session: str) -> None:
    """Ends and frees a session of this owner, and removes it from disk.

    Raises:
      Refused: 404; 507, its files cannot be removed: what was saved stays.
    """
    found = self.find(owner, session)
    if isinstance(found, Live):
      found.card.keep = False
      if freed := self.finish(found, "deleted"):
        await asyncio.wait([freed])
        freed.result()
    elif self.saver:
      await self.saver.remove(session)

  async def save(self, live: Live, *, keep: bool, leave: bool = False) -> Saving:
    """Begins to write a session to disk; see `Saver.begin`.

    Raises:
      Refused: 409, nothing is saved here.
    """
    if self.saver is None:
      raise Refused(409, "not_saved", "this server has no --state_dir, so nothing is saved")
    return await self.saver.begin(live, keep=keep, leave=leave)

  def over(self, live: Live, error: BaseException | None) -> None:
    """Ends a session that is long enough, or that the model failed."""
    self.finish(live, "failed" if error else "length", error)

  def finish(
    self,
    live: Live,
    reason: str,
    error: BaseException | None = None,
    *,
    remove: bool | None = None,
  ) -> asyncio.Task[None] | None:
    """Ends a session; a second call does nothing.

    Args:
      live: the session.
      reason: "length", "stopped", "deleted", "expired", "failed" or "server_stop".
      error: of the model.
      remove: whether it is removed from disk; None: unless it is to be kept.

    Returns:
      The task that frees it; it raises `Refused` if it could not be removed, as the log says.
    """
    if self.live.pop(live.card.id, None) is None:
      return None
    remove = not live.card.keep if remove is None else remove
    if error:
      log_failure(f"session {live.card.id} failed", error)
      self.shared.metrics.failed("live")
    if outbox := live.outbox:
      if error:
        outbox.event("error", code="model_failed", message=model_error(error))
      outbox.event("ended", reason=reason, saved=bool(live.card.saved_at) and not remove)
      outbox.close(CLOSE_CODES.get(reason, 1000), reason)
    if self.shelf and remove:
      self.shelf.hide(live.card.id)  # it is unknown at once, whatever is still under way
    task = asyncio.create_task(self._free(live, remove=remove, unwanted=reason != "deleted"))
    self._tasks.add(task)
    task.add_done_callback(self._freed)
    return task

  async def _free(self, live: Live, *, remove: bool, unwanted: bool) -> None:
    await live.stop()
    await self.shared.engine.attempt(live.hosted.close)
    if self.saver and remove:
      await self.saver.remove(live.card.id, unwanted=unwanted)

  def _freed(self, task: asyncio.Task[None]) -> None:
    self._tasks.discard(task)
    error = None if task.cancelled() else task.exception()
    if error and not isinstance(error, Refused):
      log_failure("a session is not freed", error)

  async def put_away(self, live: Live, *, save: bool) -> None:
    """Lets a session without a connection go, to disk if it is to be saved."""
    saved = False
    if save:
      saving = await self.save(live, keep=False)
      await asyncio.wait([saving])
      if live.gone_at is None or live.card.id not in self.live:  # its client came back
        saving.exception()
        return
      saved = saving.exception() is None
    if freed := self.finish(live, "expired", remove=False if saved else None):
      await asyncio.wait([freed])

  async def stop(self) -> None:
    """Saves all sessions, if there is a place, and frees them."""
    self._stopping = True
    for live in self.live.values():
      live.halt()
    for live in list(self.live.values()):
      if self.shelf:
        await asyncio.wait([await self.save(live, keep=True)])  # an error is in the log
      self.finish(live, "server_stop", remove=False)
    while self._tasks:
      await asyncio.wait(self._tasks)
    if self.saver:
      await self.saver.settled()
