"""The objective against its formula; the autoencoder's against its own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.config import Model, Text, Train, Vae
from longlive_jax.model.attention import TeacherForcing, block_borders
from longlive_jax.model.dit import declare_dit
from longlive_jax.model.flow import training_table
from longlive_jax.model.rope import expand, spatial_table, temporal_table
from longlive_jax.model.vae import declare_vae
from longlive_jax.train import autoencoder
from longlive_jax.train.teacher_forcing import Batch, block_timesteps, loss_mask, objective, prepare

CFG = Model(
  width=24,
  ffn_width=32,
  heads=2,
  layers=1,
  frequency_width=16,
  block_latents=2,
  shift=3.0,
  dtype="float32",
  text=Text(width=8, length=4),
  vae=Vae(latent_channels=3),
)
TABLE = training_table(CFG.shift)
B, F = 2, 4


@pytest.fixture(scope="module")
def batch() -> Batch:
  clean, noise, levels, words = jax.random.split(jax.random.key(0), 4)
  shape = (B, F, 2, 4, 3)
  return Batch(
    clean=jax.random.normal(clean, shape),
    noise=jax.random.normal(noise, shape),
    timesteps=block_timesteps(levels, B, F, 2, TABLE),
    prompts=jax.random.normal(words, (B * 2, 4, 8)),
    pieces=2,
  )


def test_levels_are_equal_within_a_block_and_spread_over_the_table():
  times = np.asarray(block_timesteps(jax.random.key(1), 500, 6, 2, TABLE))
  np.testing.assert_array_equal(times[:, ::2], times[:, 1::2])
  assert np.isin(times, TABLE.timesteps).all()
  assert not (times[:, 0] == times[:, 2]).all()
  quantiles = np.quantile(times, [0.1, 0.5, 0.9])
  np.testing.assert_allclose(quantiles, np.quantile(TABLE.timesteps, [0.1, 0.5, 0.9]), atol=30)


def test_a_fresh_network_scores_the_weighted_square_of_the_target(batch: Batch):
  """A fresh head predicts 0, so the loss is known in closed form."""
  network = declare_dit(CFG)
  space = spatial_table(1, 2, CFG.head_dim, CFG.rope_theta)
  rope = expand(temporal_table(np.arange(F), CFG.head_dim, CFG.rope_theta), space)
  plan = TeacherForcing(rope, block_borders(F, 2, 2))
  loss = jax.jit(lambda p, b: objective(network, p, b, plan, TABLE))
  value, estimate = loss(network.init(0), batch)
  target = np.asarray(batch.noise - batch.clean, np.float64)
  index = [[list(TABLE.timesteps).index(t) for t in row] for row in np.asarray(batch.timesteps)]
  weights = TABLE.weights[np.asarray(index)]
  error = (target**2).mean((2, 3, 4))
  np.testing.assert_allclose(value, (error * weights).mean(), rtol=1e-5)
  sigma = TABLE.sigmas[np.asarray(index)][..., None, None, None]
  np.testing.assert_allclose(
    estimate.clean, (1 - sigma) * batch.clean + sigma * batch.noise, atol=1e-5
  )
  masked = dataclasses.replace(batch, first=batch.clean[:, :1])
  error[:, 0] = 0.0
  expected = (error * weights).sum() / (B * (F - 1))
  np.testing.assert_allclose(loss(network.init(0), masked)[0], expected, rtol=1e-5)


def test_a_given_first_latent_is_clean_in_both_halves(batch: Batch):
  given = dataclasses.replace(
    batch, first=batch.clean[:, :1] + 1.0, context_timesteps=jnp.full((B, F), 200.0)
  )
  inputs = prepare(given, TABLE)
  for x in (inputs.noisy, inputs.context):
    np.testing.assert_array_equal(x[:, :1], given.first)
  assert inputs.context_timesteps is not None
  for times in (inputs.timesteps, inputs.context_timesteps):
    assert (times[:, 0] == 0).all() and (times[:, 1:] > 0).all()
  assert (inputs.target[:, 0] == 0).all()
  some = prepare(dataclasses.replace(given, given=jnp.array([False, True])), TABLE)
  plain = prepare(batch, TABLE)
  np.testing.assert_array_equal(some.noisy[0], plain.noisy[0])
  np.testing.assert_array_equal(some.noisy[1], inputs.noisy[1])
  assert some.timesteps[0, 0] > 0 and some.timesteps[1, 0] == 0
  mask = loss_mask(dataclasses.replace(given, given=jnp.array([False, True])))
  np.testing.assert_array_equal(mask, [[1, 1, 1, 1], [0, 1, 1, 1]])
  np.testing.assert_array_equal(plain.context, batch.clean)
  np.testing.assert_array_equal(plain.noisy[:, 1:], inputs.noisy[:, 1:])


def test_the_autoencoder_is_scored_by_error_and_divergence():
  network = declare_vae(Vae(encoder_width=2, decoder_width=2, latent_channels=2, residual_blocks=1))
  params = network.init(0)
  video = jax.random.uniform(jax.random.key(0), (1, 5, 32, 32, 3), minval=-1.0)
  cfg = Train(kl_weight=0.5)
  loss, metrics = jax.jit(lambda p, v, k: autoencoder.objective(network, p, v, k, cfg))(
    params, video, jax.random.key(1)
  )
  squared = 4.0 / 10.0 ** (float(metrics["psnr"]) / 10.0)
  expected = float(metrics["l1"]) + squared + 0.5 * float(metrics["kl"])
  np.testing.assert_allclose(loss, expected, rtol=1e-4)
  assert metrics["kl"] > 0


def test_what_moves_weighs_more():
  video = np.full((2, 4, 8, 8, 3), -0.5, np.float32)
  video[0, :2, 2, 3] = 0.5  # a pixel that changes half way
  weights = np.asarray(autoencoder.motion_weights(jnp.asarray(video), 4.0))
  assert weights.shape == (2, 4, 8, 8, 1)
  np.testing.assert_allclose(weights.mean((1, 2, 3, 4)), 1.0, rtol=1e-6)
  np.testing.assert_allclose(weights[0, :, 2, 3] / weights[0, :, :1, 0], 3.0, rtol=1e-6)
  np.testing.assert_allclose(weights[1], 1.0, rtol=1e-6)
  np.testing.assert_array_equal(autoencoder.motion_weights(jnp.asarray(video), 0.0), 1.0)


def test_statistics_normalise_each_channel():
  means = np.random.default_rng(0).normal([1.0, -2.0, 0.0], [3.0, 0.5, 0.0], (50, 4, 3))
  params = autoencoder.with_statistics({"kernel": jnp.ones(1)}, jnp.asarray(means))
  flat = means.reshape(-1, 3)
  np.testing.assert_allclose(params["latent_mean"], flat.mean(0), atol=1e-5)
  np.testing.assert_allclose(params["latent_std"][:2], flat.std(0)[:2], rtol=1e-4)
  assert params["latent_std"][2] == np.float32(1e-3), "a dead channel must not divide by zero"
  assert "kernel" in params
