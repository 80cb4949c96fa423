"""Pallas Mosaic GPU kernels: arrays in, arrays out, each with a plain `jnp` reference."""

from longlive_jax.kernels.naming import drop_numbers

drop_numbers()
