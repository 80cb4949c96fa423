"""Tables and conversions of flow matching."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.model import flow

TABLE = flow.training_table(5.0)


def test_training_table_has_the_recorded_sigmas():
  at = {0: 1.0, 1: 0.99979979, 100: 0.97826087, 250: 0.9375, 750: 0.625, 999: 0.00498008}
  for index, sigma in at.items():
    assert TABLE.sigmas[index] == pytest.approx(sigma, rel=1e-7)
  assert flow.training_table(8.0).sigmas[998] == pytest.approx(0.01577909, rel=1e-6)


def test_training_weights_have_mean_one_and_the_recorded_values():
  assert TABLE.weights.astype(np.float64).mean() == pytest.approx(1.0, abs=1e-6)
  assert np.argmax(TABLE.weights) == 833
  at = {0: 0.0, 500: 1.02486, 833: 2.0764, 900: 1.86535, 999: 0.03188}
  for index, weight in at.items():
    assert TABLE.weights[index] == pytest.approx(weight, abs=2e-5)


def test_uniform_weighting_changes_the_weights_alone():
  uniform = flow.training_table(5.0, weighting="uniform")
  np.testing.assert_array_equal(uniform.weights, np.ones(1000, np.float32))
  np.testing.assert_array_equal(uniform.sigmas, TABLE.sigmas)
  np.testing.assert_array_equal(uniform.timesteps, TABLE.timesteps)


def test_tables_are_float32_and_fall():
  for extra in (True, False):
    table = flow.flow_match_table(50, 3.0, extra)
    assert table.sigmas.dtype == table.timesteps.dtype == table.weights.dtype == np.float32
    assert np.all(np.diff(table.sigmas) < 0)
    assert (table.sigmas[-1] == 0) == (not extra)


def test_weights_of_a_short_table_are_zero_and_finite():
  assert np.all(flow.flow_match_table(20, 5.0).weights == 0)


def test_timestep_zero_is_the_last_entry_and_not_clean():
  assert flow.nearest_index(TABLE, 0.0) == 999
  assert flow.sigma_at(TABLE, jnp.zeros((2, 3))).shape == (2, 3)
  assert float(flow.sigma_at(TABLE, 0.0)) == pytest.approx(0.00498008, rel=1e-6)


def test_nearest_index_takes_the_first_of_a_tie():
  table = flow.Table(*(np.array(a, np.float32) for a in ([1, 0.5], [1000, 500], [0, 0])))
  assert flow.nearest_index(table, 750.0) == 0
  assert flow.nearest_index(table, 749.0) == 1


def test_nearest_index_finds_every_entry_itself():
  np.testing.assert_array_equal(flow.nearest_index(TABLE, TABLE.timesteps), np.arange(1000))


def test_conversions_are_inverse_and_per_latent():
  keys = jax.random.split(jax.random.key(0), 2)
  clean, noise = (jax.random.normal(key, (2, 3, 4, 4, 5)) for key in keys)
  sigma = jnp.array([[1.0, 0.5, 0.1], [0.9, 0.3, 0.7]])
  noisy = flow.add_noise(clean, noise, sigma)
  velocity = flow.velocity_target(clean, noise)
  np.testing.assert_array_equal(noisy[0, 0], noise[0, 0])
  np.testing.assert_allclose(flow.to_clean(noisy, velocity, sigma), clean, atol=1e-6)
  np.testing.assert_allclose(flow.to_velocity(noisy, clean, sigma), velocity, atol=2e-5)


def test_conversions_keep_float32_for_bfloat16_velocities():
  noisy = jnp.full((1, 1, 2), 1.0009765625, jnp.float32)
  velocity = jnp.ones((1, 1, 2), jnp.bfloat16)
  clean = flow.to_clean(noisy, velocity, jnp.array([[0.5]]))
  assert clean.dtype == jnp.float32 and clean[0, 0, 0] == 0.5009765625


@pytest.mark.parametrize(("steps", "shift", "name"), [(0, 5.0, "steps"), (4, 0.0, "model.shift")])
def test_an_impossible_table_is_refused_by_name(steps, shift, name):
  with pytest.raises(ValueError, match=name):
    flow.flow_match_table(steps, shift)
