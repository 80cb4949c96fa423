"""Blocks of latents: shape, noise, a prefix cut into blocks, a watch for numbers gone bad."""

import itertools
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.config import Experiment
from longlive_jax.types import Array


def block_shape(experiment: Experiment, batch: int) -> tuple[int, ...]:
  """Shape `(B, F, H, W, C)` of the latents of a block."""
  model = experiment.model
  size = experiment.latent_height, experiment.latent_width
  return (batch, model.block_latents, *size, model.vae.latent_channels)


def block_noise(seeds: Array, indices: Array, block: Array, shape: tuple[int, ...]) -> Array:
  """Noise `[B, *shape]` float32 of one block, keyed by (seed, index, block) of each sample."""

  def one(seed: Array, index: Array) -> Array:
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), index), block)
    return jax.random.normal(key, shape, jnp.float32)

  return jax.vmap(one)(seeds, indices)


def split_blocks(latents: np.ndarray, shape: tuple[int, ...]) -> list[np.ndarray]:
  """Cuts latents `[B, P * F, H, W, C]` into P blocks of shape `(B, F, H, W, C)`.

  Raises:
    ValueError: another shape, not a whole number of blocks, or numbers that are not finite.
  """
  batch, block, *rest = shape
  fits = latents.ndim == 5 and latents.shape[0] == batch and list(latents.shape[2:]) == rest
  if not fits or latents.shape[1] % block or latents.shape[1] == 0:
    raise ValueError(
      f"prefix has shape {latents.shape}; it must be ({batch}, a multiple of"
      f" model.block_latents={block}, {', '.join(map(str, rest))})"
    )
  if not np.isfinite(latents).all():
    raise ValueError("prefix has numbers that are not finite")
  return np.split(latents, latents.shape[1] // block, 1)


def watched(blocks: Iterable[Array], finite: Callable[[Array], Array]) -> Iterator[Array]:
  """Passes blocks on. The first is looked at before, each other when the next is under way.

  Raises:
    FloatingPointError: a block with numbers that are not finite.
  """
  flags: list[Array] = []  # of the block before
  count = 0
  for block in itertools.chain(blocks, [None]):
    if flags and not flags.pop():
      raise not_finite(count)
    if block is not None:
      flags.append(finite(block))
      count += 1
      if count == 1 and not flags.pop():
        raise not_finite(count)
      yield block


def not_finite(count: int) -> FloatingPointError:
  """The error of the `count`-th block of a video."""
  return FloatingPointError(
    f"block {count} of the video has numbers that are not finite: the weights are damaged or"
    " do not fit the configuration"
  )
