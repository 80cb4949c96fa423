"""Encoded frames that the viewer has not played, kept for a client that comes back."""

import collections
import json
from collections.abc import Callable, Iterator, Sequence

from longlive_jax.serve.contract import Facts
from longlive_jax.serve.errors import Refused
from longlive_jax.serve.frames import unpack
from longlive_jax.serve.outbox import Delivery


class Reel:
  """The blocks between what was played and what was made. Belongs to the event loop.

  Args:
    facts: sizes of the video.
    position: frames played.
    counted: called with the bytes of each block that has been sent.

  Attributes:
    position: frames played; never more than were sent.
    sent: frames that have left, on whatever connection.
  """

  def __init__(self, facts: Facts, position: int, counted: Callable[[int], object]):
    self._facts, self._counted = facts, counted
    self.position = self.sent = position
    self._epoch = 0
    self._kept: collections.deque[Delivery] = collections.deque()

  def __iter__(self) -> Iterator[Delivery]:
    return iter(self._kept)

  def add(self, messages: Sequence[bytes]) -> Delivery:
    """Keeps the binary messages of a block."""
    packed, epoch, size = unpack(messages[0]), self._epoch, sum(map(len, messages))
    end = self._facts.first_frame(packed.block + 1)
    header = {
      "type": "frames",
      "block": packed.block,
      "first_frame": packed.first_frame,
      "count": end - packed.first_frame,
      "messages": len(messages),
      "bytes": size,
      "format": packed.format,
    }

    def sent() -> None:
      if epoch == self._epoch:
        self.sent = max(self.sent, end)
      self._counted(size)

    delivery = Delivery(packed.block, end, json.dumps(header), tuple(messages), sent)
    self._kept.append(delivery)
    return delivery

  def played(self, position: int, *, back: bool) -> None:
    """Notes that the viewer has played this many frames of the video.

    Args:
      position: frames.
      back: whether it may be less than before.

    Raises:
      Refused: 400, so many frames have not been sent.
    """
    if not 0 <= position <= self.sent:
      message = f"position={position} must be from 0 to {self.sent}, the frames sent"
      raise Refused(400, "bad_position", message, "position")
    self.position = position if back else max(position, self.position)
    while self._kept and self._kept[0].end <= self.position:
      self._kept.popleft()

  def rewind(self, block: int) -> None:
    """Forgets frames of this block and later ones, also those that are on their way."""
    first = self._facts.first_frame(block)
    self._epoch += 1
    self.sent, self.position = min(self.sent, first), min(self.position, first)
    self._kept = collections.deque(d for d in self._kept if d.block < block)

  def messages(self) -> list[bytes]:
    """All binary messages, in order."""
    return [message for delivery in self._kept for message in delivery.messages]

  def restore(self, messages: Sequence[bytes]) -> None:
    """Takes back what `messages` gave; counts as sent, since the viewer may have seen it."""
    blocks: dict[int, list[bytes]] = {}
    for message in messages:
      blocks.setdefault(unpack(message).block, []).append(message)
    for block in sorted(blocks):
      self.sent = max(self.sent, self.add(blocks[block]).end)
