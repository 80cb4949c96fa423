"""What the server asks of a model and its sessions, and how frames and blocks are counted."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np

from longlive_jax.config import Experiment
from longlive_jax.data.prompts import FRAMES_A_LATENT, Shot

EXTRA_FRAMES = FRAMES_A_LATENT - 1  # that the first latent has fewer than the others


class Session(Protocol):
  """A video in the making; see `sample.session`. One thread calls all of it."""

  @property
  def block(self) -> int:
    """Index of the next block."""
    ...

  def push(self, prompt: str, transition: str = "keep") -> int:
    """Sets the prompt of the blocks to come; returns the first that is made under it."""
    ...

  def next_block(self) -> np.ndarray:
    """Makes a block; returns its frames, uint8 `[T, H, W, 3]`."""
    ...

  def fork(self) -> "Session":
    """An independent session that goes on from here."""
    ...

  def rewind(self, block: int) -> None:
    """Goes back, so that `block` is the next one."""
    ...

  def snapshot(self) -> Callable[[Path], None]:
    """What writes all that is needed to go on from here to a path; in any thread, at any time."""
    ...

  def park(self) -> None:
    """Gives the accelerator's memory back."""
    ...

  def unpark(self) -> None:
    """Takes it again."""
    ...

  def close(self) -> None:
    """Frees everything; the session cannot be used again."""
    ...


class Backend(Protocol):
  """A model that is ready: everything is compiled."""

  def new(self, seed: int, image: np.ndarray | None) -> Session:
    """A session without a prompt; `image` uint8 `[H, W, 3]` becomes the first frame."""
    ...

  def load(self, path: Path) -> Session:
    """A session from what `Session.save` wrote."""
    ...

  def check(self, prompt: str, transition: str) -> None:
    """Raises ValueError unless the text encoder takes this prompt; in any thread."""
    ...

  def memory(self) -> int:
    """Bytes in use: of the accelerator, or of the process where there is none."""
    ...


@dataclasses.dataclass(frozen=True)
class Facts:
  """Sizes of a model's videos; frames and blocks count from 0.

  Attributes:
    name: of the experiment.
    width, height: pixels.
    fps: frames a second.
    block_latents: latents of a block.
    steps: denoising steps of a block.
  """

  name: str
  width: int
  height: int
  fps: float
  block_latents: int
  steps: int

  @classmethod
  def of(cls, experiment: Experiment) -> "Facts":
    """Those of a checked experiment."""
    video, latents = experiment.video, experiment.model.block_latents
    sizes = (video.width, video.height, video.fps)
    return cls(experiment.name, *sizes, latents, experiment.sample.steps)

  @property
  def size(self) -> str:
    """As clients write it, "WIDTHxHEIGHT"."""
    return f"{self.width}x{self.height}"

  @property
  def block_frames(self) -> int:
    """Frames of every block but the first."""
    return FRAMES_A_LATENT * self.block_latents

  def first_frame(self, block: int) -> int:
    """Index of a block's first frame: how many frames come before it."""
    return max(0, block * self.block_frames - EXTRA_FRAMES)

  def block_at(self, frame: int) -> int:
    """The block that holds a frame; also, how many blocks end within the first `frame` frames."""
    return (frame + EXTRA_FRAMES) // self.block_frames

  def blocks_of(self, shot: Shot) -> int:
    """Length of a shot in blocks."""
    return shot.count_blocks(self.fps, self.block_latents)

  def seconds(self, blocks: int) -> float:
    """Length of the first `blocks` blocks of a video."""
    return self.first_frame(blocks) / self.fps

  def most_blocks(self, seconds: float) -> int:
    """How many blocks fit into a length, at least 1."""
    return max(1, self.block_at(math.floor(seconds * self.fps)))
