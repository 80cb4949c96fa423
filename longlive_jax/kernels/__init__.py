"""Pallas Mosaic GPU kernels: arrays in, arrays out, each with a plain `jnp` reference."""
