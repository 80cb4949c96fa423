"""Samplers as linear steps whose coefficients are tables.

Every solver here is one recurrence. With x_i the input of step i, v_i the velocity there, and
`m_i = x_i - sigma_i v_i` its clean estimate,

    c_i     = k x_i + a c_{i-1} + b0 m_i + b1 m_{i-1} + b2 m_{i-2}     (corrector)
    x_{i+1} = p c_i + q0 m_i + q1 m_{i-1}                              (predictor)

A plan holds the coefficients of all steps, so that a step is the same compiled code for any
solver and any i and runs inside `lax.scan`. Coefficients are computed in float64 from
`lambda = ln(1 - sigma) - ln(sigma)`. At the last step sigma is 0 and x_N = m_{N-1} exactly.

    plan = solvers.plan("unipc", steps=4, shift=5.0)
    state = solvers.init(noise)
    for i in range(4):
      velocity = network(state.x, plan.timesteps[i])
      state = solvers.step(plan.row(i), state, velocity)
    clean = state.x

Source: spec/inference.md sections 1.2 and 1.3 (UniPC, order 2, B(h) = e^-h - 1).
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.checks import check_at_least, check_choice
from longlive_jax.model.flow import TIMESTEPS, shift_sigma
from longlive_jax.types import Array, ArrayLike

SOLVERS = ("unipc", "dpmpp", "euler")
COEFFICIENTS = ("sigma", "k", "a", "b0", "b1", "b2", "p", "q0", "q1")


@functools.partial(jax.tree_util.register_dataclass, data_fields=list(COEFFICIENTS), meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Coefficients:
  """Numbers of the recurrence above: float32 `[N]` for all steps, scalars for one."""

  sigma: ArrayLike
  k: ArrayLike
  a: ArrayLike
  b0: ArrayLike
  b1: ArrayLike
  b2: ArrayLike
  p: ArrayLike
  q0: ArrayLike
  q1: ArrayLike


@dataclasses.dataclass(frozen=True)
class SolverPlan:
  """A solver for a number of steps.

  Attributes:
    sigmas: `[N + 1]` float32, falling, the last is 0.
    timesteps: `[N]` float32, what the network is told; whole numbers for unipc and dpmpp.
    coefficients: leaves `[N]`, ready to be scanned over.
  """

  sigmas: np.ndarray
  timesteps: np.ndarray
  coefficients: Coefficients

  @property
  def steps(self) -> int:
    """N."""
    return len(self.timesteps)

  def row(self, i: int) -> Coefficients:
    """Coefficients of step i, as scalars."""
    return jax.tree.map(lambda column: column[i], self.coefficients)


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=["x", "corrected", "m1", "m2"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class SolverState:
  """What a step needs of the steps before it; every field is float32 in the latents' shape.

  Attributes:
    x: input of the next step; after the last step the result.
    corrected: c of the last step.
    m1: clean estimate of the last step.
    m2: clean estimate of the step before.
  """

  x: Array
  corrected: Array
  m1: Array
  m2: Array


def init(noise: Array) -> SolverState:
  """State before the first step, from noise of unit variance."""
  x = noise.astype(jnp.float32)
  nothing = jnp.zeros_like(x)
  return SolverState(x, x, nothing, nothing)


def step(row: Coefficients, state: SolverState, velocity: Array) -> SolverState:
  """One step of any solver.

  Args:
    row: coefficients of this step, scalars (traced or not).
    state: of the step before.
    velocity: the network's prediction at `state.x`, any float dtype.

  Returns:
    The next state; its `m1` is the clean estimate of this step.
  """
  m = state.x - row.sigma * velocity.astype(jnp.float32)
  corrected = row.k * state.x + row.a * state.corrected
  corrected = corrected + row.b0 * m + row.b1 * state.m1 + row.b2 * state.m2
  x = row.p * corrected + row.q0 * m + row.q1 * state.m1
  return SolverState(jnp.asarray(x), jnp.asarray(corrected), jnp.asarray(m), state.m1)


def plan(solver: str, steps: int, shift: float) -> SolverPlan:
  """Tables of a solver.

  Args:
    solver: "unipc", "dpmpp" or "euler".
    steps: N, network evaluations.
    shift: of the noise schedule.

  Raises:
    ValueError: an unknown solver, steps < 1, or shift <= 0.
  """
  check_choice("sample.solver", solver, SOLVERS)
  check_at_least("sample.steps", steps, 1)
  if not shift > 0:
    raise ValueError(f"model.shift={shift} must be positive")
  # UniPC starts at the top of a training grid that ends at 1 - 1/1000, stored in float32
  top = float(np.float32(1.0 - 1.0 / TIMESTEPS)) if solver == "unipc" else 1.0
  sigmas = shift_sigma(np.linspace(top, 0.0, steps + 1), shift)
  timesteps = TIMESTEPS * sigmas[:-1]
  if solver != "euler":
    timesteps = np.trunc(timesteps)
  rows = {"unipc": _unipc, "dpmpp": _dpmpp, "euler": _euler}[solver](sigmas)
  table = {name: np.zeros(steps, np.float32) for name in COEFFICIENTS}
  for i, row in enumerate(rows):
    table["sigma"][i] = sigmas[i]
    for name, value in row.items():
      table[name][i] = value
  return SolverPlan(sigmas.astype(np.float32), timesteps.astype(np.float32), Coefficients(**table))


def _log_ratio(sigmas: np.ndarray) -> np.ndarray:
  """lambda = ln(1 - sigma) - ln(sigma): -inf at sigma 1, +inf at sigma 0."""
  with np.errstate(divide="ignore"):
    return np.log1p(-sigmas) - np.log(sigmas)


def _first_order(sigma: float, after: float) -> dict[str, float]:
  """Euler's step from sigma to `after`, written with the clean estimate."""
  return {"k": 1.0, "p": after / sigma, "q0": 1.0 - after / sigma}


