"""Stage "vae": the autoencoder's objective, and the statistics its latents are normalised with.

`|decode(z) - x| + kl_weight KL(N(mu, sigma) | N(0, 1))` with `z = mu + sigma eps`.
"""

import jax
import jax.numpy as jnp

from longlive_jax.model.module import Network
from longlive_jax.types import Array, PyTree


def objective(
  network: Network, params: PyTree, video: Array, key: Array, kl_weight: float
) -> tuple[Array, dict[str, Array]]:
  """Loss of one batch.

  Args:
    network: declared VAE.
    params: its parameters.
    video: `[B, 1 + 4m, H, W, 3]` in [-1, 1].
    key: of the posterior's noise.
    kl_weight: of the divergence, per element of the latents.

  Returns:
    (loss, {"l1", "psnr", "kl"}).
  """
  vae = network.bind(params)
  mean, log_variance = vae.moments(video)
  log_variance = jnp.clip(log_variance, -20.0, 10.0)
  latents = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape)
  error = vae.decode_raw(latents) - video
  absolute, squared = jnp.mean(jnp.abs(error)), jnp.mean(error**2)
  divergence = 0.5 * jnp.mean(mean**2 + jnp.exp(log_variance) - 1.0 - log_variance)
  loss = absolute + squared + kl_weight * divergence
  psnr = 10.0 * jnp.log10(4.0 / squared)
  return loss, {"l1": absolute, "psnr": psnr, "kl": divergence}


def with_statistics(params: PyTree, means: Array) -> PyTree:
  """Sets the constants that normalise latents to mean 0 and deviation 1 a channel.

  Args:
    params: of the VAE.
    means: raw posterior means `[..., C]` of many clips.
  """
  flat = means.astype(jnp.float32).reshape(-1, means.shape[-1])
  deviation = jnp.maximum(jnp.std(flat, 0), 1e-3)
  return {**params, "latent_mean": jnp.mean(flat, 0), "latent_std": deviation}
