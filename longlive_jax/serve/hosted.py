"""A session as the model's thread keeps it: in use, parked, or on disk alone.

All methods are called in that thread; `state` may be read anywhere.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np

from longlive_jax.serve.contract import Session

Make = Callable[[], Session]


@dataclasses.dataclass(frozen=True)
class Made:
  """A block that came out.

  Attributes:
    block: its index.
    epoch: how often the session had been rewound.
    frames: uint8 `[T, H, W, 3]`.
  """

  block: int
  epoch: int
  frames: np.ndarray


@dataclasses.dataclass(frozen=True)
class Copied:
  """A session as it was, in host memory.

  Attributes:
    write: writes it to a path, in any thread.
    uses: of the session until then.
  """

  write: Callable[[Path], None]
  uses: int


class Residents:
  """The sessions on the accelerator; the one whose last use is longest ago gives way to another.

  Args:
    most: at a time, and one more while a fork is made; 0: as many as there are.

  Attributes:
    freed: how many sessions have left the process's memory.
  """

  def __init__(self, most: int):
    self._most, self.freed = most, 0
    self._awake: dict[Hosted, None] = {}  # by their last use

  def make_room(self) -> None:
    """Parks sessions until another one may come."""
    while self._most and len(self._awake) >= self._most:
      self._park_oldest()

  def used(self, hosted: "Hosted") -> None:
    """Notes that a session is there, and used."""
    self.gone(hosted)
    self._awake[hosted] = None
    while self._most and len(self._awake) > self._most:
      self._park_oldest()

  def gone(self, hosted: "Hosted") -> None:
    """Notes that a session has left."""
    self._awake.pop(hosted, None)

  def _park_oldest(self) -> None:
    oldest = next(iter(self._awake))
    try:
      oldest.park()
    except ValueError:  # the model failed it: it holds nothing, and is about to be closed
      self.gone(oldest)


class Hosted:
  """Brings a session back when it is wanted, and frees it exactly once.

  Args:
    make: makes the session when it is first wanted.
    residents: all sessions on the accelerator.

  Attributes:
    state: "new", "awake", "parked", "disk" or "closed".
    epoch: how often it was rewound.
    uses: how often it was wanted.
  """

  def __init__(self, make: Make, residents: Residents):
    self._make, self._residents = make, residents
    self._session: Session | None = None
    self.state, self.epoch, self.uses = "new", 0, 0

  def wake(self) -> Session:
    """The session, ready for use.

    Raises:
      RuntimeError: it is closed.
    """
    if self.state == "closed":
      raise RuntimeError("the session is closed")
    session, self.uses = self._session, self.uses + 1
    if session is None or self.state == "parked":
      self._residents.make_room()
      if session is None:
        session = self._session = self._make()
      else:
        session.unpark()
    self.state = "awake"
    self._residents.used(self)
    return session

  def next_block(self) -> Made:
    """Makes a block."""
    session = self.wake()
    block = session.block
    return Made(block, self.epoch, session.next_block())

  def push(self, prompt: str, transition: str) -> int:
    """Sets the prompt; returns the first block that is made under it."""
    return self.wake().push(prompt, transition)

  def rewind(self, block: int) -> int:
    """Goes back to a block; returns the new epoch."""
    self.wake().rewind(block)
    self.epoch += 1
    return self.epoch

  def fork(self, block: int | None) -> Session:
    """A session that goes on from here, or from an earlier block."""
    session = self.wake()
    child = session.fork()
    if block is None or block == session.block:
      return child
    done = False
    try:
      child.rewind(block)
      done = True
    finally:
      if not done:
        child.close()
    return child

  def park(self) -> None:
    """Leaves the accelerator, if it is there."""
    if self.state == "awake" and self._session is not None:
      self._session.park()
      self.state = "parked"
      self._residents.gone(self)

  def copied(self) -> Copied:
    """The session as it is, to be saved; a parked one stays parked."""
    session = self._session or self.wake()
    return Copied(session.snapshot(), self.uses)

  def leave(self, load: Make, uses: int) -> None:
    """Frees the session, of which `load` gives what it was after so many uses.

    It stays if it has been used since then, or is closed.
    """
    if self._session is not None and self.uses == uses:
      self._session.close()
      self._session, self._make, self.state = None, load, "disk"
      self._residents.gone(self)
      self._residents.freed += 1

  def close(self) -> None:
    """Frees the session for good; a second call does nothing."""
    session, self._session, self.state = self._session, None, "closed"
    self._residents.gone(self)
    if session is not None:
      session.close()
      self._residents.freed += 1