def _euler(sigmas: np.ndarray) -> list[dict[str, float]]:
  return [_first_order(sigma, after) for sigma, after in itertools.pairwise(sigmas)]


def _second_order(sigmas: np.ndarray, level: np.ndarray, i: int) -> dict[str, float]:
  """Predictor from step i with a slope through m_i and m_{i-1}."""
  h = level[i + 1] - level[i]
  gain = -(1.0 - sigmas[i + 1]) * np.expm1(-h)
  slope = 0.5 * gain * h / (level[i] - level[i - 1])
  return {"k": 1.0, "p": sigmas[i + 1] / sigmas[i], "q0": gain + slope, "q1": -slope}


def _dpmpp(sigmas: np.ndarray) -> list[dict[str, float]]:
  """DPM-Solver++ (2M): order 1 at both ends, order 2 between, no corrector."""
  level, steps = _log_ratio(sigmas), len(sigmas) - 1
  inner = range(1, steps - 1)
  return [
    _second_order(sigmas, level, i) if i in inner else _first_order(sigmas[i], sigmas[i + 1])
    for i in range(steps)
  ]


def _corrector(sigmas: np.ndarray, level: np.ndarray, i: int, order: int) -> dict[str, float]:
  """c_i from c_{i-1} once m_i is known; `order` is that of the step that led to x_i."""
  h = level[i] - level[i - 1]
  b = np.expm1(-h)
  gain = -(1.0 - sigmas[i]) * b
  row = {"k": 0.0, "a": sigmas[i] / sigmas[i - 1]}
  if order == 1:
    return {**row, "b0": 0.5 * gain, "b1": 0.5 * gain}
  r = (level[i - 2] - level[i - 1]) / h
  phi = (b / -h - 1.0) / -h  # phi_2(-h) = (e^-h - 1 + h) / h^2
  moments = np.array([phi * -h, 2.0 * (phi - 0.5)]) / b
  past, own = np.linalg.solve(np.array([[1.0, 1.0], [r, 1.0]]), moments)
  return {
    **row,
    "b0": gain * own,
    "b1": gain * (1.0 - past / r - own),
    "b2": gain * past / r,
  }


def _unipc(sigmas: np.ndarray) -> list[dict[str, float]]:
  """UniPC of order 2 with corrector; the first and last steps have order 1."""
  level, steps = _log_ratio(sigmas), len(sigmas) - 1
  orders = [min(2, steps - i, i + 1) for i in range(steps)]
  rows = []
  for i, order in enumerate(orders):
    first = _first_order(sigmas[i], sigmas[i + 1])
    row = _second_order(sigmas, level, i) if order == 2 else first
    if i:
      row |= _corrector(sigmas, level, i, orders[i - 1])
    rows.append(row)
  return rows
