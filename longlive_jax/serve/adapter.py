"""The sampler as a `Backend`: builds it, compiles everything, and makes its sessions."""

import dataclasses
import os
import resource
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from longlive_jax.build import Pipeline
from longlive_jax.config import Experiment
from longlive_jax.data.prompts import Shot, first_block
from longlive_jax.sample.sampler import Sampler
from longlive_jax.sample.session import Session
from longlive_jax.serve.contract import Backend

STATM = Path("/proc/self/statm")


@dataclasses.dataclass(frozen=True)
class SamplerBackend:
  """Sessions of one sampler.

  Attributes:
    sampler: its executables are made by `warm_up`.
    rewind_blocks: that a session can go back, each at the cost of host memory; see `Session`.
  """

  sampler: Sampler
  rewind_blocks: int

  def new(self, seed: int, image: np.ndarray | None) -> Session:
    """A session without a prompt."""
    return Session(self.sampler, seed=seed, image=image, keep=self.rewind_blocks)

  def load(self, path: Path) -> Session:
    """A saved session."""
    return Session.load(self.sampler, path, keep=self.rewind_blocks)

  def check(self, prompt: str, transition: str) -> None:
    """Raises ValueError unless the text encoder takes this prompt."""
    shot = Shot(prompt, transition=transition)
    before = first_block(shot, None, "")  # a cut begins with its prefix only after a first block
    first = first_block(shot, before, self.sampler.experiment.sample.cut_prefix)
    self.sampler.models.tokenizer(sorted({prompt, first.prompt}))

  def memory(self) -> int:
    """Bytes in use on the first device, or of the process where devices do not tell."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_in_use" in stats:
      return int(stats["bytes_in_use"])
    if STATM.is_file():
      return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

  def warm_up(self) -> None:
    """Does once whatever a session may do, so that nothing compiles later."""
    video = self.sampler.experiment.video
    image = np.zeros((video.height, video.width, 3), np.uint8)
    session = self.new(0, image)
    session.push("a first frame", "keep")
    session.next_block()
    session.park()
    session.unpark()
    other = session.fork()
    other.push("a first frame", "recache")
    other.next_block()
    if self.rewind_blocks:
      other.rewind(1)
    other.close()
    session.close()


def builder(experiment: Experiment, rewind_blocks: int) -> Callable[[], Backend]:
  """What makes the model of an experiment, to be called in the model's thread.

  Args:
    experiment: checked experiment.
    rewind_blocks: that a session can go back.
  """

  def build() -> Backend:
    backend = SamplerBackend(Pipeline.from_config(experiment), rewind_blocks)
    backend.warm_up()
    return backend

  return build
