"""What is done about sessions that nobody uses, again and again."""

import asyncio
import time

from longlive_jax.serve.live import Live
from longlive_jax.serve.sessions import Sessions


async def tend(sessions: Sessions) -> None:
  """Parks sessions that are idle, lets those go whose client did not come back.

  A session without a connection ends after `limits.resume_seconds`. One that makes no blocks leaves
  the accelerator after `limits.park_seconds`, and memory after `limits.disk_seconds`.
  """
  limits, now = sessions.shared.limits, time.monotonic()
  for live in list(sessions.live.values()):
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
  if saver := sessions.saver:
    for session in saver.shelf.surplus(list(sessions.live)):
      await saver.remove(session)


async def to_disk(sessions: Sessions, live: Live) -> None:
  """Lets an idle session leave memory.

  It stays if it is used while it is saved, and for another while if it cannot be saved.
  """
  saving = await sessions.save(live, keep=False, leave=True)
  await asyncio.wait([saving])
  if saving.exception():
    live.active_at = time.monotonic()
