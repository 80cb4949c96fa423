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


class Hosted:
  """Brings a session back when it is wanted, and frees it exactly once.

  Args:
    make: makes the session when it is first wanted.

  Attributes:
    state: "new", "awake", "parked", "disk" or "closed".
    epoch: how often it was rewound.
  """

  def __init__(self, make: Make):
    self._make: Make = make
    self._session: Session | None = None
    self.state, self.epoch = "new", 0

  def wake(self) -> Session:
    """The session, ready for use.

    Raises:
      RuntimeError: it is closed.
    """
    if self.state == "closed":
      raise RuntimeError("the session is closed")
    if self._session is None:
      self._session = self._make()
    elif self.state == "parked":
      self._session.unpark()
    self.state = "awake"
    return self._session

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

  def save(self, path: Path) -> None:
    """Writes the session; a parked one stays parked."""
    session = self._session or self.wake()
    session.save(path)

  def leave(self, load: Make) -> None:
    """Frees the session, which has been saved; `load` brings it back."""
    if self._session is not None:
      self._session.close()
      self._session = None
    self._make, self.state = load, "disk"

  def close(self) -> None:
    """Frees the session for good; a second call does nothing."""
    session, self._session, self.state = self._session, None, "closed"
    if session is not None:
      session.close()
