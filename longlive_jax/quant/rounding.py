"""Stochastic rounding to E2M1, its noise, and the random Hadamard transform.

Stochastic: with the grid neighbour L below and the step h, a magnitude a becomes L + h where
`(a - L) / h + u >= 1` for u uniform in [0, 1), so that the mean is a.

Hadamard: each 16 elements along the last axis become `y_j = 1/4 sum_i x_i d_i (-1)^popcount(i&j)`.
The signs d are fixed. Orthonormal: a product of two operands that are both turned is unchanged,
while an outlier is spread over its block.

Source: spec/nvfp4.md sections 1.3 and 3.3.
"""

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.checks import check_divides
from longlive_jax.model.ops import contract
from longlive_jax.quant.formats import BLOCK, E2M1_MAX
from longlive_jax.types import Array

HADAMARD_SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)
_NOISE_BITS = 16


def uniform_noise(key: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
  """Two independent uniform numbers in (0, 1) for every element.

  Every element has its own bits, a function of the key and its position in `shape`: under `jit`
  they are the same on any mesh. Inside `shard_map` give every shard a key of its own.

  Args:
    key: a random key.
    shape: of the whole array.

  Returns:
    Two float32 arrays, odd multiples of 2^-17.
  """
  bits = jax.random.bits(key, shape, jnp.uint32)

  def centred(part: Array) -> Array:
    return (part.astype(jnp.float32) + 0.5) * 2.0**-_NOISE_BITS

  return centred(bits >> _NOISE_BITS), centred(bits & (2**_NOISE_BITS - 1))


def round_stochastic(x: Array, noise: Array) -> Array:
  """Rounds float32 to one of the two neighbouring E2M1 values; above 6 becomes 6.

  Args:
    x: any shape.
    noise: uniform in [0, 1), same shape.

  Returns:
    float32, the sign (of zero too) is x's; NaN becomes 6.
  """
  magnitude = jnp.abs(x)
  magnitude = jnp.where(magnitude <= E2M1_MAX, magnitude, E2M1_MAX)
  step = jnp.where(magnitude < 2, 0.5, jnp.where(magnitude < 4, 1.0, 2.0))
  per_step = jnp.where(magnitude < 2, 2.0, jnp.where(magnitude < 4, 1.0, 0.5))
  scaled = magnitude * per_step
  below = jnp.floor(scaled)
  up = (scaled - below) >= (1.0 - noise)
  rounded = (below + up.astype(jnp.float32)) * step
  return jnp.where(jnp.signbit(x) & ~jnp.isnan(x), -rounded, rounded)


def hadamard_matrix() -> np.ndarray:
  """float32 `[16, 16]`, entries +-0.25; `y = x @ matrix`."""
  index = np.arange(BLOCK)
  signs = 1 - 2 * (np.bitwise_count(index[:, None] & index).astype(int) % 2)
  return (np.asarray(HADAMARD_SIGNS)[:, None] * signs / 4).astype(np.float32)


def rotate(x: Array) -> Array:
  """The Hadamard transform along the last axis.

  Args:
    x: `[..., N]`, taken as bfloat16.

  Returns:
    bfloat16 `[..., N]`.

  Raises:
    ValueError: N is no multiple of 16.

  Numerics: sums are float32, the result is rounded to bfloat16 whatever it is fused with.
  """
  check_divides("columns", x.shape[-1], "block", BLOCK)
  blocks = x.reshape(*x.shape[:-1], -1, BLOCK)
  blocks = jax.lax.reduce_precision(blocks.astype(jnp.float32), 8, 7).astype(jnp.bfloat16)
  matrix = jnp.asarray(hadamard_matrix(), jnp.bfloat16)
  y = contract(blocks, matrix, (blocks.ndim - 1, 0))
  return jax.lax.reduce_precision(y, 8, 7).astype(jnp.bfloat16).reshape(x.shape)
