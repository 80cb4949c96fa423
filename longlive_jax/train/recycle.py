"""Error recycling between a training step and its banks.

Errors of a step are taken into the banks while the next one runs: step n adds errors of steps up to
n - 2. Its noise levels are drawn before the step before it is launched, for what a device is asked
later it answers after that step. What is on its way is saved with the banks. Banks and decisions
are the same in every process, whatever the mesh.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from longlive_jax.config import Experiment
from longlive_jax.io.processes import whole
from longlive_jax.train.error_bank import Injection, Recycler
from longlive_jax.train.step import Errors, block_levels
from longlive_jax.types import SAMPLES, SEQ, Array

CLEAN, INDICES, LATENTS, NOISE = "clean", "indices", "latents", "noise"


@dataclasses.dataclass
class Pending:
  """Errors of the last step, not yet in the banks."""

  injection: Injection
  indices: np.ndarray
  made: tuple[Array | np.ndarray, Array | np.ndarray]


class Recycling:
  """Gives each step its errors, and takes in what it made.

  Args:
    experiment: with `train.recycling`.
    mesh: of the run.
  """

  def __init__(self, experiment: Experiment, mesh: Mesh):
    train, model = experiment.train, experiment.model
    self.cfg, self.block_latents = train.recycling, model.block_latents
    self.shape = (
      train.batch,
      experiment.data.blocks * model.block_latents,
      experiment.latent_height,
      experiment.latent_width,
      model.vae.latent_channels,
    )
    dtype = jnp.dtype(model.dtype)
    self.recycler = Recycler(self.cfg, train.seed, self.block_latents, dtype)
    self._levels = block_levels(experiment)
    self._sharding = NamedSharding(mesh, P(SAMPLES, SEQ))
    self._zeros = self._place(np.zeros(self.shape, dtype))
    self._ahead: tuple[int, Array] | None = None
    self._now: tuple[Injection, np.ndarray] | None = None
    self._pending: Pending | None = None

  def _place(self, array: np.ndarray) -> Array:
    return jax.make_array_from_callback(self.shape, self._sharding, lambda index: array[index])

  def errors(self, step: int) -> Errors:
    """What the step after `step` updates adds to noise, latents and context; zeros for nothing."""
    indices = np.repeat(self._levels_of(step), self.block_latents, 1)
    ready = step >= self.cfg.start_step
    injection = self.recycler.draw(indices, self.shape) if ready else Injection(clean=False)
    self._now = injection, indices
    noise, latents, context = (
      self._zeros if error is None else self._place(error) for error in injection.arrays()
    )
    return noise, latents, context

  def _levels_of(self, step: int) -> np.ndarray:
    """Entries of the table that a step draws, `[B, P]`; those of the next one are asked for."""
    ahead, self._ahead = self._ahead, (step + 1, self._levels(step + 1))
    drawn = ahead[1] if ahead is not None and ahead[0] == step else self._levels(step)
    return np.asarray(drawn)

  def take(self, made: tuple[Array, Array]) -> None:
    """Remembers what the step made, and takes in what the one before it did."""
    self.flush()
    if self._now is None:
      raise RuntimeError("errors() comes before take()")
    self._pending = Pending(*self._now, made)

  def flush(self) -> None:
    """Takes in what is remembered."""
    if self._pending is not None:
      held, self._pending = self._pending, None
      self.recycler.keep(held.injection, held.indices, *whole(held.made))

  @property
  def metrics(self) -> dict[str, float]:
    """How full the banks are, and what this step adds."""
    injection = self._now[0] if self._now else Injection()
    given = dict(zip(("noise", "latents", "context"), injection.arrays(), strict=True))
    found = {f"recycling/{name}_error": float(e is not None) for name, e in given.items()}
    kept, rms = self.recycler.latents.summary()
    return found | {"recycling/kept": kept, "recycling/rms": rms}

  def snapshot(self) -> dict[str, np.ndarray]:
    """All that a run needs to go on, by name; see `restore`."""
    arrays = self.recycler.state()
    if (held := self._pending) is not None:
      latents, noise = whole(held.made)
      arrays |= {
        f"pending/{LATENTS}": latents,
        f"pending/{NOISE}": noise,
        f"pending/{INDICES}": held.indices,
        f"pending/{CLEAN}": np.asarray(held.injection.clean),
      }
    return arrays

  def restore(self, arrays: dict[str, np.ndarray]) -> None:
    """Takes over what `snapshot` gave."""
    pending = {n.removeprefix("pending/"): a for n, a in arrays.items() if n.startswith("pending/")}
    self.recycler.restore({n: a for n, a in arrays.items() if not n.startswith("pending/")})
    if pending:
      injection = Injection(clean=bool(pending[CLEAN]))
      self._pending = Pending(injection, pending[INDICES], (pending[LATENTS], pending[NOISE]))
