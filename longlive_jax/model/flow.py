"""Flow matching: the path between clean latents and noise, and its tables.

`noisy = (1 - sigma) clean + sigma noise`, the network predicts `velocity = noise - clean`, and
`timestep = 1000 sigma` is what it is told. Levels are spaced evenly in u and shifted towards
noise, `sigma = s u / (1 + (s - 1) u)`. Tables are computed in float64 and stored in float32.

Source: spec/training.md section 2, spec/models.md section 7.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.checks import check_at_least
from longlive_jax.types import Array, ArrayLike

TIMESTEPS = 1000  # a timestep is this many times sigma


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["sigmas", "timesteps", "weights"],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Table:
  """Noise levels in falling order, index 0 is pure noise.

  Attributes:
    sigmas: `[K]` float32 in [0, 1].
    timesteps: `[K]` float32, 1000 sigma.
    weights: `[K]` float32, weight of the loss; mean 1.
  """

  sigmas: ArrayLike
  timesteps: ArrayLike
  weights: ArrayLike

  def below(self, timestep: float) -> "Table":
    """The levels with at most this timestep.

    Raises:
      ValueError: there is none.
    """
    kept = np.asarray(self.timesteps) <= timestep
    if not kept.any():
      least = float(np.min(self.timesteps))
      raise ValueError(f"train.context_noise={timestep} is below the least noise, {least:.3g}")
    return jax.tree.map(lambda a: np.asarray(a)[kept], self)


def shift_sigma(u: np.ndarray, shift: float) -> np.ndarray:
  """Moves evenly spaced levels `u` in [0, 1] towards noise; shift 1 changes nothing."""
  return shift * u / (1.0 + (shift - 1.0) * u)


def bell_weights(timesteps: np.ndarray, steps: int) -> np.ndarray:
  """Loss weights `exp(-2 ((t - K/2) / K)^2)`, less their minimum, with sum K (float64).

  The bell underflows in float32, as in the original: short tables have weights 0 (they are not
  trained on, and their bell is far narrower than the timesteps).
  """
  bell = np.exp(-2.0 * ((timesteps - steps / 2) / steps) ** 2).astype(np.float32)
  bell = bell.astype(np.float64) - bell.min()
  total = bell.sum()
  return bell * (steps / total) if total > 0 else bell


def flow_match_table(steps: int, shift: float, extra: bool = True) -> Table:
  """The table of the original's flow matching scheduler.

  Args:
    steps: K, how many levels.
    shift: of the schedule, >= 1 leans to noise.
    extra: levels are those of K + 1 points from 1 to 0 without the last, so that 0 is not among
      them; otherwise K points from 1 to 0 inclusive.

  Returns:
    Table of K levels.

  Raises:
    ValueError: steps < 1 or shift <= 0.
  """
  check_at_least("steps", steps, 1)
  if not shift > 0:
    raise ValueError(f"model.shift={shift} must be positive")
  u = np.linspace(1.0, 0.0, steps + 1)[:-1] if extra else np.linspace(1.0, 0.0, steps)
  sigmas = shift_sigma(u, shift)
  timesteps = TIMESTEPS * sigmas
  weights = bell_weights(timesteps, steps)
  return Table(*(a.astype(np.float32) for a in (sigmas, timesteps, weights)))


@functools.lru_cache(maxsize=16)
def training_table(shift: float, steps: int = TIMESTEPS, weighting: str = "bell") -> Table:
  """The levels that training draws from; entry k has u = 1 - k / steps.

  The smallest level is not 0 (0.00498 at shift 5): clean latents are off this table.

  Args:
    shift: of the schedule.
    steps: K, how many levels.
    weighting: of the loss: "bell", the original's, which is 0 at the highest level; or "uniform".
  """
  table = flow_match_table(steps, shift, extra=True)
  if weighting == "bell":
    return table
  return dataclasses.replace(table, weights=np.ones_like(table.weights))


def nearest_index(table: Table, timestep: ArrayLike | float) -> Array:
  """Index of the entry whose timestep is nearest, the first one on a tie.

  Args:
    table: K levels.
    timestep: any shape, float32.

  Returns:
    int32 of the same shape. Timestep 0 gives the last entry, whose sigma is not 0.
  """
  distance = jnp.abs(jnp.asarray(table.timesteps) - jnp.asarray(timestep, jnp.float32)[..., None])
  return jnp.argmin(distance, -1).astype(jnp.int32)


def sigma_at(table: Table, timestep: ArrayLike | float) -> Array:
  """Sigma of the nearest entry, for timesteps of any shape."""
  return jnp.asarray(table.sigmas)[nearest_index(table, timestep)]


def weight_at(table: Table, timestep: ArrayLike) -> Array:
  """Loss weight of the nearest entry, for timesteps of any shape."""
  return jnp.asarray(table.weights)[nearest_index(table, timestep)]


def _beside(sigma: ArrayLike, x: Array) -> Array:
  """Appends axes of size one to sigma until it broadcasts against x."""
  sigma = jnp.asarray(sigma, jnp.float32)
  return sigma.reshape(sigma.shape + (1,) * (x.ndim - sigma.ndim))


def add_noise(clean: Array, noise: Array, sigma: ArrayLike) -> Array:
  """`(1 - sigma) clean + sigma noise`.

  Args:
    clean: `[B, F, H, W, C]` (any shape that starts with sigma's).
    noise: the same shape, unit variance.
    sigma: `[B, F]` in [0, 1], or a scalar.

  Returns:
    Same shape, in noise's dtype; float32 arithmetic.
  """
  sigma = _beside(sigma, clean)
  mixed = (1.0 - sigma) * clean.astype(jnp.float32) + sigma * noise.astype(jnp.float32)
  return mixed.astype(noise.dtype)


def velocity_target(clean: Array, noise: Array) -> Array:
  """What the network learns to predict, `noise - clean`."""
  return noise - clean


def to_clean(noisy: Array, velocity: Array, sigma: ArrayLike) -> Array:
  """Clean estimate `noisy - sigma velocity` in float32; sigma `[B, F]` or a scalar."""
  wide = velocity.astype(jnp.float32)
  return noisy.astype(jnp.float32) - _beside(sigma, wide) * wide


def to_velocity(noisy: Array, clean: Array, sigma: ArrayLike) -> Array:
  """Velocity `(noisy - clean) / sigma` in float32; sigma `[B, F]` or a scalar, not 0."""
  return (noisy.astype(jnp.float32) - clean.astype(jnp.float32)) / _beside(sigma, noisy)
