"""What waits to be sent on one connection: bounded, so that a slow client costs no memory.

Frames are bounded by flow control (`live`); events by `MOST`, because messages of the client are
not read while half of that waits.
"""

import asyncio
import collections
import dataclasses
import json
from collections.abc import Callable

MOST = 256  # events


@dataclasses.dataclass(frozen=True)
class Delivery:
  """The frames of a block.

  Attributes:
    block: index.
    end: index of the frame after its last.
    header: JSON event that goes before.
    messages: binary messages.
    sent: called when all of it has been sent.
  """

  block: int
  end: int
  header: str
  messages: tuple[bytes, ...]
  sent: Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Closing:
  """The end of a connection: close code and reason."""

  code: int
  reason: str


Item = str | Delivery | Closing


class Outbox:
  """A queue with one reader; belongs to the event loop."""

  def __init__(self) -> None:
    self._items: collections.deque[Item] = collections.deque()
    self._changed = asyncio.Event()
    self.closed = False

  def event(self, kind: str, **fields: object) -> None:
    """Queues a JSON event; a client that lets too many wait is cut off."""
    self.put(json.dumps({"type": kind} | fields))
    if len(self._items) > MOST:
      self._items.clear()
      self.close(1008, "events are not read")

  def put(self, item: Item) -> None:
    """Queues something, unless the end has been queued."""
    if not self.closed:
      self._items.append(item)
      self._changed.set()

  def close(self, code: int, reason: str) -> None:
    """Queues the end of the connection; what comes later is dropped."""
    self.put(Closing(code, reason))
    self.closed = True

  def drop_frames(self, block: int) -> None:
    """Forgets frames of this block and later ones."""
    kept = [x for x in self._items if not (isinstance(x, Delivery) and x.block >= block)]
    self._items = collections.deque(kept)

  async def get(self) -> Item:
    """The next item, once there is one."""
    while not self._items:
      self._changed.clear()
      await self._changed.wait()
    item = self._items.popleft()
    self._changed.set()  # somebody may wait for room
    return item

  async def room(self) -> None:
    """Waits until less than half of it is used."""
    while len(self._items) > MOST // 2 and not self.closed:
      self._changed.clear()
      await self._changed.wait()
