"""A model that costs what a test says, and counts what is made and freed."""

import dataclasses
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from longlive_jax.serve.contract import Facts, Session

FACTS = Facts("fake", width=32, height=16, fps=24.0, block_latents=2, steps=4)


def picture(seed: int, block: int, prompt: str, facts: Facts = FACTS) -> np.ndarray:
  """The frames that a fake session makes of a block."""
  count = facts.block_frames - (3 if block == 0 else 0)
  rng = np.random.default_rng([seed, block, len(prompt)])
  coarse = rng.integers(0, 256, (count, facts.height // 8, facts.width // 8, 3), np.uint8)
  return coarse.repeat(8, 1).repeat(8, 2)


@dataclasses.dataclass
class FakeBackend:
  """Makes fake sessions.

  Attributes:
    block_seconds: that a block takes.
    fails_at: (prompt, error): blocks under this prompt fail.
    made, closed: sessions.
    parked: how many are.
    most_awake: at a time, of those that made blocks.
    threads: names of the threads that called.
    writers: names of the threads that wrote sessions.
    disk: while it is not set, writing waits.
  """

  facts: Facts = FACTS
  block_seconds: float = 0.0
  fails_at: tuple[str, BaseException] = ("explode", FloatingPointError("numbers are not finite"))
  made: int = 0
  closed: int = 0
  parked: int = 0
  most_awake: int = 0
  threads: set[str] = dataclasses.field(default_factory=set)
  writers: set[str] = dataclasses.field(default_factory=set)
  disk: threading.Event = dataclasses.field(default_factory=threading.Event)
  log: list[tuple[int, int]] = dataclasses.field(default_factory=list)

  def __post_init__(self) -> None:
    self.disk.set()

  def new(self, seed: int, image: np.ndarray | None) -> Session:
    """A session."""
    return FakeSession(self, seed, image)

  def load(self, path: Path) -> Session:
    """A session that was saved."""
    tree = json.loads(path.read_text())
    session = FakeSession(self, tree["seed"], None)
    session.block, session.prompt = tree["block"], tree["prompt"]
    return session

  def check(self, prompt: str, transition: str) -> None:
    """At most 1000 tokens, one a character."""
    if len(prompt) > 1000:
      raise ValueError(f"the prompt has {len(prompt)} tokens; at most 1000 are allowed")

  def memory(self) -> int:
    """A number."""
    return 1234


class FakeSession:
  """A session whose pictures are drawn at random, keyed by seed, block and prompt."""

  def __init__(self, backend: FakeBackend, seed: int, image: np.ndarray | None):
    self.backend, self.seed, self.image = backend, seed, image
    self.block, self.prompt = 0, ""
    self.is_parked = self.is_closed = False
    backend.made += 1

  def _touch(self) -> None:
    assert not self.is_closed, "used after close"
    self.backend.threads.add(threading.current_thread().name)

  def push(self, prompt: str, transition: str = "keep") -> int:
    """Notes the prompt."""
    self._touch()
    if prompt == "refused by the model":
      raise ValueError("the model does not like this prompt")
    if prompt == "broken":
      raise KeyError("something odd")
    self.prompt = prompt
    return self.block

  def next_block(self) -> np.ndarray:
    """Random frames; the first is the image if one was given."""
    self._touch()
    time.sleep(self.backend.block_seconds)
    prompt, error = self.backend.fails_at
    if self.prompt == prompt:
      raise error
    assert not self.is_parked, "used while parked"
    held = self.backend.made - self.backend.closed - self.backend.parked
    self.backend.most_awake = max(self.backend.most_awake, held)
    frames = picture(self.seed, self.block, self.prompt, self.backend.facts)
    if self.block == 0 and self.image is not None:
      frames[0] = self.image
    self.backend.log.append((self.seed, self.block))
    self.block += 1
    return frames

  def fork(self) -> "FakeSession":
    """A copy."""
    self._touch()
    other = FakeSession(self.backend, self.seed, self.image)
    other.block, other.prompt = self.block, self.prompt
    return other

  def rewind(self, block: int) -> None:
    """Goes back by 3 blocks at most."""
    self._touch()
    if block < self.block - 3:
      raise ValueError(f"the oldest block to go back to is {self.block - 3}")
    self.block = block

  def snapshot(self) -> Callable[[Path], object]:
    """Writes a file, when `backend.disk` allows it."""
    self._touch()
    text = json.dumps({"seed": self.seed, "block": self.block, "prompt": self.prompt})

    def write(path: Path) -> None:
      self.backend.writers.add(threading.current_thread().name)
      self.backend.disk.wait(20.0)
      path.write_text(text)

    return write

  def park(self) -> None:
    """Counts."""
    self._touch()
    assert not self.is_parked
    self.is_parked = True
    self.backend.parked += 1

  def unpark(self) -> None:
    """Counts."""
    self._touch()
    assert self.is_parked
    self.is_parked = False
    self.backend.parked -= 1

  def close(self) -> None:
    """Counts; must come once."""
    assert not self.is_closed, "closed twice"
    self.is_closed = True
    self.backend.parked -= self.is_parked
    self.backend.closed += 1
