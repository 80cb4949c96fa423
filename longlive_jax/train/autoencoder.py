"""Stage "vae": the autoencoder's objective, and the statistics its latents are normalised with.

`w (|e| + e^2) + kl_weight KL(N(mu, sigma) | N(0, 1))` with `e = decode(z) - x`,
`z = mu + sigma eps` and a weight w that is larger where something moves.
"""

import jax
import jax.numpy as jnp

from longlive_jax.config import Train
from longlive_jax.model.module import Network
from longlive_jax.types import Array, PyTree


def motion_weights(video: Array, strength: float) -> Array:
  """Weight of each pixel in the loss: `1 + strength |x - mean of x over time|`, scaled to mean 1.

  Still pixels are most of a clip and easily learnt; the edges of what moves are few and are what
  a viewer looks at.

  Args:
    video: `[B, T, H, W, 3]` in [-1, 1].
    strength: >= 0; 0 weighs all pixels the same.

  Returns:
    `[B, T, H, W, 1]` float32, mean 1 over each clip.
  """
  away = jnp.abs(video - jnp.mean(video, 1, keepdims=True))
  weights = 1.0 + strength * jnp.mean(away, -1, keepdims=True)
  return weights / jnp.mean(weights, (1, 2, 3, 4), keepdims=True)


def objective(
  network: Network, params: PyTree, video: Array, key: Array, cfg: Train
) -> tuple[Array, dict[str, Array]]:
  """Loss of one batch.

  Args:
    network: declared VAE.
    params: its parameters.
    video: `[B, 1 + 4m, H, W, 3]` in [-1, 1].
    key: of the posterior's noise.
    cfg: `kl_weight` of the divergence, per element of the latents; `motion_weight`, the strength
      of `motion_weights`.

  Returns:
    (loss, {"l1", "psnr", "kl"}); l1 and psnr count all pixels the same.
  """
  vae = network.bind(params)
  mean, log_variance = vae.moments(video)
  log_variance = jnp.clip(log_variance, -20.0, 10.0)
  latents = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape)
  error = vae.decode_raw(latents) - video
  absolute, squared = jnp.abs(error), error**2
  weights = motion_weights(video, cfg.motion_weight)
  divergence = 0.5 * jnp.mean(mean**2 + jnp.exp(log_variance) - 1.0 - log_variance)
  loss = jnp.mean(weights * (absolute + squared)) + cfg.kl_weight * divergence
  psnr = 10.0 * jnp.log10(4.0 / jnp.mean(squared))
  return loss, {"l1": jnp.mean(absolute), "psnr": psnr, "kl": divergence}


def with_statistics(params: PyTree, means: Array) -> PyTree:
  """Sets the constants that normalise latents to mean 0 and deviation 1 a channel.

  Args:
    params: of the VAE.
    means: raw posterior means `[..., C]` of many clips.
  """
  flat = means.astype(jnp.float32).reshape(-1, means.shape[-1])
  deviation = jnp.maximum(jnp.std(flat, 0), 1e-3)
  return {**params, "latent_mean": jnp.mean(flat, 0), "latent_std": deviation}
