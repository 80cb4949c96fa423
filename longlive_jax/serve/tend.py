"""What is done about sessions that nobody uses, again and again."""

import asyncio
import contextlib
import time
from collections.abc import Coroutine

from longlive_jax.serve.errors import Refused
from longlive_jax.serve.live import Live
from longlive_jax.serve.saver import Saver
from longlive_jax.serve.sessions import Sessions


async def tend(sessions: Sessions) -> None:
  """Parks sessions that are idle, lets those go whose client did not come back.

  A session without a connection ends after `limits.resume_seconds`. One that makes no blocks leaves
  the accelerator after `limits.park_seconds`, and memory after `limits.disk_seconds`. What goes
  wrong with one is told seldom, keeps nothing else from being done, and is tried again.
  """
  for live in list(sessions.live.values()):
    if error := await outcome(look_after(sessions, live)):
      sessions.seldom.tell(f"session {live.card.id} cannot be looked after", error)
  if sessions.saver and (error := await outcome(tidy(sessions, sessions.saver))):
    sessions.seldom.tell("saved sessions cannot be looked after", error)


async def outcome(work: Coroutine[object, object, None]) -> BaseException | None:
  """What went wrong with this work."""
  task = asyncio.create_task(work)
  try:
    await asyncio.wait([task])
  finally:
    task.cancel()  # as the one that waits has been, or it is done
  return None if task.cancelled() else task.exception()


async def look_after(sessions: Sessions, live: Live) -> None:
  """Does what is due for one session."""
  limits, now = sessions.shared.limits, time.monotonic()
  idle = now - live.active_at if live.why_waiting() else 0.0
  state = live.hosted.state
  if live.gone_at is not None and now - live.gone_at > limits.resume_seconds:
    await sessions.put_away(live, save=live.card.keep)
  elif sessions.saver and idle > limits.disk_seconds and state in ("awake", "parked"):
    await to_disk(sessions, live)
  elif idle > limits.park_seconds and state == "awake":
    parking = await sessions.shared.engine.attempt(live.hosted.park)
    if error := parking.exception():
      sessions.over(live, error)


async def to_disk(sessions: Sessions, live: Live) -> None:
  """Lets an idle session leave memory.

  It stays if it is used while it is saved, and for another while if it cannot be saved.
  """
  saving = await sessions.save(live, keep=False, leave=True)
  await asyncio.wait([saving])
  if saving.exception():
    live.active_at = time.monotonic()


async def tidy(sessions: Sessions, saver: Saver) -> None:
  """Removes saved sessions that are of no use."""
  for session in saver.useless():
    if session not in sessions.live:  # nobody has resumed it meanwhile
      with contextlib.suppress(Refused):  # which is in the log
        await saver.remove(session, unwanted=session in saver.unwanted)
