"""What clients may ask for, all in one place; each field is a flag of `launch.serve`."""

import dataclasses
import time
from collections.abc import Callable

from longlive_jax.checks import check_at_least

Clock = Callable[[], float]


@dataclasses.dataclass(frozen=True)
class Limits:
  """Limits of a server.

  Attributes:
    sessions: live sessions at a time, parked ones included.
    resident_sessions: of those and of the videos being made, on the accelerator; 0: all.
    rewind_blocks: that a session can go back.
    videos_at_once: videos of the REST interface that are made at a time.
    queue: videos that wait for their turn.
    videos_kept: finished videos; the oldest give way.
    saved_sessions: sessions on disk; the oldest give way.
    connections: open connections; the WebSockets among them are at most this minus 8, so that
      HTTP is always answered.
    prompt_chars: characters of a prompt.
    seconds: length of a video or a session.
    request_bytes: of a request's body or a WebSocket message.
    messages_a_second: of a WebSocket client, on average; twice as many at once.
    ahead: blocks made beyond what the viewer has played.
    park_seconds: idle time after which a session leaves the accelerator.
    disk_seconds: idle time after which it leaves memory, if there is a state folder.
    resume_seconds: how long a session outlives its connection.
    patience_seconds: for the first message of a WebSocket; six times as long for the body of a
      request. For headers it is `protocol.HEADER_SECONDS`.
  """

  sessions: int = 8
  resident_sessions: int = 0
  rewind_blocks: int = 3
  videos_at_once: int = 2
  queue: int = 32
  videos_kept: int = 100
  saved_sessions: int = 100
  connections: int = 64
  prompt_chars: int = 2000
  seconds: float = 300.0
  request_bytes: int = 8 << 20
  messages_a_second: float = 30.0
  ahead: int = 2
  park_seconds: float = 30.0
  disk_seconds: float = 300.0
  resume_seconds: float = 600.0
  patience_seconds: float = 10.0

  def __post_init__(self) -> None:
    for field in dataclasses.fields(self):
      least = LEAST.get(field.name, 1)
      value = getattr(self, field.name)
      check_at_least(f"--{field.name}", value, least)
      if value > MOST:
        raise ValueError(f"--{field.name}={value} must be at most {MOST:g}")

  @property
  def websockets(self) -> int:
    """Open WebSockets at a time."""
    return self.connections - SPARE_CONNECTIONS


SPARE_CONNECTIONS = 8
MOST = 1e12  # of any limit: what is computed from it stays finite
LEAST: dict[str, float] = {
  "resident_sessions": 0,
  "rewind_blocks": 0,
  "queue": 0,
  "saved_sessions": 0,
  "connections": SPARE_CONNECTIONS + 1,
  "seconds": 0.1,
  "request_bytes": 1024,
  "messages_a_second": 0.1,
  "park_seconds": 0.0,
  "disk_seconds": 0.0,
  "resume_seconds": 0.0,
  "patience_seconds": 0.1,
}


class Rate:
  """A bucket of tokens: `a_second` on average, twice as many at once.

  Args:
    a_second: > 0.
    clock: seconds.
  """

  def __init__(self, a_second: float, clock: Clock = time.monotonic):
    self._a_second, self._clock = a_second, clock
    self._most = max(1.0, 2 * a_second)
    self._left, self._seen = self._most, clock()

  def take(self) -> bool:
    """Takes a token; returns whether there was one."""
    now = self._clock()
    self._left = min(self._most, self._left + (now - self._seen) * self._a_second)
    self._seen = now
    if self._left < 1.0:
      return False
    self._left -= 1.0
    return True
