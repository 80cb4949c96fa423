"""Solvers against closed forms and against exact solutions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.model import solvers

SHIFT = 5.0


def weights_of(plan: solvers.SolverPlan) -> dict[str, np.ndarray]:
  """Writes x_i, c_i and the result as combinations of (z, m_0 .. m_{N-1})."""
  rows = jax.tree.map(lambda a: np.asarray(a, np.float64), plan.coefficients)
  basis = np.eye(plan.steps + 1)
  x = corrected = basis[0]
  m1 = m2 = np.zeros(plan.steps + 1)
  found = {}
  for i in range(plan.steps):
    m = basis[i + 1]
    found[f"x{i}"] = x
    corrected = rows.k[i] * x + rows.a[i] * corrected
    corrected = corrected + rows.b0[i] * m + rows.b1[i] * m1 + rows.b2[i] * m2
    found[f"c{i}"] = corrected
    x = rows.p[i] * corrected + rows.q0[i] * m + rows.q1[i] * m1
    m1, m2 = m, m1
  found["result"] = x
  return found


CLOSED_FORMS = {
  1: {"result": [0, 1]},
  2: {"result": [0, 0, 1]},
  3: {
    "x1": [0.909025, 0.090975],
    "x2": [0.714122, 0.011854, 0.274023],
    "result": [0, 0, 0, 1],
  },
  4: {
    "x1": [0.937453, 0.062547],
    "c1": [0.937453, 0.031273, 0.031273],
    "x2": [0.833222, 0.017307, 0.149471],
    "c2": [0.833222, 0.027252, 0.076854, 0.062671],
    "x3": [0.624812, 0.020436, -0.067583, 0.422335],
    "result": [0, 0, 0, 0, 1],
  },
}


@pytest.mark.parametrize("steps", CLOSED_FORMS)
def test_unipc_has_the_closed_forms(steps):
  found = weights_of(solvers.plan("unipc", steps, SHIFT))
  for name, expected in CLOSED_FORMS[steps].items():
    wanted = np.pad(np.array(expected, float), (0, steps + 1 - len(expected)))
    np.testing.assert_allclose(found[name], wanted, atol=1e-6, err_msg=name)


TIMESTEPS = {
  ("unipc", 1): [999],
  ("unipc", 2): [999, 833],
  ("unipc", 3): [999, 908, 713],
  ("unipc", 4): [999, 937, 833, 624],
  ("unipc", 8): [999, 972, 937, 892, 833, 749, 624, 416],
  ("dpmpp", 4): [1000, 937, 833, 625],
  ("euler", 4): [1000, 937.5, 833.3333, 625],
}


@pytest.mark.parametrize(("solver", "steps"), TIMESTEPS)
def test_network_is_told_the_recorded_timesteps(solver, steps):
  plan = solvers.plan(solver, steps, SHIFT)
  np.testing.assert_allclose(plan.timesteps, TIMESTEPS[solver, steps], rtol=1e-6)
  assert plan.timesteps.dtype == plan.sigmas.dtype == np.float32
  assert plan.sigmas.shape == (steps + 1,) and plan.sigmas[-1] == 0


def test_unipc_sigmas_have_the_recorded_values():
  sigmas = solvers.plan("unipc", 4, SHIFT).sigmas
  expected = np.array([0.9997998476, 0.9372654557, 0.8330553770, 0.6246873140, 0], np.float32)
  np.testing.assert_array_max_ulp(sigmas, expected, 1)


@pytest.mark.parametrize("solver", solvers.SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_the_result_is_the_last_clean_estimate_exactly(solver, steps):
  plan = solvers.plan(solver, steps, SHIFT)
  state = solvers.init(jax.random.normal(jax.random.key(0), (2, 3)))
  for i in range(steps):
    state = solvers.step(plan.row(i), state, jnp.sin(7 * state.x + i))
  np.testing.assert_array_equal(state.x, state.m1)


@pytest.mark.parametrize("solver", solvers.SOLVERS)
def test_every_solver_is_consistent(solver):
  """A perfect constant clean estimate leads straight down the path to it."""
  plan = solvers.plan(solver, 6, SHIFT)
  noise, clean = jnp.array([1.0, -2.0]), jnp.array([0.3, 0.4])
  state = solvers.init((1 - plan.sigmas[0]) * clean + plan.sigmas[0] * noise)
  for i in range(6):
    state = solvers.step(plan.row(i), state, noise - clean)
    path = (1 - plan.sigmas[i + 1]) * clean + plan.sigmas[i + 1] * noise
    np.testing.assert_allclose(state.x, path, atol=2e-6)


def error_half_way(solver: str, steps: int) -> float:
  """Error after half the steps for the clean estimate m = sin(ratio), ratio = (1 - s) / s.

  With that m the exact solution is x / s = x_0 / s_0 + cos(ratio_0) - cos(ratio).
  """
  plan = solvers.plan(solver, steps, 1.0)
  sigmas = plan.sigmas.astype(np.float64)
  ratio = (1 - sigmas[:-1]) / sigmas[:-1]
  rows = jax.tree.map(lambda a: np.asarray(a, np.float64), plan.coefficients)
  x = c = 1.0
  m1 = m2 = 0.0
  for i in range(steps // 2):
    m = np.sin(ratio[i])
    c = rows.k[i] * x + rows.a[i] * c + rows.b0[i] * m + rows.b1[i] * m1 + rows.b2[i] * m2
    x = rows.p[i] * c + rows.q0[i] * m + rows.q1[i] * m1
    m1, m2 = m, m1
  end = steps // 2
  exact = sigmas[end] * (1 / sigmas[0] + np.cos(ratio[0]) - np.cos(ratio[end]))
  return abs(x - exact)


def test_unipc_and_dpmpp_converge_with_second_order():
  assert error_half_way("euler", 16) / error_half_way("euler", 64) == pytest.approx(4, rel=0.2)
  for solver in ("unipc", "dpmpp"):
    assert error_half_way(solver, 16) > 12 * error_half_way(solver, 64), solver


def test_a_step_runs_inside_scan_with_traced_coefficients():
  plan = solvers.plan("unipc", 4, SHIFT)
  noise = jax.random.normal(jax.random.key(1), (2, 8))

  def body(state, row):
    return solvers.step(row, state, jnp.tanh(state.x)), None

  scanned, _ = jax.lax.scan(body, solvers.init(noise), plan.coefficients)
  state = solvers.init(noise)
  for i in range(4):
    state = solvers.step(plan.row(i), state, jnp.tanh(state.x))
  np.testing.assert_allclose(scanned.x, state.x, atol=1e-6)


def test_state_stays_float32_for_bfloat16_velocities():
  plan = solvers.plan("unipc", 2, SHIFT)
  state = solvers.init(jnp.ones((2, 2), jnp.bfloat16))
  state = solvers.step(plan.row(0), state, jnp.ones((2, 2), jnp.bfloat16))
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize(
  ("solver", "steps", "message"),
  [
    ("unipcc", 4, "sample.solver='unipcc' must be one of .*did you mean 'unipc'"),
    ("unipc", 0, "sample.steps=0 must be at least 1"),
  ],
)
def test_an_impossible_plan_is_refused_by_name(solver, steps, message):
  with pytest.raises(ValueError, match=message):
    solvers.plan(solver, steps, SHIFT)
