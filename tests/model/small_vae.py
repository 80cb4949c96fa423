"""A small VAE for tests: sizes, drawn parameters, and a `jit` that compiles quickly."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.config import Vae
from longlive_jax.types import Array, PyTree

SMALL = Vae(encoder_width=4, decoder_width=4, residual_blocks=1, latent_channels=6)

# less optimised code, which compiles in a third of the time
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def drawn(abstract: PyTree) -> PyTree:
  """Parameters with biases, scales and statistics that are not zeros and ones."""
  rng = np.random.default_rng(0)

  def leaf(path: tuple, a: Array) -> Array:
    if path[-1].key == "kernel":
      values = rng.normal(0, np.prod(a.shape[:-1]) ** -0.5, a.shape)
    elif path[-1].key in ("scale", "latent_std"):
      values = rng.uniform(0.5, 1.5, a.shape)
    else:
      values = rng.uniform(-0.2, 0.2, a.shape)
    return jnp.asarray(values, jnp.float32)

  return jax.tree_util.tree_map_with_path(leaf, abstract)
