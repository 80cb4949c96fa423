"""Clips at the level of the scores: what is given stays, and is of no level."""

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.model import flow
from longlive_jax.train.dmd import direction, noised, score_timesteps

CLIP, NOISE = (jax.random.normal(jax.random.key(i), (2, 4, 2, 2, 3)) for i in (0, 1))
FIRST = jax.random.normal(jax.random.key(2), (2, 1, 2, 2, 3))
TABLE = flow.training_table(5.0)


def test_a_given_first_latent_is_clean_and_does_not_count():
  timesteps = score_timesteps(jnp.asarray([[100, 100, 900, 900], [500, 500, 500, 500]]), 5.0)
  plain = noised(CLIP, NOISE, timesteps, TABLE)
  found = noised(CLIP, NOISE, timesteps, TABLE, FIRST, jnp.asarray([True, False]))
  np.testing.assert_array_equal(found.noisy[0, :1], FIRST[0])
  assert found.timesteps[0, 0] == 0 and found.mask[0, 0] == 0
  assert found.sigmas[0, 0] == flow.sigma_at(TABLE, 0.0) < 0.01
  for name in ("noisy", "timesteps", "sigmas", "mask"):
    ours, theirs = getattr(found, name), getattr(plain, name)
    np.testing.assert_array_equal(ours[0, 1:], theirs[0, 1:], err_msg=name)
    np.testing.assert_array_equal(ours[1], theirs[1], err_msg=name)


def test_the_direction_is_measured_in_errors_of_its_block():
  r, f = CLIP + 1.0, CLIP + 3.0
  far = r.at[:, 2:].set(CLIP[:, 2:] + 4.0)
  g = direction(CLIP, far, f, 2)
  np.testing.assert_allclose(g[:, :2], 2.0, rtol=1e-5)
  np.testing.assert_allclose(g[:, 2:], -0.25, rtol=1e-5)
  assert (direction(CLIP, CLIP, f, 2) == 0).all()  # by zero: nothing is said
